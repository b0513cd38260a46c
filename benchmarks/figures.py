"""Figures of a run and the check against committed ones: pure functions, the standard library alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A number with its spread over the turns. worse: which way it gets worse, "higher" or "lower"; "": not checked.
    aim: what the project wants, or None.
    """

    value: float
    low: float
    high: float
    unit: str = ""
    worse: str = ""
    aim: float | None = None


# What a figure that got worse is called, by the end of its name.
WORDS = {
    "time_ratio": "slower",
    "processor_ratio": "slower",
    "floor_ratio": "slower",
    "processor_floor_ratio": "slower",
    "speed_of_forward": "slower",
    "processor_of_forward": "slower",
    "memory_ratio": "larger",
    "bytes_to_entropy": "larger",
    "bytes_per_token": "larger",
    "peak_to_weights": "larger",
    "useful_share": "more padding",
    "time_slope": "grows faster",
    "memory_slope": "grows faster",
}
# What says the same of a CPU by processor seconds, which others on the machine hardly move: where both are there, the
# clock's is not checked.
BY_PROCESSOR = {
    "time_ratio": "processor_ratio",
    "floor_ratio": "processor_floor_ratio",
    "speed_of_forward": "processor_of_forward",
}
# How far a figure may be off, relative, until it counts: measured ratios of works taking turns on a busy machine moved
# by a tenth; what is counted and not timed hardly moves.
TOLERANCES = {
    "slower": 0.20,
    "larger": 0.10,
    "more padding": 0.03,
    "grows faster": 0.15,
}


def figure(values: Sequence[float], unit: str = "", worse: str = "", aim: float | None = None) -> Figure:
    """Return the median of the turns' values and their range."""
    return Figure(statistics.median(values), min(values), max(values), unit, worse, aim)


def ratios(ours: Sequence[float], theirs: Sequence[float], aim: float | None = None) -> Figure:
    """Return ours / theirs turn by turn: both of a turn met the same machine."""
    return figure([a / b for a, b in zip(ours, theirs, strict=True)], "", "higher", aim)


def word_of(name: str) -> str:
    """Return what it is called when the figure gets worse."""
    return WORDS[name.rsplit(".", 1)[-1]]


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit cost = c size^s by least squares in logarithms; return s (1: in proportion)."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def entropy_bytes(counts: Sequence[int]) -> float:
    """Return the bytes a symbol that an ideal code of order zero needs for symbols of these frequencies."""
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n) / 8


# ---- the check


def committed(figures: Mapping[str, Figure], slack: float = 1.0) -> dict[str, dict[str, float | str]]:
    """Return what is committed of a run: what can get worse, each with its tolerance; `slack` widens that of times."""
    kept: dict[str, dict[str, float | str]] = {}
    for name, one in figures.items():
        if one.worse:
            word = word_of(name)
            tolerance = TOLERANCES[word] * (slack if word == "slower" else 1.0)
            kept[name] = {"value": round(one.value, 4), "tolerance": tolerance, "worse": one.worse}
    return kept


def checkable(figures: Mapping[str, Figure], device: str) -> dict[str, Figure]:
    """Return the figures to check: on a CPU without those by the clock that another has by processor seconds."""

    def twin(name: str) -> str:
        work, _, kind = name.rpartition(".")
        return f"{work}.{BY_PROCESSOR.get(kind, '')}"

    return {name: one for name, one in figures.items() if device != "cpu" or twin(name) not in figures}


def complaints(figures: Mapping[str, Figure], baseline: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name every figure that is worse than the committed one by more than its tolerance, the worst first."""
    found = []
    for name, one in figures.items():
        if name not in baseline:
            continue
        old, tolerance = float(baseline[name]["value"]), float(baseline[name]["tolerance"])
        higher = baseline[name]["worse"] == "higher"
        loss = one.value / old - 1 if higher else old / max(one.value, 1e-12) - 1  # a half is as bad as the double
        if loss > tolerance:
            told = f"{one.value:.3g}, committed {old:.3g}: {loss:.0%} worse, tolerated {tolerance:.0%}"
            found.append((loss, f"{word_of(name)}: {name} is {told}"))
    return [line for _, line in sorted(found, reverse=True)]


def unlike(conditions: Mapping[str, Any], committed_under: Mapping[str, Any]) -> list[str]:
    """Name the conditions that decide figures and differ: then a comparison would say nothing."""
    keys = sorted(committed_under.keys() | conditions.keys())
    return [
        f"{key} is {conditions.get(key)!r}, committed with {committed_under.get(key)!r}"
        for key in keys
        if conditions.get(key) != committed_under.get(key)
    ]


# ---- the table


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table whose first row is the head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def shown(one: Figure) -> str:
    """Write a figure with its range, and the aim where there is one."""
    digits = 0 if abs(one.value) >= 100 else 3 if abs(one.value) < 10 else 1
    said = f"{one.value:.{digits}f}"
    if one.high > one.low:
        said += f" ({one.low:.{digits}f} to {one.high:.{digits}f})"
    return said + (f" {one.unit}" if one.unit else "")


def met(one: Figure) -> str:
    """Say whether the aim is met."""
    if one.aim is None:
        return ""
    good = one.value <= one.aim if one.worse == "higher" else one.value >= one.aim
    sign = "≤" if one.worse == "higher" else "≥"
    return f"{sign} {one.aim:g}: {'met' if good else 'not met'}"
