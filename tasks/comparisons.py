"""All pairs of models on the same prompts: differences, intervals, and Holm's correction over the pairs.

Many pairs make one of them differ by luck alone. So a pair counts as separate only where its p-value, corrected for
all pairs, is below LEVEL; the 95 % intervals beside it are those of each pair alone.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from intervals import holm, paired_difference, paired_p_values

LEVEL = 0.05  # chance that any pair of one table is called separate though it is not


def compare_all(scores: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Compare every pair of models, {model: [score of each prompt]}; the better one of a pair stands first.

    Models without scores are left out. ValueError if two models were scored on other numbers of prompts.
    """
    judged = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items() if len(values)}
    if len({len(values) for values in judged.values()}) > 1:
        counts = ", ".join(f"{name}: {len(values)}" for name, values in judged.items())
        raise ValueError(f"other numbers of scores ({counts}): a paired comparison needs the same prompts in all models")
    pairs = [(a, b) if judged[a].mean() >= judged[b].mean() else (b, a) for a, b in combinations(judged, 2)]
    if not pairs:
        return []
    raw = paired_p_values(np.stack([judged[a] - judged[b] for a, b in pairs]))
    rows = []
    for (first, second), p, p_holm in zip(pairs, raw, holm(raw), strict=True):
        difference, interval = paired_difference(judged[first].tolist(), judged[second].tolist())
        rows.append({
            "first": first, "second": second, "difference": difference, "ci95": list(interval),
            "n": len(judged[first]), "p": p, "p_holm": p_holm, "separate": p_holm < LEVEL,
        })  # fmt: skip
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
