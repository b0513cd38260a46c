"""task=evaluate: judge several models on the same held-out prompts and pairs.

Writes into the run's folder (report/evaluation_page.py):

    results.json, results.md      metrics with 95 % intervals over prompts, comparisons; the table
    scores.json, samples.jsonl    every prompt's score, for paired comparisons later; responses side by side
    summary.md, report.html       all of it, to read
    latency.json                  with evaluation.latency

With several processes each asks every model for its share of the batches; rank 0 puts them together and writes. What
is answered stands in answers.jsonl until the end: a killed run goes on there.
"""

from typing import Any

import numpy as np

from engine.meter import Meter
from engine.processes import Apart
from evaluation.asked import Asked
from evaluation.costs import entry_of
from evaluation.harness import check_benchmarks
from evaluation.intervals import score_interval
from evaluation.latency import check_latency, latency_rows
from evaluation.majority import majority_scores, majority_temperature
from evaluation.matched import Matched
from evaluation.pieces import Ledger
from evaluation.records import Evaluated, Responses, verified
from evaluation.results import results_of, table, verdicts_of
from evaluation.served import check_served
from evaluation.work import Work, batches_to_answer, matched_temperatures, work_of
from report.evaluation_page import check_advantages, write_results
from rewards.verifiers import Verifier, prompt_text, resolve_verifier, vote_of
from settings.parts import Parts
from settings.schema import EvaluationConfig, Settings


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


def evaluated(
    asked: Asked, work: Work, ledger: Ledger, verifier: Verifier | None, matched: Matched | None
) -> Evaluated:
    """Put a model's pieces together."""
    config, data, tokenizer = asked.settings.evaluation, asked.data, asked.tokenizer
    order = [i for batch in batches_to_answer(data.prompts, config.batch_size) for i in batch]

    def answered(temperature: float, k: int) -> Responses:
        batches = ledger.answers(work.passes[temperature, k])
        found = [[tuple(answer) for answer in answers] for batch in batches for answers in batch]
        samples = dict(zip(order, found, strict=True))
        judge = verifier if k < config.n_samples else None
        return verified([samples[i] for i in range(len(order))], tokenizer, data.prompts, judge, temperature == 0)

    conversations = [row.conversation for row in data.prompts]
    passes = {key: answered(*key) for key in work.passes}
    responses = {temperature: found for (temperature, k), found in passes.items() if k == 0}
    more = {t: [passes[t, k] for k in range(1, config.n_samples)] for t in responses if t > 0}
    votes: list[float] = []
    if config.majority and verifier is not None:
        voting = majority_temperature(config.temperatures)
        votes = majority_scores([passes[voting, k].texts for k in range(config.majority)], conversations, verifier)
    metrics: dict[str, Any] = {}
    if config.reward_accuracy:
        reference = config.reference.get(asked.name)
        logps = np.concatenate(ledger.answers(work.pairs))
        reference_logps = np.concatenate(ledger.answers(work.reference_pairs)) if reference else None
        metrics = rank_pairs(logps, reference_logps, reference)
    benchmarks = ledger.answers(work.benchmarks)[0] if work.benchmarks else {}
    prompts = [prompt_text(c.prompt) for c in conversations]
    timed = latency_rows(asked.settings, asked.own, asked.model(), tokenizer, data.prompts) if config.latency else []
    return Evaluated(prompts, conversations, responses, metrics, votes, timed, benchmarks, more, matched)


def run(settings: Settings) -> None:
    """Judge every model of evaluation.models and write the results into the run's folder."""
    config, meter = settings.evaluation, Meter()
    check_request(config)
    check_served(settings)
    verifier = resolve_verifier(config.verifier) if config.verifier else None
    if config.majority and verifier:
        vote_of(verifier)  # refuses a module without one
    check_benchmarks(config)
    check_advantages(config)
    process = Apart()
    check_latency(config, process.world_size)
    if settings.run.strategy not in ("auto", "none", "ddp"):
        raise ValueError(
            f"strategy={settings.run.strategy}: task=evaluate gives every process whole models of its own. "
            "Leave strategy=auto"
        )
    parts = Parts(settings.run.run_dir / "answers.jsonl", process.rank)
    ledger = Ledger(parts, process.rank, process.world_size)
    asked = {name: Asked(settings, name, process.device) for name in config.models}
    matched = matched_temperatures(asked, ledger, process.is_main)
    works: dict[str, Work] = {}
    for name, one in asked.items():
        works[name] = work_of(one, matched.get(name))
        ledger.share(works[name].every, f"asking {name}" if process.is_main else "")
        one.loaded = ("", None)
    if not process.is_main:
        return
    ledger.wait(piece for work in works.values() for piece in work.every)
    found = {name: evaluated(asked[name], works[name], ledger, verifier, matched.get(name)) for name in works}
    first = next(iter(works))
    for name in works:
        if found[name].prompts != found[first].prompts:
            raise ValueError(
                f"{name} and {first} kept different held-out prompts (another tokenizer drops other rows): "
                "raise model.max_prompt_length and model.max_length"
            )
    results = results_of(settings, found, verdicts_of(settings, found))
    cost = entry_of(found, settings.run.run_dir, meter.seconds, process.world_size, process.device.type)
    write_results(settings, results, found, cost)
    print(f"\n{table(results)}\n{settings.run.run_dir / 'results.json'}", flush=True)
    parts.remove()
