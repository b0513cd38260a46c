"""The results of task=evaluate: metrics with intervals, win rates, the table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.bradley_terry import elo_rows
from evaluation.comparisons import best_model, compare_all
from evaluation.intervals import score_interval
from evaluation.majority import majority_metrics
from evaluation.metrics import DIGITS, METRICS, Metric, at, is_number
from evaluation.records import Evaluated, Responses, main_temperature
from evaluation.text_statistics import text_metrics
from evaluation.verdict import verdict
from evaluation.win_rate import against, judged_points, points_of, win_rate
from rewards.judge import Judge
from rewards.reward_model import RewardModel
from settings.schema import Settings


def summary(responses: Responses, phrases: Sequence[str]) -> dict[str, Any]:
    """Return score, interval, text statistics and end-of-turn rate of one model at one temperature."""
    score: dict[str, Any] = {"score": None, "ci95": None}
    if responses.scores:
        score = {"score": float(np.mean(responses.scores)), "ci95": list(score_interval(responses.scores))}
    return {
        **score,
        "n": len(responses.texts),
        **text_metrics(responses.texts, responses.num_tokens, phrases),
        "eot_rate": float(np.mean(responses.ended)),
    }


def win_rates(own: Responses, opponent: Responses, name: str, verdict: dict[str, Any] | None) -> dict[str, Any]:
    """Return the win rate by the verifier's scores (`against`) and by the reward model or judge (`judged`), if any."""
    row: dict[str, Any] = {"judged": verdict} if verdict else {}
    if own.scores:
        row["against"] = against(own.scores, opponent.scores, own.num_tokens, opponent.num_tokens, name)
        row["win_rate"] = row["against"]["win_rate"]
    return row


def verdicts_of(settings: Settings, evaluated: dict[str, Evaluated]) -> dict[str, dict[str, Any]]:
    """Return each model's win rate over the opponent by the reward model or the judge, at the main temperature."""
    config, main = settings.evaluation, main_temperature(settings.evaluation.temperatures)
    if main is None or config.opponent is None or not (config.reward_model or config.judge):
        return {}
    responses = {name: one.responses[main] for name, one in evaluated.items()}
    other = responses[config.opponent]
    points: dict[str, tuple[list[float | None], dict[str, Any]]] = {}
    if config.reward_model:
        model = RewardModel(settings, config.reward_model, "evaluation.reward_model")
        prompts = [conversation.prompt for conversation in evaluated[config.opponent].conversations]
        scores = {
            name: model.scores(
                list(zip(prompts, r.texts, r.ended, strict=True)), settings.model.eval_batch_size, f"reward {name}"
            )
            for name, r in responses.items()
        }
        for name in responses:
            points[name] = (
                list(points_of(scores[name], scores[config.opponent])),
                {"mean_reward": float(np.mean(scores[name]))},
            )
    else:
        judge = Judge(settings.judge, settings.run.run_dir / "judged.jsonl", settings.judge.on_error)
        for name, r in responses.items():
            if name != config.opponent:
                found, disagreed = judged_points(judge, evaluated[name].prompts, r.texts, other.texts)
                points[name] = (found, {"orders_disagreed": disagreed})
    by = "reward model" if config.reward_model else "judge"
    return {
        name: win_rate(found, responses[name].num_tokens, other.num_tokens, config.opponent, by) | more
        for name, (found, more) in points.items()
        if name != config.opponent
    }


def results_of(
    settings: Settings, evaluated: dict[str, Evaluated], verdicts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Gather the metrics of all models into what results.json holds."""
    config, seed = settings.evaluation, settings.run.seed
    main = main_temperature(config.temperatures)
    rows: dict[str, dict[str, Any]] = {}
    for name, one in evaluated.items():
        row: dict[str, Any] = {"folder": config.models[name], "seeds": [seed]}
        if main is not None:
            row |= {**summary(one.responses[main], config.refusal_phrases), "temperature": main}
        if 0.0 in one.responses:
            row["greedy"] = summary(one.responses[0.0], config.refusal_phrases)
        if one.majority_scores:
            row["majority"] = majority_metrics(config, one.majority_scores)
        others = [temperature for temperature in one.responses if temperature not in (main, 0.0)]
        if others:
            row["other_temperatures"] = {
                f"{temperature:g}": summary(one.responses[temperature], config.refusal_phrases)
                for temperature in others
            }
        if config.opponent and name != config.opponent and main is not None:
            row |= win_rates(
                one.responses[main], evaluated[config.opponent].responses[main], config.opponent, verdicts.get(name)
            )
        rows[name] = row | one.pair_metrics | ({"lm_eval": one.benchmarks} if one.benchmarks else {})

    scores = {name: one.responses[main].scores for name, one in evaluated.items()} if main is not None else {}

    def compared(temperature: float | None) -> list[dict[str, Any]]:
        scores = {
            name: one.responses[temperature].scores for name, one in evaluated.items() if temperature in one.responses
        }
        return compare_all(scores)

    comparisons = compared(main)
    return {
        "verdict": verdict(rows, comparisons),
        "models": rows,
        "comparisons": comparisons,
        "bradley_terry": elo_rows(scores),
        "greedy_comparisons": compared(0.0 if main else None),
        "verifier": config.verifier,
        "opponent": config.opponent,
        "temperatures": config.temperatures,
        "seed": seed,
    }


def written(entry: Mapping[str, Any], metric: Metric, prefix: str = "") -> str:
    """Write a metric of an entry with its interval over prompts, where it has one; a dash where it is missing."""
    value, ends = at(entry, prefix + metric.key), at(entry, metric.interval and prefix + metric.interval)
    if not is_number(value):
        return "-"
    digits = DIGITS[metric.unit]
    return f"{value:.{digits}f}" + (f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else "")


def _headings(models: Mapping[str, Mapping[str, Any]], opponent: str | None) -> list[tuple[str, str, Metric]]:
    """Return (heading, what goes before the key, metric) of each column: the scores of every pass, then the rest."""
    rows, first = list(models.values()), METRICS[0]
    votes = next((row["majority"]["votes"] for row in rows if "majority" in row), None)
    temperature = rows[0].get("temperature", 0)
    passes = {"": f"{first.label}, t {temperature:g}", "greedy.": "greedy", "majority.": f"majority of {votes}"}
    columns = [(f"{words} [95 %]", prefix, first) for prefix, words in passes.items()]
    for metric in METRICS[1:]:
        over = f" over {opponent}" if metric.group == "wins" else ""
        columns += [(metric.label + over + (" [95 %]" if metric.interval else ""), "", metric)] * metric.headline
    return [column for column in columns if any(is_number(at(row, column[1] + column[2].key)) for row in rows)]


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table; columns that no model fills are left out.

    A model is marked best only where it is separate from every other one after Holm's correction.
    """
    models, best = results["models"], best_model(results["models"], results.get("comparisons"))
    headings = _headings(models, results["opponent"])
    lines = [["model", *(heading for heading, _, _ in headings)], ["---"] * (len(headings) + 1)]
    for name, row in models.items():
        cells = [written(row, metric, prefix) for _, prefix, metric in headings]
        lines.append([f"**{name}** ▲" if name == best else name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def temperature_table(models: Mapping[str, Mapping[str, Any]], temperatures: Sequence[float]) -> str:
    """Return models x temperatures as a Markdown table, each score with its interval; empty for one temperature."""
    if len(set(temperatures)) < 2 or any(row.get("score") is None for row in models.values()):
        return ""
    ordered = sorted(set(temperatures))
    lines = ["| model | " + " | ".join("greedy" if t == 0 else f"t {t:g}" for t in ordered) + " |"]
    lines.append("|---" * (len(ordered) + 1) + "|")
    for name, row in models.items():
        lines.append(f"| {name} | " + " | ".join(written(_at(row, t), METRICS[0]) for t in ordered) + " |")
    return "\n".join(lines) + "\n"


def _at(row: Mapping[str, Any], temperature: float) -> Mapping[str, Any]:
    """Return a model's summary at a temperature, wherever results.json holds it."""
    if temperature == row["temperature"]:
        return row
    return row["greedy"] if temperature == 0 else row["other_temperatures"][f"{temperature:g}"]
