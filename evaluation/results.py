"""The results of task=evaluate: metrics with intervals, win rates, the table, and the files in the run's folder."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.comparisons import best_model, compare_all
from evaluation.intervals import score_interval
from evaluation.majority import majority_metrics
from evaluation.records import Evaluated, Responses, main_temperature
from evaluation.text_statistics import text_metrics
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
    """Return the win rate by the verifier's scores (`against`), and by the reward model or judge (`judged`), where
    there is one.
    """
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

    def compared(temperature: float | None) -> list[dict[str, Any]]:
        scores = {
            name: one.responses[temperature].scores for name, one in evaluated.items() if temperature in one.responses
        }
        return compare_all(scores)

    return {
        "models": rows,
        "comparisons": compared(main),
        "greedy_comparisons": compared(0.0 if main else None),
        "verifier": config.verifier,
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
    by = next((row["judged"]["by"] for row in results["models"].values() if "judged" in row), "judge")
    for name, row in results["models"].items():
        other, greedy, majority = row.get("against", {}), row.get("greedy", {}), row.get("majority", {})
        verdict = row.get("judged", {})
        ranked = "reward" if "reward_accuracy" in row else "logprob"
        lines.append(
            {
                "model": f"**{name}** ▲" if name == best else name,
                f"score, t {row.get('temperature', 0):g} [95 %]": _with_interval(row.get("score"), row.get("ci95")),
                "greedy [95 %]": _with_interval(greedy.get("score"), greedy.get("ci95")),
                f"majority of {majority.get('votes')} [95 %]": _with_interval(
                    majority.get("score"), majority.get("ci95")
                ),
                f"win rate over {results['opponent']}": _with_interval(row.get("win_rate"), other.get("win_rate_ci95")),
                f"win rate by the {by}": _with_interval(verdict.get("win_rate"), verdict.get("win_rate_ci95")),
                "at equal length": _with_interval(
                    verdict.get("length_controlled_win_rate"), verdict.get("length_controlled_ci95")
                ),
                "reward accuracy": _with_interval(row.get("reward_accuracy"), row.get("reward_accuracy_ci95")),
                "log-prob accuracy": _with_interval(row.get("logprob_accuracy"), row.get("logprob_accuracy_ci95")),
                "margin, nats": _with_interval(row.get(f"{ranked}_margin"), None),
                "tokens": f"{row['mean_response_tokens']:.1f}" if "mean_response_tokens" in row else "-",
                "ended": _with_interval(row.get("eot_rate"), None),
                "refused": _with_interval(row.get("refusal_rate"), None),
                "repeated 4-grams": _with_interval(row.get("repeated_4grams"), None),
                "loops": _with_interval(row.get("loop_rate"), None),
            }
        )
    columns = [column for column in lines[0] if any(line[column] != "-" for line in lines)]
    body = ["| " + " | ".join(line[column] for column in columns) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *body]) + "\n"
