"""Bradley-Terry strengths of all models from scores on the same prompts, as Elo points (Bradley and Terry 1952)."""

from collections.abc import Mapping, Sequence
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
    rng, num_prompts = np.random.default_rng(seed), values.shape[1]
    draws = [strengths(wins_of(values[:, rng.integers(num_prompts, size=num_prompts)])) for _ in range(resamples)]
    low, high = np.quantile(np.stack(draws) * ELO, [0.025, 0.975], axis=0)
    points = strengths(wins_of(values)) * ELO
    return {name: {"elo": float(points[i]), "ci95": [float(low[i]), float(high[i])]} for i, name in enumerate(names)}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the strengths as a Markdown table, the strongest first; empty for none."""
    if not rows:
        return ""
    ordered = sorted(rows.items(), key=lambda item: -item[1]["elo"])
    lines = ["| model | Elo, mean 0 [95 %] |", "|---|---|"]
    lines += [f"| {name} | {r['elo']:+.0f} [{r['ci95'][0]:+.0f}, {r['ci95'][1]:+.0f}] |" for name, r in ordered]
    return "\n".join(lines) + "\n"
