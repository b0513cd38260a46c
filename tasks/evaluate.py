"""task=evaluate: judge several models on the same held-out prompts and pairs.

Writes results.json (scores with 95 % intervals over prompts, comparisons), results.md (a table), scores.json (every
prompt's score, for paired comparisons later), samples.jsonl (replies side by side), summary.md and report.html (all of
it, tasks/evaluation_report.py), and with evaluation.latency latency.json.
With several processes each takes its share of the models; rank 0 writes.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

import models
from checkers import Checker, prompt_text, resolve_checker, scored, vote_of
from dataloader import Example, Sequences, collate, load_examples
from functional import row_sums, token_logps
from intervals import paired_difference, score_interval
from report import best_model
from schema import EvaluationConfig, GenerationConfig, ModelConfig, Settings
from tasks.benchmarks import benchmark_figures, check_benchmarks
from tasks.comparisons import compare_all
from tasks.evaluation_report import check_advantages, write_artifacts
from tasks.generate import Reply, sample
from tasks.latency import check_latency, latency_rows
from tasks.majority import majority_figures, majority_scores, majority_temperature, vote_settings
from tasks.text_statistics import text_figures
from trainers.strategy import check_strategy

MAX_SAMPLES = 200  # replies a model in samples.jsonl


class HeldOut(NamedTuple):
    """What the models are judged on: prompts to answer, and pairs to rank."""

    prompts: list[Example]
    pairs: list[Example]


class Replies(NamedTuple):
    """One reply to each held-out prompt, in their order; scores are empty without a checker."""

    texts: list[str]
    num_tokens: list[int]
    ended: list[bool]
    scores: list[float]


class Judged(NamedTuple):
    """All that is known of one model: its replies by temperature, and its figures on the pairs."""

    prompts: list[str]
    replies: dict[float, Replies]
    pair_figures: dict[str, Any]
    majority_scores: list[float] = []  # of the most frequent answer to each prompt, where it was asked for
    latency: list[dict[str, Any]] = []  # a row a backend and batch size
    benchmarks: dict[str, Any] = {}  # figures of lm-evaluation-harness by task


# ---- inputs


def check_request(config: EvaluationConfig) -> None:
    """Refuse what cannot be evaluated, before any model loads."""
    if not config.models:
        raise ValueError("evaluation.models is empty: name at least one, e.g. evaluation.models.mine=outputs/run/FINAL")
    if any(temperature < 0 for temperature in config.temperatures):
        raise ValueError(f"evaluation.temperatures={config.temperatures}: none may be negative (0 is greedy)")
    if config.checker and not config.temperatures:
        raise ValueError(
            "evaluation.checker judges replies, but evaluation.temperatures is empty: give one, e.g. [1.0]"
        )
    if not (config.temperatures or config.reward_accuracy or config.latency or config.lm_eval):
        raise ValueError("nothing to evaluate: give evaluation.temperatures, or evaluation.reward_accuracy=true")
    if config.opponent and not config.checker:
        raise ValueError(f"evaluation.opponent={config.opponent!r} needs evaluation.checker: it decides who wins")
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
        rows += load_examples({name: config}, "test", tokenizer, settings.model, run.n_eval_examples, run.seed)
    if not rows:
        raise ValueError("no held-out rows: set datasets.NAME.test to a file, a folder or hub_name:split")
    pairs = [row for row in rows if row.chosen is not None and row.rejected is not None]
    if settings.evaluation.reward_accuracy and not pairs:
        raise ValueError("evaluation.reward_accuracy=true needs held-out pairs: no test row has chosen and rejected")
    prompts = [row for row in rows if row.chosen is None and row.response is None]
    return HeldOut(prompts or rows, pairs)


def main_temperature(temperatures: Sequence[float]) -> float | None:
    """Return the temperature of the top-level score: 1 where it was asked for, else the first; None without any."""
    return 1.0 if 1.0 in temperatures else next(iter(temperatures), None)


# ---- one model


def answer(
    settings: Settings, model: Any, tokenizer: Any, prompts: list[Example], temperature: float, label: str
) -> list[Reply]:
    """Reply one reply to each prompt, from the whole distribution; longest prompts first, so batches are alike."""
    config, seed = settings.evaluation, settings.run.seed
    generation: GenerationConfig = replace(
        settings.generation, n=1, temperature=temperature, top_p=1.0, top_k=0,
        max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, seed=seed, calculator=config.calculator,
    )  # fmt: skip
    stop = models.stop_ids(tokenizer, model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].prompt))
    sampled: dict[int, Reply] = {}
    for start in tqdm(range(0, len(order), config.batch_size), desc=f"{label} t={temperature:g}", mininterval=1):
        batch = order[start : start + config.batch_size]
        ids = [prompts[i].prompt for i in batch]
        replies = sample(model, tokenizer, ids, generation, stop, len(tokenizer), seed * 1_000_003 + start)
        sampled.update(zip(batch, replies, strict=True))
    return [sampled[i] for i in range(len(prompts))]


def judge_replies(samples: list[Reply], tokenizer: Any, prompts: list[Example], checker: Checker | None) -> Replies:
    """Decode the replies, without their end-of-turn token, and judge each beside its prompt."""
    bodies = [ids[:-1] if reason == "stop" else ids for ids, reason in samples]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in bodies]
    scores = []
    if checker is not None:
        scores = [scored(checker, row.conversation, text) for row, text in zip(prompts, texts, strict=True)]
    return Replies(texts, [len(ids) for ids, _ in samples], [reason == "stop" for _, reason in samples], scores)


@torch.no_grad()
def pair_logps(model: Any, tokenizer: Any, pairs: list[Example], batch_size: int, label: str) -> np.ndarray:
    """Return log p(chosen) and log p(rejected) of each pair, [P, 2] float64."""
    device = next(model.parameters()).device
    parts = []
    for start in tqdm(range(0, len(pairs), batch_size), desc=f"pairs {label}", mininterval=1):
        chunk = pairs[start : start + batch_size]
        tokens = [row.chosen for row in chunk if row.chosen] + [row.rejected for row in chunk if row.rejected]
        sequences = Sequences(*(part.to(device) for part in collate(tokens, tokenizer.pad_token_id)))
        logits, targets, rows = models.response_logits(model, sequences, len(tokenizer))
        sums = row_sums(token_logps(logits, targets), rows, len(tokens))
        parts.append(sums.double().cpu().numpy().reshape(2, len(chunk)).T)
    return np.concatenate(parts)


def rank_pairs(logps: np.ndarray, reference_logps: np.ndarray | None, reference: str | None) -> dict[str, Any]:
    """Return the share of pairs ranked right and the mean margin in nats, before any factor beta.

    logps [P, 2]. With a reference the reward is the log-ratio to it; without one the figures are those of the plain
    log-probability, and are named so. An exact tie is not ranked right.
    """
    name = "reward" if reference_logps is not None else "logprob"
    rewards = logps - reference_logps if reference_logps is not None else logps
    margins = rewards[:, 0] - rewards[:, 1]
    right = (margins > 0).astype(float).tolist()
    figures = {
        f"{name}_accuracy": float(np.mean(right)),
        f"{name}_accuracy_ci95": list(score_interval(right)),
        f"{name}_margin": float(margins.mean()),
        "num_pairs": len(right),
    }
    return {**figures, "reference": reference} if reference else figures


def judge(settings: Settings, name: str, accelerator: Accelerator, checker: Checker | None) -> Judged:
    """Answer the prompts with one model at every temperature, and rank the pairs."""
    config = settings.evaluation
    own: ModelConfig = replace(
        settings.model,
        name_or_path=config.models[name],
        load_from=None,
        from_checkpoint=None,
        build=None,
        num_layers=None,
    )
    dtype = models.resolve_dtype(own.policy_dtype, accelerator.device)
    tokenizer = models.load_tokenizer(replace(own, tokenizer_name_or_path=None))
    data = held_out(settings, tokenizer)

    def load(source: str) -> Any:
        return models.load_model(own, source=source, dtype=dtype, trainable=False).to(accelerator.device)

    model = load(config.models[name])
    replies = {}
    for temperature in config.temperatures:
        samples = answer(settings, model, tokenizer, data.prompts, temperature, name)
        replies[temperature] = judge_replies(samples, tokenizer, data.prompts, checker)
    votes: list[float] = []
    if config.majority and checker is not None:
        voting = majority_temperature(config.temperatures)
        passes = [replies[voting].texts]  # the main pass votes, too
        for k in range(1, config.majority):
            samples = answer(vote_settings(settings, k), model, tokenizer, data.prompts, voting, f"{name} vote {k + 1}")
            passes.append(judge_replies(samples, tokenizer, data.prompts, None).texts)
        votes = majority_scores(passes, [row.conversation for row in data.prompts], checker)
    benchmarks = benchmark_figures(settings, model, tokenizer) if config.lm_eval else {}
    timed = latency_rows(settings, own, model, tokenizer, data.prompts) if config.latency else []
    figures: dict[str, Any] = {}
    if config.reward_accuracy:
        size = settings.model.eval_batch_size
        logps = pair_logps(model, tokenizer, data.pairs, size, name)
        del model
        reference = config.reference.get(name)
        reference_logps = (
            pair_logps(load(reference), tokenizer, data.pairs, size, f"{name}, reference") if reference else None
        )
        figures = rank_pairs(logps, reference_logps, reference)
    return Judged([prompt_text(row.conversation.prompt) for row in data.prompts], replies, figures, votes, timed, benchmarks)


# ---- results


def summary(replies: Replies, phrases: Sequence[str]) -> dict[str, Any]:
    """Return score, interval, text statistics and end-of-turn rate of one model at one temperature."""
    score: dict[str, Any] = {"score": None, "ci95": None}
    if replies.scores:
        score = {"score": float(np.mean(replies.scores)), "ci95": list(score_interval(replies.scores))}
    return {
        **score,
        "n": len(replies.texts),
        **text_figures(replies.texts, replies.num_tokens, phrases),
        "eot_rate": float(np.mean(replies.ended)),
    }


def against(scores: Sequence[float], opponent_scores: Sequence[float], opponent: str) -> dict[str, Any]:
    """Return the win rate over an opponent on the same prompts, a tie counting half, and the difference in score."""
    points = [(own > other) + 0.5 * (own == other) for own, other in zip(scores, opponent_scores, strict=True)]
    difference, interval = paired_difference(scores, opponent_scores)
    return {
        "opponent": opponent,
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
        "win_rate_ci95": list(score_interval(points)),
        "score_difference": difference,
        "score_difference_ci95": list(interval),
    }


def results_of(settings: Settings, judged: dict[str, Judged]) -> dict[str, Any]:
    """Gather the figures of all models into what results.json holds."""
    config, seed = settings.evaluation, settings.run.seed
    main = main_temperature(config.temperatures)
    rows: dict[str, dict[str, Any]] = {}
    for name, one in judged.items():
        row: dict[str, Any] = {"folder": config.models[name], "seeds": [seed]}
        if main is not None:
            row |= {**summary(one.replies[main], config.refusal_phrases), "temperature": main}
        if 0.0 in one.replies:
            row["greedy"] = summary(one.replies[0.0], config.refusal_phrases)
        if one.majority_scores:
            row["majority"] = majority_figures(config, one.majority_scores)
        others = [temperature for temperature in one.replies if temperature not in (main, 0.0)]
        if others:
            row["other_temperatures"] = {
                f"{temperature:g}": summary(one.replies[temperature], config.refusal_phrases) for temperature in others
            }
        if config.opponent and name != config.opponent and main is not None:
            row["against"] = against(
                one.replies[main].scores, judged[config.opponent].replies[main].scores, config.opponent
            )
            wins, ties = row["against"]["wins"], row["against"]["ties"]
            row["win_rate"] = (wins + 0.5 * ties) / row["n"]
        rows[name] = row | one.pair_figures | ({"lm_eval": one.benchmarks} if one.benchmarks else {})

    def compared(temperature: float | None) -> list[dict[str, Any]]:
        scores = {name: one.replies[temperature].scores for name, one in judged.items() if temperature in one.replies}
        return compare_all(scores)

    return {
        "models": rows,
        "comparisons": compared(main),
        "greedy_comparisons": compared(0.0 if main else None),
        "checker": config.checker,
        "opponent": config.opponent,
        "temperatures": config.temperatures,
        "seed": seed,
    }


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table; columns that no model fills are left out.

    A model is marked best only where it is separate from every other one after Holm's correction.
    """
    lines, best = [], best_model(results["models"], results.get("comparisons"))
    for name, row in results["models"].items():
        other, greedy, majority = row.get("against", {}), row.get("greedy", {}), row.get("majority", {})
        ranked = "reward" if "reward_accuracy" in row else "logprob"
        lines.append({
            "model": f"**{name}** ▲" if name == best else name,
            f"score, t {row.get('temperature', 0):g} [95 %]": _with_interval(row.get("score"), row.get("ci95")),
            "greedy [95 %]": _with_interval(greedy.get("score"), greedy.get("ci95")),
            f"majority of {majority.get('votes')} [95 %]": _with_interval(majority.get("score"), majority.get("ci95")),
            f"win rate over {results['opponent']}": _with_interval(row.get("win_rate"), other.get("win_rate_ci95")),
            "reward accuracy": _with_interval(row.get("reward_accuracy"), row.get("reward_accuracy_ci95")),
            "log-prob accuracy": _with_interval(row.get("logprob_accuracy"), row.get("logprob_accuracy_ci95")),
            "margin, nats": _with_interval(row.get(f"{ranked}_margin"), None),
            "tokens": f"{row['mean_response_tokens']:.1f}" if "mean_response_tokens" in row else "-",
            "ended": _with_interval(row.get("eot_rate"), None),
            "refused": _with_interval(row.get("refusal_rate"), None),
            "repeated 4-grams": _with_interval(row.get("repeated_4grams"), None),
            "loops": _with_interval(row.get("loop_rate"), None),
        })  # fmt: skip
    columns = [column for column in lines[0] if any(line[column] != "-" for line in lines)]
    body = ["| " + " | ".join(line[column] for column in columns) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *body]) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_results(settings: Settings, results: dict[str, Any], judged: dict[str, Judged]) -> None:
    """Write samples.jsonl, scores.json, results.md, summary.md, report.html and, last, results.json."""
    run_dir = settings.run.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    first = next(iter(judged.values()))
    temperatures = list(first.replies)
    main = main_temperature(temperatures)
    if main is not None:
        samples = []
        for i, prompt in enumerate(first.prompts[:MAX_SAMPLES]):
            texts = {name: one.replies[main].texts[i] for name, one in judged.items()}
            scores = {name: one.replies[main].scores[i] for name, one in judged.items() if one.replies[main].scores}
            samples.append(
                json.dumps(
                    {"prompt": prompt, "temperature": main, "responses": texts, "scores": scores}, ensure_ascii=False
                )
            )
        _write(run_dir / "samples.jsonl", "\n".join(samples) + "\n")
        every = {
            f"{temperature:g}": {name: one.replies[temperature].scores for name, one in judged.items()}
            for temperature in temperatures
        }
        if first.majority_scores:
            every["majority"] = {name: one.majority_scores for name, one in judged.items()}
        _write(run_dir / "scores.json", json.dumps(every) + "\n")
    _write(run_dir / "results.md", table(results))
    timed = {name: one.latency for name, one in judged.items() if one.latency}
    if timed:
        _write(run_dir / "latency.json", json.dumps(timed, indent=1) + "\n")
    write_artifacts(run_dir, table(results), results, timed, settings.evaluation.advantages)
    _write(run_dir / "results.json", json.dumps(results, indent=1) + "\n")


def run(settings: Settings) -> None:
    """Judge every model of evaluation.models and write the results into the run's folder."""
    config = settings.evaluation
    check_request(config)
    checker = resolve_checker(config.checker) if config.checker else None
    if config.majority and checker:
        vote_of(checker)  # refuses a module without one
    check_benchmarks(config)
    check_advantages(config)
    accelerator = Accelerator()
    check_latency(config, accelerator.num_processes)
    check_strategy(settings.run.strategy, accelerator)
    names = list(config.models)
    own = names[accelerator.process_index :: accelerator.num_processes]
    gathered = dict(gather_object([(name, judge(settings, name, accelerator, checker)) for name in own]))
    judged = {name: gathered[name] for name in names}
    for name in names:
        if judged[name].prompts != judged[names[0]].prompts:
            raise ValueError(
                f"{name} and {names[0]} kept different held-out prompts (another tokenizer drops other rows): "
                "raise model.max_prompt_length and model.max_length"
            )
    if accelerator.is_main_process:
        results = results_of(settings, judged)
        write_results(settings, results, judged)
        print(f"\n{table(results)}\n{settings.run.run_dir / 'results.json'}", flush=True)
    accelerator.wait_for_everyone()
