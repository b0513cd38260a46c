"""The verdict of an evaluation in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any


def verdict(models: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Say of the model with the highest score what the comparisons of all pairs carry; empty without comparisons.

    A model is called above another one only where Holm's correction calls them separate and the pair's interval leaves
    out 0.
    """
    scored = [name for name in models if models[name].get("score") is not None]
    if len(scored) < 2 or not comparisons:
        return ""
    top = max(scored, key=lambda name: models[name]["score"])
    rows = {row["second"] if row["first"] == top else row["first"]: row for row in comparisons if _has(row, top)}
    above = [name for name, row in rows.items() if row["first"] == top and row["separate"] and row["ci95"][0] > 0]
    level = [name for name in rows if name not in above]
    parts = []
    if above:
        parts.append(f"{top} is above " + ", ".join(f"{name} by {_difference(rows[name])}" for name in above))
    if level:
        words = f"{' and '.join(level)} cannot be told apart from " + ("it" if above else top)
        parts.append(words + f" ({', '.join(_difference(rows[name]) for name in level)})")
    return "; ".join(parts) + "."


def said_of(results: Mapping[str, Any], reference: str | None) -> str:
    """Return what opens the results: the verdict at the main temperature, then at the entropy of the reference."""
    matched = {name: row["matched"] for name, row in results["models"].items() if "matched" in row}
    found = [
        (verdict(results["models"], results["comparisons"]), ""),
        (verdict(matched, results["matched_comparisons"]), f"At the token entropy of {reference}: "),
    ]
    return " ".join(opening + sentence for sentence, opening in found if sentence)


def _has(row: Mapping[str, Any], name: str) -> bool:
    return name in (row["first"], row["second"])


def _difference(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:.3f} [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]"
