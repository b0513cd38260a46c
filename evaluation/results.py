"""The results of task=evaluate: metrics with intervals, win rates, the table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.bradley_terry import elo_rows, judged_elo_rows
from evaluation.comparisons import best_model, compare_all
from evaluation.intervals import score_interval
from evaluation.lineage import GENERATED, SCORED, generated_tokens, scored_responses
from evaluation.majority import majority_metrics
from evaluation.markdown import markdown
from evaluation.matched import MATCHED, matched_entry
from evaluation.metrics import DIGITS, METRICS, Metric, at, is_number, present
from evaluation.records import Evaluated, Responses, main_temperature
from evaluation.several import several_metrics
from evaluation.text_statistics import text_metrics
from evaluation.turns import later_turns
from evaluation.verdict import said_of
from evaluation.win_rate import against, judged_points, points_of, win_rate
from rewards.judge import Judge
from rewards.reward_model import RewardModel
from settings.schema import Settings


class Verdicts(NamedTuple):
    """What a reward model or a judge says of all models: win rates over the opponent, and strengths."""

    rates: dict[str, dict[str, Any]] = {}
    strengths: dict[str, Any] = {}  # {by, models: rows of evaluation.bradley_terry}


def summary(one: Evaluated, temperature: float, phrases: Sequence[str]) -> dict[str, Any]:
    """Return score, interval, text statistics and end-of-turn rate of one model at one temperature.

    The score is over all samples of a prompt, with pass@k and diversity beside it. Text statistics are of the first.
    """
    scores, samples = one.scores(temperature), one.samples(temperature)
    found: dict[str, Any] = {"score": None, "ci95": None}
    if scores:
        found = {"score": float(np.mean(scores)), "ci95": list(score_interval(scores))}
    if scores and len(samples) > 1:
        found["samples"] = several_metrics([r.texts for r in samples], [r.scores for r in samples])
    first = samples[0]
    if first.entropy is not None:
        found["token_entropy"] = float(np.mean([r.entropy for r in samples]))
    return {
        **found,
        "n": len(first.texts),
        **text_metrics(first.texts, first.num_tokens, phrases),
        "eot_rate": float(np.mean(first.ended)),
    }


def win_rates(own: Responses, opponent: Responses, name: str, verdict: dict[str, Any] | None) -> dict[str, Any]:
    """Return the win rate by the verifier's scores (`against`) and by the reward model or judge (`judged`), if any.

    All are of the first response to each prompt.
    """
    row: dict[str, Any] = {"judged": verdict} if verdict else {}
    if own.scores:
        row["against"] = against(own.scores, opponent.scores, own.num_tokens, opponent.num_tokens, name)
        row["win_rate"] = row["against"]["win_rate"]
    return row


def verdicts_of(settings: Settings, evaluated: dict[str, Evaluated]) -> Verdicts:
    """Return what the reward model or the judge says of the first responses at the main temperature."""
    config, main = settings.evaluation, main_temperature(settings.evaluation.temperatures)
    if main is None or config.opponent is None or not (config.reward_model or config.judge):
        return Verdicts()
    responses = {name: one.responses[main] for name, one in evaluated.items()}
    other = responses[config.opponent]
    points: dict[str, tuple[list[float | None], dict[str, Any]]] = {}
    strengths: dict[str, dict[str, Any]] = {}
    if config.reward_model:
        model = RewardModel(settings, config.reward_model, "evaluation.reward_model")
        conversations = evaluated[config.opponent].conversations
        prompts, turns = [one.prompt for one in conversations], [later_turns(one) for one in conversations]
        scores = {
            name: model.scores(r.last_exchanges(prompts, turns), settings.model.eval_batch_size, f"reward {name}")
            for name, r in responses.items()
        }
        for name in responses:
            points[name] = (
                list(points_of(scores[name], scores[config.opponent])),
                {"mean_reward": float(np.mean(scores[name]))},
            )
        strengths = elo_rows(scores)
    else:
        judge = Judge(settings.judge, settings.run.run_dir / "judged.jsonl", settings.judge.on_error)
        for name, r in responses.items():
            if name != config.opponent:
                found, disagreed = judged_points(judge, evaluated[name].prompts, r.texts, other.texts)
                points[name] = (found, {"orders_disagreed": disagreed})
        strengths = judged_elo_rows({name: found for name, (found, _) in points.items()}, config.opponent)
    by = "reward model" if config.reward_model else "judge"
    rates = {
        name: win_rate(found, responses[name].num_tokens, other.num_tokens, config.opponent, by) | more
        for name, (found, more) in points.items()
        if name != config.opponent
    }
    return Verdicts(rates, {"by": by, "models": strengths})


def row_of(settings: Settings, name: str, evaluated: dict[str, Evaluated], verdict: dict[str, Any] | None) -> Any:
    """Return what results.json says of one model."""
    config, one = settings.evaluation, evaluated[name]
    main, phrases = main_temperature(config.temperatures), config.refusal_phrases
    row: dict[str, Any] = {"folder": config.models[name], "seeds": [settings.run.seed]}
    price = {GENERATED: generated_tokens(config.models[name]), SCORED: scored_responses(config.models[name])}
    row |= {what: count for what, count in price.items() if count is not None}
    if main is not None:
        row |= {**summary(one, main, phrases), "temperature": main}
    if 0.0 in config.temperatures:
        row["greedy"] = summary(one, 0.0, phrases)
    if one.majority_scores:
        row["majority"] = majority_metrics(config, one.majority_scores)
    if one.matched is not None and config.match_entropy:
        row["match"] = matched_entry(one.matched, config.match_entropy)
        if one.matched.temperature is not None:
            row[MATCHED] = summary(one, one.matched.temperature, phrases) | {"temperature": one.matched.temperature}
    others = [temperature for temperature in config.temperatures if temperature not in (main, 0.0)]
    if others:
        row["other_temperatures"] = {f"{temperature:g}": summary(one, temperature, phrases) for temperature in others}
    if config.opponent and name != config.opponent and main is not None:
        row |= win_rates(one.responses[main], evaluated[config.opponent].responses[main], config.opponent, verdict)
    return row | one.pair_metrics | ({"lm_eval": one.benchmarks} if one.benchmarks else {})


def results_of(settings: Settings, evaluated: dict[str, Evaluated], verdicts: Verdicts) -> dict[str, Any]:
    """Gather the metrics of all models into what results.json holds."""
    config = settings.evaluation
    main = main_temperature(config.temperatures)
    scores = {name: one.scores(main) for name, one in evaluated.items()}
    results = {
        "models": {name: row_of(settings, name, evaluated, verdicts.rates.get(name)) for name in evaluated},
        "comparisons": compare_all(scores),
        "greedy_comparisons": compare_all({name: one.scores(0.0 if main else None) for name, one in evaluated.items()}),
        "matched_comparisons": compare_all({name: one.matched_scores() for name, one in evaluated.items()}),
        "bradley_terry": elo_rows(scores),
        "bradley_terry_judged": verdicts.strengths,
        "verifier": config.verifier,
        "opponent": config.opponent,
        "match_entropy": config.match_entropy,
        "temperatures": config.temperatures,
        "seed": settings.run.seed,
    }
    return {"verdict": said_of(results, config.match_entropy), **results}


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
    matched = next((at(row, "match.reference") for row in rows if at(row, "match.reference")), None)
    passes = {
        "": f"{first.label}, t {temperature:g}",
        "greedy.": "greedy",
        "majority.": f"majority of {votes}",
        f"{MATCHED}.": f"entropy of {matched}",
    }
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
    lines = [["model", *(heading for heading, _, _ in headings)]]
    for name, row in models.items():
        cells = [written(row, metric, prefix) for _, prefix, metric in headings]
        lines.append([f"**{name}** ▲" if name == best else name, *cells])
    return markdown(lines)


def temperature_cells(results: Mapping[str, Any]) -> list[list[str]]:
    """Return models x temperatures as rows of cells, the heads first; each score with its interval.

    The last column is the score at matched entropy, behind it the temperature that was chosen for it. Empty where there
    is one temperature.
    """
    models, temperatures = results["models"], results.get("temperatures") or []
    ordered, matched = sorted(set(temperatures)), any("match" in row for row in models.values())
    if len(ordered) + matched < 2 or any(row.get("score") is None for row in models.values()):
        return []
    rows = [["model", *("greedy" if t == 0 else f"t {t:g}" for t in ordered)]]
    if matched:
        rows[0] += [f"entropy of {results['match_entropy']}", "at t", "token entropy (wanted), nats"]
    for name, row in models.items():
        rows.append([name, *(written(_at(row, t), METRICS[0]) for t in ordered)])
        if matched:
            chosen, search = row.get(MATCHED, {}), row["match"]
            temperature = f"{search['temperature']:.3g}" if chosen else "none reaches it"
            entropy = f"{search['chosen_entropy']:.3f} ({search['wanted_entropy']:.3f})"
            rows[-1] += [written(chosen, METRICS[0]), temperature, entropy]
    return rows


def samples_cells(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return pass@k and the diversity of right responses as rows of cells, the heads first; empty without samples."""
    passes = {"": "t {:g}", f"{MATCHED}.": "matched, t {:.3g}"}
    entries = [at(row, prefix[:-1]) if prefix else row for row in models.values() for prefix in passes]
    metrics = present([entry for entry in entries if entry], "samples")
    rows = [["model", "sampled at", *(metric.label for metric in metrics)]] if metrics else []
    for name, row in models.items():
        for prefix, words in passes.items():
            if at(row, f"{prefix}samples"):
                how = words.format(at(row, f"{prefix}temperature"))
                rows.append([name, how, *(written(row, metric, prefix) for metric in metrics)])
    return rows


def _at(row: Mapping[str, Any], temperature: float) -> Mapping[str, Any]:
    """Return a model's summary at a temperature, wherever results.json holds it."""
    if temperature == row["temperature"]:
        return row
    return row["greedy"] if temperature == 0 else row["other_temperatures"][f"{temperature:g}"]
