"""task=evaluate: judge several models on the same held-out prompts and pairs.

Writes into the run's folder (report/evaluation_page.py):

    results.json, results.md      metrics with 95 % intervals over prompts, comparisons; the table
    scores.json, samples.jsonl    every prompt's score, for paired comparisons later; responses side by side
    summary.md, report.html       all of it, to read
    latency.json                  with evaluation.latency

With several processes each takes its share of the models; rank 0 writes.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import models
from dataloader import Example, collate, load_examples
from engine.processes import Processes
from evaluation.harness import benchmark_metrics, check_benchmarks
from evaluation.intervals import score_interval
from evaluation.latency import check_latency, latency_rows
from evaluation.majority import majority_scores, majority_temperature, vote_settings
from evaluation.records import Evaluated, Responses
from evaluation.results import results_of, table, verdicts_of
from functional import row_sums, token_logps
from generation.hf import sample
from generation.interface import Response
from report.evaluation_page import check_advantages, write_results
from rewards.verifiers import Verifier, prompt_text, resolve_verifier, scored, vote_of
from settings.schema import EvaluationConfig, GenerationConfig, Settings


class HeldOut(NamedTuple):
    """What the models are judged on: prompts to answer, and pairs to rank."""

    prompts: list[Example]
    pairs: list[Example]


# ---- inputs


def check_request(config: EvaluationConfig) -> None:
    """Refuse what cannot be evaluated, before any model loads."""
    if any(temperature < 0 for temperature in config.temperatures):
        raise ValueError(f"evaluation.temperatures={config.temperatures}: none may be negative (0 is greedy)")
    if config.verifier and not config.temperatures:
        raise ValueError(
            "evaluation.verifier scores responses, but evaluation.temperatures is empty: give one, e.g. [1.0]"
        )
    if not (config.temperatures or config.reward_accuracy or config.latency or config.lm_eval):
        raise ValueError("nothing to evaluate: give evaluation.temperatures, or evaluation.reward_accuracy=true")
    if config.opponent and not (config.verifier or config.reward_model or config.judge):
        raise ValueError(
            f"evaluation.opponent={config.opponent!r} needs somebody who decides who wins: evaluation.verifier, "
            "evaluation.reward_model or "
            "evaluation.judge=true"
        )
    if config.reward_model and config.judge:
        raise ValueError("evaluation.reward_model and evaluation.judge=true both decide who wins: keep one")
    if (config.reward_model or config.judge) and not config.temperatures:
        raise ValueError(
            "evaluation.reward_model and evaluation.judge look at responses, but evaluation.temperatures is empty"
        )
    if config.majority and not any(config.temperatures):
        raise ValueError(
            f"evaluation.majority={config.majority} needs a temperature above 0 in evaluation.temperatures to sample at"
        )


def held_out(settings: Settings, tokenizer: Any) -> HeldOut:
    """Load the test split of every data set; n_eval_examples limits each of them.

    Rows with a prompt alone are the prompts to answer; where there are none, the prompts of all rows are.
    """
    run = settings.run
    rows: list[Example] = []
    for name, config in settings.datasets.items():
        rows += load_examples(
            {name: config},
            "test",
            tokenizer,
            settings.model,
            run.n_eval_examples,
            run.seed,
            run.tokens_dir,
            run.num_proc,
        )
    if not rows:
        raise ValueError("no held-out rows: set datasets.NAME.test to a file, a folder or hub_name:split")
    pairs = [row for row in rows if row.chosen is not None and row.rejected is not None]
    if settings.evaluation.reward_accuracy and not pairs:
        raise ValueError("evaluation.reward_accuracy=true needs held-out pairs: no test row has chosen and rejected")
    prompts = [row for row in rows if row.chosen is None and row.response is None]
    return HeldOut(prompts or rows, pairs)


# ---- one model


def answer(
    settings: Settings, model: Any, tokenizer: Any, prompts: list[Example], temperature: float, label: str
) -> list[Response]:
    """Give one response to each prompt, from the whole distribution; longest prompts first, so batches are alike."""
    config, seed = settings.evaluation, settings.run.seed
    generation: GenerationConfig = replace(
        settings.generation,
        n=1,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        seed=seed,
        calculator=config.calculator,
    )
    stop = models.stop_ids(tokenizer, model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].prompt))
    sampled: dict[int, Response] = {}
    for start in tqdm(range(0, len(order), config.batch_size), desc=f"{label} t={temperature:g}", mininterval=1):
        batch = order[start : start + config.batch_size]
        ids = [prompts[i].prompt for i in batch]
        responses = sample(model, tokenizer, ids, generation, stop, len(tokenizer), seed * 1_000_003 + start)
        sampled.update(zip(batch, responses, strict=True))
    return [sampled[i] for i in range(len(prompts))]


def verified(samples: list[Response], tokenizer: Any, prompts: list[Example], verifier: Verifier | None) -> Responses:
    """Decode the responses, without their end-of-turn token, and score each beside its prompt."""
    bodies = [ids[:-1] if reason == "stop" else ids for ids, reason in samples]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in bodies]
    scores = []
    if verifier is not None:
        scores = [scored(verifier, row.conversation, text) for row, text in zip(prompts, texts, strict=True)]
    return Responses(texts, [len(ids) for ids, _ in samples], [reason == "stop" for _, reason in samples], scores)


@torch.no_grad()
def pair_logps(model: Any, tokenizer: Any, pairs: list[Example], batch_size: int, label: str) -> np.ndarray:
    """Return log p(chosen) and log p(rejected) of each pair, [P, 2] float64."""
    device = next(model.parameters()).device
    parts = []
    for start in tqdm(range(0, len(pairs), batch_size), desc=f"pairs {label}", mininterval=1):
        chunk = pairs[start : start + batch_size]
        tokens = [row.chosen for row in chunk if row.chosen] + [row.rejected for row in chunk if row.rejected]
        sequences = collate(tokens, tokenizer.pad_token_id).to(device)
        logits, targets, rows = models.response_logits(model, sequences, len(tokenizer))
        sums = row_sums(token_logps(logits, targets), rows, len(tokens))
        parts.append(sums.double().cpu().numpy().reshape(2, len(chunk)).T)
    return np.concatenate(parts)


def rank_pairs(logps: np.ndarray, reference_logps: np.ndarray | None, reference: str | None) -> dict[str, Any]:
    """Return the share of pairs ranked right and the mean margin in nats, before any factor beta.

    logps [P, 2]. With a reference the reward is the log-ratio to it; without one the metrics are those of the plain
    log-probability, and are named so. An exact tie is not ranked right.
    """
    name = "reward" if reference_logps is not None else "logprob"
    rewards = logps - reference_logps if reference_logps is not None else logps
    margins = rewards[:, 0] - rewards[:, 1]
    right = (margins > 0).astype(float).tolist()
    metrics = {
        f"{name}_accuracy": float(np.mean(right)),
        f"{name}_accuracy_ci95": list(score_interval(right)),
        f"{name}_margin": float(margins.mean()),
        "num_pairs": len(right),
    }
    return {**metrics, "reference": reference} if reference else metrics


def evaluate_model(settings: Settings, name: str, processes: Processes, verifier: Verifier | None) -> Evaluated:
    """Answer the prompts with one model at every temperature, and rank the pairs."""
    config = settings.evaluation
    own = settings.model.of_folder(config.models[name])
    dtype = models.resolve_dtype(own.policy_dtype, processes.device)
    tokenizer = models.load_tokenizer(own)
    data = held_out(settings, tokenizer)

    def load(source: str) -> Any:
        return models.load_model(own.of_folder(source), dtype=dtype, trainable=False).to(processes.device)

    model = load(config.models[name])
    responses = {}
    for temperature in config.temperatures:
        samples = answer(settings, model, tokenizer, data.prompts, temperature, name)
        responses[temperature] = verified(samples, tokenizer, data.prompts, verifier)
    votes: list[float] = []
    if config.majority and verifier is not None:
        voting = majority_temperature(config.temperatures)
        passes = [responses[voting].texts]  # the main pass votes, too
        for k in range(1, config.majority):
            samples = answer(vote_settings(settings, k), model, tokenizer, data.prompts, voting, f"{name} vote {k + 1}")
            passes.append(verified(samples, tokenizer, data.prompts, None).texts)
        votes = majority_scores(passes, [row.conversation for row in data.prompts], verifier)
    benchmarks = benchmark_metrics(settings, model, tokenizer) if config.lm_eval else {}
    timed = latency_rows(settings, own, model, tokenizer, data.prompts) if config.latency else []
    metrics: dict[str, Any] = {}
    if config.reward_accuracy:
        size = settings.model.eval_batch_size
        logps = pair_logps(model, tokenizer, data.pairs, size, name)
        del model
        reference = config.reference.get(name)
        reference_logps = (
            pair_logps(load(reference), tokenizer, data.pairs, size, f"{name}, reference") if reference else None
        )
        metrics = rank_pairs(logps, reference_logps, reference)
    conversations = [row.conversation for row in data.prompts]
    return Evaluated(
        [prompt_text(c.prompt) for c in conversations], conversations, responses, metrics, votes, timed, benchmarks
    )


def run(settings: Settings) -> None:
    """Judge every model of evaluation.models and write the results into the run's folder."""
    config = settings.evaluation
    check_request(config)
    verifier = resolve_verifier(config.verifier) if config.verifier else None
    if config.majority and verifier:
        vote_of(verifier)  # refuses a module without one
    check_benchmarks(config)
    check_advantages(config)
    processes = Processes()
    check_latency(config, processes.world_size)
    if settings.run.strategy not in ("auto", "none", "ddp"):
        raise ValueError(
            f"strategy={settings.run.strategy}: task=evaluate gives every process whole models of its own. "
            "Leave strategy=auto"
        )
    names = list(config.models)
    own = names[processes.rank :: processes.world_size]
    gathered = dict(processes.gathered([(name, evaluate_model(settings, name, processes, verifier)) for name in own]))
    evaluated = {name: gathered[name] for name in names}
    for name in names:
        if evaluated[name].prompts != evaluated[names[0]].prompts:
            raise ValueError(
                f"{name} and {names[0]} kept different held-out prompts (another tokenizer drops other rows): "
                "raise model.max_prompt_length and model.max_length"
            )
    if processes.is_main:
        results = results_of(settings, evaluated, verdicts_of(settings, evaluated))
        write_results(settings, results, evaluated)
        print(f"\n{table(results)}\n{settings.run.run_dir / 'results.json'}", flush=True)
    processes.wait()
    processes.close()
