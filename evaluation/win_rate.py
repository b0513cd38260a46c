"""Win rates against an opponent on the same prompts: by scores of a verifier or reward model, or a judge's verdicts.

A judge sees each pair of responses in both orders. Where the two verdicts do not agree it is a tie.
Beside the plain win rate stands one at equal length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.intervals import paired_difference, score_interval
from rewards.judge import Judge

BOOTSTRAPS = 500
RIDGE = 1e-3  # keeps the regression finite where one side always wins


def points_of(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return 1, 0.5 or 0 for each prompt: whose score is higher."""
    return [(a > b) + 0.5 * (a == b) for a, b in zip(own, other, strict=True)]


def judged_points(
    judge: Judge, prompts: Sequence[str], own: Sequence[str], other: Sequence[str]
) -> tuple[list[float | None], int]:
    """Return the points of `own` for each prompt (None where a verdict is missing), and how often the orders disagreed.

    Equal responses are a tie and are not asked about.
    """
    pairs = list(zip(prompts, own, other, strict=True))
    forward = [judge.pair_question(p, a, b) for p, a, b in pairs]
    backward = [judge.pair_question(p, b, a) for p, a, b in pairs]
    differ = [i for i, (_, a, b) in enumerate(pairs) if a != b]
    answers = judge.asked([q for i in differ for q in (forward[i], backward[i])])
    points: list[float | None] = [0.5] * len(pairs)
    disagreements = 0
    for i, first, second in zip(differ, answers[::2], answers[1::2], strict=True):
        if first is None or second is None:
            points[i] = None
        elif first == 1 - second:
            points[i] = first
        else:
            disagreements += 1
    return points, disagreements


def fitted(points: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Fit P(win) = s(theta + phi x) by Newton's method and return (theta, phi).

    points [P] in [0, 1]; x, the lengths' terms [P], is standardized.
    """
    design = np.stack([np.ones_like(lengths), lengths], axis=1)
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (points - p) - RIDGE * weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights = weights + np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-9:
            break
    return weights


def length_controlled(
    points: Sequence[float], own: Sequence[int], other: Sequence[int], seed: int = 0
) -> dict[str, Any]:
    """Return the win rate at equal length, with a bootstrap interval over prompts.

    It is s(theta) of a logistic regression of the points on tanh(length difference / its deviation). That is AlpacaEval
    2's regression (2404.04475) without its term for each instruction's difficulty, which needs many models. So the
    number is not comparable with AlpacaEval's.
    """
    difference = np.asarray(own, dtype=float) - np.asarray(other, dtype=float)
    x = np.tanh(difference / max(float(difference.std()), 1e-9))
    y = np.asarray(points, dtype=float)
    rate = lambda index: float(1 / (1 + np.exp(-fitted(y[index], x[index])[0])))  # noqa: E731
    rng = np.random.default_rng(seed)
    drawn = [rate(rng.integers(len(y), size=len(y))) for _ in range(BOOTSTRAPS)]
    return {
        "length_controlled_win_rate": rate(np.arange(len(y))),
        "length_controlled_ci95": [float(np.quantile(drawn, q)) for q in (0.025, 0.975)],
    }


def win_rate(
    points: Sequence[float | None], own: Sequence[int], other: Sequence[int], opponent: str, by: str
) -> dict[str, Any]:
    """Return wins, ties, losses and both win rates, with intervals.

    Prompts without a verdict are left out and counted.
    """
    kept = [(p, a, b) for p, a, b in zip(points, own, other, strict=True) if p is not None]
    if not kept:
        raise ValueError(
            f"no verdict against {opponent} could be read: take a better judge or template (judge.on_error=fail shows "
            "a response)"
        )
    found = [p for p, _, _ in kept]
    return {
        "opponent": opponent,
        "by": by,
        "wins": found.count(1.0),
        "ties": found.count(0.5),
        "losses": found.count(0.0),
        "skipped": len(points) - len(kept),
        "win_rate": sum(found) / len(found),
        "win_rate_ci95": list(score_interval(found)),
        **length_controlled(found, [a for _, a, _ in kept], [b for _, _, b in kept]),
    }


def against(
    scores: Sequence[float], opponent_scores: Sequence[float], own: Sequence[int], other: Sequence[int], opponent: str
) -> dict[str, Any]:
    """Return the win rate by a verifier's scores, and the difference in score."""
    difference, interval = paired_difference(scores, opponent_scores)
    rate = win_rate(points_of(scores, opponent_scores), own, other, opponent, "verifier")
    return {**rate, "score_difference": difference, "score_difference_ci95": list(interval)}


def alpaca_eval_rows(prompts: Sequence[str], responses: Sequence[str], generator: str) -> list[dict[str, str]]:
    """Return model outputs in the format that the alpaca_eval tool reads (--model_outputs, --reference_outputs)."""
    return [
        {"instruction": prompt, "output": response, "generator": generator, "dataset": "held_out"}
        for prompt, response in zip(prompts, responses, strict=True)
    ]
