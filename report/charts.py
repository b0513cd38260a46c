"""Charts of the report as inline SVG: the small line charts of a metrics.jsonl, and a dot-and-whisker plot of scores.

Names arrive escaped; everything else drawn here is a number. Colors are classes: the style sheet knows light and dark.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.metrics import is_number

WIDTH, HEIGHT = 300, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 240  # of a line: more cannot be seen at this width
MIN_TICKS_GAP = 1e-12
NO_PANELS = ("step", "examples", "epoch")


class Series(NamedTuple):
    """A line: training or held out (`split`), which seed, and its (step, value) points in order."""

    split: str
    seed: str
    points: list[tuple[float, float]]


# ---- what a metrics.jsonl holds


class Curves(NamedTuple):
    """One metrics.jsonl: (step, value) points by metric name, and what could not be read."""

    points: dict[str, list[tuple[float, float]]]
    problem: str


def read_curves(path: Path) -> Curves:
    """Read a metrics.jsonl; rows that cannot be read are counted and said, not hidden."""
    if not path.is_file():
        return Curves({}, f"no file {path.name}")
    points: dict[str, list[tuple[float, float]]] = {}
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, KeyError, TypeError):
            torn += bool(line.strip())
            continue
        for name, value in row.items():
            if name not in NO_PANELS and is_number(value):
                points.setdefault(name, []).append((step, float(value)))
    return Curves(points, f"{torn} unreadable row(s) left out" if torn else "")


def panel_of(metric: str) -> tuple[str, str]:
    """Split a metric's name into (panel, series).

    loss/eval -> (loss, eval); rewards_train/accuracies -> (rewards/accuracies, train).
    """
    head, slash, tail = metric.partition("/")
    if tail in ("train", "eval"):
        return head, tail
    for split in ("train", "eval"):
        if head.endswith(f"_{split}"):
            return head.removesuffix(f"_{split}") + slash + tail, split
    return metric, "train"


# ---- drawing


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers inside [low, high], about as many as wanted."""
    span = high - low
    if span <= MIN_TICKS_GAP:
        return [low]
    raw = span / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """Write an axis number in a few characters."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.1e}".replace("e-0", "e-") if size < 1e-3 else f"{value:.4g}"


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of values with a little room; a constant gets room of its own size."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(low) * 0.1 or 1.0
    return low - room, high + room


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most MAX_POINTS of a line, the last one always."""
    stride = math.ceil(len(points) / MAX_POINTS)
    kept = points[::stride]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def line_chart(name: str, series: Sequence[Series]) -> str:
    """Draw one metric over steps: training solid, held out dashed with dots, a single point a dot; a line a seed."""
    values = [value for line in series for _, value in line.points]
    steps = [step for line in series for step, _ in line.points]
    low, high = padded(values)
    first, last = min(0.0, *steps), max(max(steps), 1.0)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for tick in ticks(first, last):
        anchor = "end" if x(tick) > WIDTH - 22 else "middle"
        at = WIDTH - RIGHT if anchor == "end" else x(tick)
        parts.append(
            f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{HEIGHT - BOTTOM}" '
            f'y2="{HEIGHT - BOTTOM + 4}"/>'
        )
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{short(tick)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    hover = []
    for line in sorted(series, key=lambda s: s.split == "eval"):
        points = thinned(line.points)
        if len(points) > 1:
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            parts.append(f'<polyline class="line {line.split}" points="{path}"/>')
        # A line of one point is no line: without its dot nothing would be seen.
        dotted = points[-12:] if line.split == "eval" or len(points) == 1 else []
        parts += [f'<circle class="point {line.split}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6"/>' for s, v in dotted]
        hover.append(
            [line.split, line.seed, [[round(x(s), 1), round(y(v), 1), s, float(f"{v:.5g}")] for s, v in points]]
        )
    data = json.dumps(hover, separators=(",", ":")).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    ends = last_values(series)
    return (
        f'<figure class="panel"><figcaption><b>{name}</b><span>{ends}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} over optimizer steps; last: {ends}" '
        f'data-lines="{data}">'
        f"{''.join(parts)}</svg></figure>"
    )


def last_values(series: Sequence[Series]) -> str:
    """Write where the lines end; the mean over seeds where there are several."""
    written = []
    for split, word in (("train", "train"), ("eval", "held out")):
        ends = [line.points[-1][1] for line in series if line.split == split]
        if ends:
            written.append(f"{word} {sum(ends) / len(ends):.4g}")
    return " · ".join(written)


class Plotted(NamedTuple):
    """A row of the interval plot: intervals over prompts and over seeds, the greedy score, a score for each seed."""

    name: str
    score: float
    over_prompts: tuple[float, float] | None
    over_seeds: tuple[float, float] | None
    greedy: Any
    seeds: list[Any]


def interval_chart(rows: Sequence[Plotted]) -> str:
    """Draw scores: a dot, its whisker over prompts, a thin line over seeds, a tick a seed, a diamond for greedy."""
    if not rows:
        return ""
    numbers = [0.0]
    for row in rows:
        numbers += [row.score, *(row.over_prompts or ()), *(v for v in (row.greedy, *row.seeds) if is_number(v))]
    # Shares are read against a whole; anything else gets its own range. Intervals over seeds may run past it.
    low, high = min(numbers), max(numbers)
    high = 1.0 if 0.4 < high <= 1.0 else high + 0.05 * ((high - low) or 1.0)
    height, left, right, width = 26, min(220, 24 + 7 * max(len(row.name) for row in rows)), 168, 860
    total = height * len(rows) + 30

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (width - left - right)

    parts = []
    for tick in ticks(low, high, 5):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{total - 24}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{total - 8}" text-anchor="middle">{short(tick)}</text>')
    for i, row in enumerate(rows):
        middle = 4 + height * i + height / 2
        parts.append(f'<text class="name" x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end">{row.name}</text>')
        if row.over_seeds:
            parts.append(f'<path class="thin" d="M{x(row.over_seeds[0]):.1f} {middle}H{x(row.over_seeds[1]):.1f}"/>')
        for value in row.seeds if len(row.seeds) > 1 else ():
            if is_number(value):
                parts.append(
                    f'<line class="seedtick" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{middle - 7}" '
                    f'y2="{middle + 7}"/>'
                )
        if is_number(row.greedy):
            parts.append(f'<path class="greedy" d="M{x(row.greedy):.1f} {middle - 4.5}l4.5 4.5l-4.5 4.5l-4.5-4.5z"/>')
        shown = f"{row.score:.3f}"
        if row.over_prompts:
            a, b = x(row.over_prompts[0]), x(row.over_prompts[1])
            parts.append(
                f'<path class="whisker" d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {middle - 4}v8M{b:.1f} {middle - 4}v8"/>'
            )
            shown += f" [{row.over_prompts[0]:.3f}, {row.over_prompts[1]:.3f}]"
        parts.append(f'<circle class="dot" cx="{x(row.score):.1f}" cy="{middle}" r="4.2"/>')
        parts.append(f'<text class="value" x="{width - right + 16}" y="{middle + 4:.1f}">{shown}</text>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Interval plot">'
        f'<svg class="intervals" viewBox="0 0 {width} {total}" role="img" aria-label="Scores with 95 % intervals; the '
        'numbers stand in the table">'
        f"{''.join(parts)}</svg></div>"
    )
