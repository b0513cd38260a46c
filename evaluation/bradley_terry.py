"""Bradley-Terry strengths of all models from scores on the same prompts, as Elo points (Bradley and Terry 1952)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ELO = 400 / np.log(10)  # Elo points of one nat of log-odds
PRIOR = 0.5  # wins that each model is given over each other one: strengths stay finite where one never loses


def wins_of(scores: np.ndarray) -> np.ndarray:
    """Return how often each model beats each other one, [M, M] from scores [M, P]; a tie is half a win to both."""
    first, second = scores[:, None, :], scores[None, :, :]
    wins: np.ndarray = (first > second).sum(axis=2) + 0.5 * (first == second).sum(axis=2)
    np.fill_diagonal(wins, 0.0)
    return wins


def strengths(wins: np.ndarray, prior: float = PRIOR, steps: int = 200, tolerance: float = 1e-9) -> np.ndarray:
    """Return log-strengths [M] of mean 0 that maximize the likelihood of wins [M, M], by damped Newton steps.

    prior is added to every pair's wins, both ways. RuntimeError where the steps have not settled.
    """
    counts = wins + prior * (1 - np.eye(len(wins)))
    games, total = counts + counts.T, counts.sum(axis=1)
    logs = np.zeros(len(wins))
    for _ in range(steps):
        chance = 0.5 + 0.5 * np.tanh((logs[:, None] - logs[None, :]) / 2)  # that the row beats the column
        slope = total - (games * chance).sum(axis=1)
        weights = games * chance * (1 - chance)
        curvature = np.diag(weights.sum(axis=1)) - weights
        step = np.linalg.solve(curvature + weights.max(), slope)  # the constant fixes the mean, which has no slope
        size = float(np.abs(step).max())
        logs = logs + step / max(1.0, size)  # at most a nat: far out the curvature is small and the step too long
        if size < tolerance:
            return logs - logs.mean()
    raise RuntimeError(f"Bradley-Terry: {steps} steps did not settle within {tolerance}")


def elo_rows(scores: Mapping[str, Sequence[float]], resamples: int = 200, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return {model: elo, ci95}, mean 0 over the models, the intervals by the bootstrap over prompts.

    Models without scores are left out; fewer than two give nothing.
    """
    names = [name for name, values in scores.items() if len(values)]
    if len(names) < 2:
        return {}
    values = np.asarray([scores[name] for name in names], dtype=np.float64)
    return _resampled(names, lambda prompts: wins_of(values[:, prompts]), values.shape[1], resamples, seed)


def judged_elo_rows(
    points: Mapping[str, Sequence[float | None]], opponent: str, resamples: int = 200, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return what elo_rows does from verdicts against one opponent: 1, 0.5 or 0 for each prompt, None without verdict.

    The others are compared through the opponent alone, so their intervals are wider than those of all pairs.
    """
    names = [opponent, *(name for name in points if name != opponent)]
    if len(names) < 2:
        return {}
    won = np.asarray([[np.nan if v is None else v for v in points[name]] for name in names[1:]], dtype=np.float64)

    def wins(prompts: np.ndarray) -> np.ndarray:
        found = np.zeros((len(names), len(names)))
        found[1:, 0], found[0, 1:] = np.nansum(won[:, prompts], axis=1), np.nansum(1 - won[:, prompts], axis=1)
        return found

    return _resampled(names, wins, won.shape[1], resamples, seed)


def _resampled(
    names: Sequence[str], wins: Callable[[np.ndarray], np.ndarray], num_prompts: int, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return strengths with bootstrap intervals; wins gives the [M, M] wins of prompts by number."""
    rng = np.random.default_rng(seed)
    draws = [strengths(wins(rng.integers(num_prompts, size=num_prompts))) for _ in range(resamples)]
    low, high = np.quantile(np.stack(draws) * ELO, [0.025, 0.975], axis=0)
    points = strengths(wins(np.arange(num_prompts))) * ELO
    return {name: {"elo": float(points[i]), "ci95": [float(low[i]), float(high[i])]} for i, name in enumerate(names)}


def cells(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the strengths of results.json as rows of cells, the heads first, the strongest model next; empty for none.

    By the verifier's scores, and beside them by the verdicts of the judge or the reward model.
    """
    judged = results.get("bradley_terry_judged") or {}
    columns = {"verifier": results.get("bradley_terry") or {}, judged.get("by", "judge"): judged.get("models") or {}}
    found = {by: rows for by, rows in columns.items() if rows}
    if not found:
        return []
    first, *others = found.values()
    names = sorted(first, key=lambda name: -first[name]["elo"])
    names += [name for rows in others for name in rows if name not in first]
    head = ["model", *(f"Elo by the {by}, mean 0 [95 %]" for by in found)]
    return [head, *([name, *(_written(rows.get(name)) for rows in found.values())] for name in names)]


def _written(row: Mapping[str, Any] | None) -> str:
    return f"{row['elo']:+.0f} [{row['ci95'][0]:+.0f}, {row['ci95'][1]:+.0f}]" if row else "-"
