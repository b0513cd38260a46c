"""Who is best in a cell of a grid, over seeds: scores are the mean success of each seed, in the order of the seeds.

The best method of a cell is apart only where its difference to the second one, paired by seed, is above 0 with its
whole 95 % interval over seeds. Which one is second is chosen by the same scores, so of two methods that are alike one
is called apart somewhat more often than in 2.5 % of the cells.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.intervals import seed_interval

SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


def scored(per_seed: Sequence[float]) -> dict[str, Any]:
    """Return a model's mean score and its interval over seeds."""
    interval = seed_interval(per_seed, SHARE)
    return {
        "score": sum(per_seed) / len(per_seed),
        "ci95_over_seeds": list(interval) if interval else None,
        "per_seed": list(per_seed),
    }


def differing(scores: Mapping[str, Sequence[float]], first: str, second: str) -> dict[str, Any]:
    """Return the difference of two models, paired by seed, with its interval over seeds."""
    differences = [a - b for a, b in zip(scores[first], scores[second], strict=True)]
    interval = seed_interval(differences, DIFFERENCE)
    return {
        "first": first,
        "second": second,
        "difference": sum(differences) / len(differences),
        "ci95_over_seeds": list(interval) if interval else None,
    }


def best_of(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the best method against the second one, and whether it is apart; with one seed nothing is.

    ValueError for fewer than two methods.
    """
    if len(scores) < 2:
        raise ValueError(f"methods={list(scores)}: a best one needs at least two")
    first, second = sorted(scores, key=lambda name: -sum(scores[name]))[:2]
    found = differing(scores, first, second)
    interval = found["ci95_over_seeds"]
    return {**found, "apart": interval is not None and interval[0] > 0}


def cell_results(
    scores: Mapping[str, Sequence[float]], methods: Sequence[str], comparisons: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Return what a map says of a cell and a way to decode: every model's score, the best method, the differences."""
    return {
        "models": {name: scored(values) for name, values in scores.items()},
        "best": best_of({name: scores[name] for name in methods}),
        "comparisons": [differing(scores, first, second) for first, second in comparisons],
    }
