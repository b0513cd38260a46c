"""All pairs of models on the same prompts: differences, intervals, and Holm's correction over the pairs.

Many pairs make one of them differ by luck alone. So a pair counts as separate only where its p-value, corrected for
all pairs, is below LEVEL; the 95 % intervals beside it are those of each pair alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evaluation.intervals import holm, paired_difference, paired_p_values
from evaluation.metrics import at, is_number

LEVEL = 0.05  # chance that any pair of one table is called separate though it is not


def compare_all(scores: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Compare every pair of models, {model: [score of each prompt]}; the better one of a pair stands first.

    Models without scores are left out. ValueError if two models were scored on other numbers of prompts.
    """
    scored = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items() if len(values)}
    if len({len(values) for values in scored.values()}) > 1:
        counts = ", ".join(f"{name}: {len(values)}" for name, values in scored.items())
        raise ValueError(
            f"other numbers of scores ({counts}): a paired comparison needs the same prompts in all models"
        )
    pairs = [(a, b) if scored[a].mean() >= scored[b].mean() else (b, a) for a, b in combinations(scored, 2)]
    if not pairs:
        return []
    raw = paired_p_values(np.stack([scored[a] - scored[b] for a, b in pairs]))
    rows = []
    for (first, second), p, p_holm in zip(pairs, raw, holm(raw), strict=True):
        difference, interval = paired_difference(scored[first].tolist(), scored[second].tolist())
        rows.append(
            {
                "first": first,
                "second": second,
                "difference": difference,
                "ci95": list(interval),
                "n": len(scored[first]),
                "p": p,
                "p_holm": p_holm,
                "separate": p_holm < LEVEL,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the comparisons as a Markdown table; empty for none."""
    if not rows:
        return ""
    lines = ["| pair | difference [95 %] | p | p, Holm | separate |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ci95"]
        lines.append(
            f"| {row['first']} - {row['second']} | {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"| {row['p']:.4f} | {row['p_holm']:.4f} | {'yes' if row['separate'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def interval_of(entry: Mapping[str, Any], key: str = "ci95") -> tuple[float, float] | None:
    """Return (low, high) of an entry's interval, None where it has none."""
    ci95 = at(entry, key)
    if isinstance(ci95, Sequence) and len(ci95) == 2 and all(is_number(v) for v in ci95):
        return float(ci95[0]), float(ci95[1])
    return None


def all_pairs(comparisons: Sequence[Mapping[str, Any]] | None) -> bool:
    """Tell whether comparisons are those of all pairs with Holm's correction (task=evaluate), not a chosen few."""
    return bool(comparisons) and all("separate" in row for row in comparisons or ())


def best_model(
    models: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]] | None = None
) -> str | None:
    """Return the model that is better than every other one beyond chance; None where there is none.

    With comparisons of all pairs: separate from each other model after Holm's correction. Else its interval lies above
    every other's; with several seeds the interval over seeds: the one over prompts says nothing about training again.
    """
    if comparisons and all_pairs(comparisons):
        wins = Counter(row["first"] for row in comparisons if row["separate"])
        return next((name for name in models if wins[name] == len(models) - 1), None)
    key = "ci95_over_seeds" if any(interval_of(entry, "ci95_over_seeds") for entry in models.values()) else "ci95"
    intervals = {name: interval_of(entry, key) for name, entry in models.items()}
    if len(intervals) < 2 or any(interval is None for interval in intervals.values()):
        return None
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    top = max(known, key=lambda name: known[name][0])
    return top if all(known[top][0] > high for name, (_, high) in known.items() if name != top) else None
