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
        (judged_verdict(results["models"]), ""),
    ]
    return " ".join(opening + sentence for sentence, opening in found if sentence)


def pooled_verdict(results: Mapping[str, Any]) -> str:
    """Say of the compared pairs which difference leaves out 0 over seeds; empty with one seed, or nothing compared."""
    seeds = len(next(iter(results["models"].values()))["seeds"])
    found = [
        (_over_seeds(results["comparisons"]), f"Over {seeds} seeds, at temperature {results['temperature']:g}: "),
        (_over_seeds(results["matched_comparisons"]), "At matched entropy: "),
    ]
    return " ".join(f"{opening}{said}." for said, opening in found if said)


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row for row in rows if row["ci95_over_seeds"]]
    apart = [row for row in known if row["ci95_over_seeds"][0] > 0 or row["ci95_over_seeds"][1] < 0]
    told = [
        f"{row['first']} is {'above' if row['difference'] > 0 else 'below'} {row['second']}, "
        f"{_difference(row, 'ci95_over_seeds')}"
        for row in apart
    ]
    told += [
        f"{row['first']} and {row['second']} cannot be told apart ({_difference(row, 'ci95_over_seeds')})"
        for row in known
        if row not in apart
    ]
    return "; ".join(told)


def judged_verdict(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Say of which models a judge's win rate over the opponent leaves out one half, at equal length where that was
    taken out; empty where nobody judged.
    """
    judged = {name: row["judged"] for name, row in models.items() if row.get("judged")}
    rates = {name: _win_rate(row) for name, row in judged.items()}
    if not rates:
        return ""
    first = next(iter(judged.values()))
    at = " at equal length" if all(row.get("length_controlled_ci95") for row in judged.values()) else ""
    sides = {
        "wins over": [name for name, (_, (low, _)) in rates.items() if low > 0.5],
        "loses to": [name for name, (_, (_, high)) in rates.items() if high < 0.5],
        "cannot be told apart from": [name for name, (_, (low, high)) in rates.items() if low <= 0.5 <= high],
    }
    said = {name: f"{name} ({rate:.3f} [{low:.3f}, {high:.3f}])" for name, (rate, (low, high)) in rates.items()}
    told = [
        f"{', '.join(said[name] for name in names)} {words} {first['opponent']}"
        for words, names in sides.items()
        if names
    ]
    return f"By the {first['by']}{at}: {'; '.join(told)}."


def _win_rate(row: Mapping[str, Any]) -> tuple[float, Sequence[float]]:
    """Return a win rate with its interval, the length-controlled one where there is one."""
    if row.get("length_controlled_ci95"):
        return row["length_controlled_win_rate"], row["length_controlled_ci95"]
    return row["win_rate"], row["win_rate_ci95"]


def _has(row: Mapping[str, Any], name: str) -> bool:
    return name in (row["first"], row["second"])


def _difference(row: Mapping[str, Any], interval: str = "ci95") -> str:
    sign = "+" if interval != "ci95" else ""
    return f"{row['difference']:{sign}.3f} [{row[interval][0]:{sign}.3f}, {row[interval][1]:{sign}.3f}]"
