"""Findings and rows for a terminal: colors where one asks for them, brackets always, so that nothing needs color."""

from collections.abc import Mapping
from typing import Any

from report.inspected import Inspection, ShownRow, histogram, lengths_of, summary
from report.inspection import Finding
from settings.terminal import clean

RESET = "\x1b[0m"
COLORS = {"learned": "\x1b[32m", "cut": "\x1b[9;31m", "high": "\x1b[1;31m", "middle": "\x1b[33m", "low": "\x1b[36m"}
BAR = 40  # characters of the longest bar
ROOM = 1200  # characters of a row that are shown


def colored(stream: Any, environment: Mapping[str, str]) -> bool:
    """Tell whether colors are wanted: on a terminal, unless NO_COLOR says otherwise (https://no-color.org)."""
    return bool(stream.isatty()) and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def painted(text: str, kind: str, color: bool) -> str:
    """Color a text, line by line: a pager then keeps its colors."""
    if not color or kind not in COLORS:
        return text
    return "\n".join(f"{COLORS[kind]}{line}{RESET}" if line else line for line in text.split("\n"))


def finding_lines(number: int, finding: Finding, color: bool) -> list[str]:
    """Write a finding: what, how many, what to do, where."""
    mark = painted(f"[{finding.severity}]", finding.severity, color)
    lines = [f"{number:3} {mark} {finding.sentence}", f"      {finding.advice}"]
    for where, words in finding.examples:
        lines.append(f"      - {clean(where)}{f': {clean(words)}' if words else ''}".replace("\n", " "))
    return lines


def row_lines(row: ShownRow, color: bool) -> list[str]:
    """Write a row: the supervised part in [[ ]], what was cut in {{ }}."""
    note = f"; {row.note}" if row.note else ""
    head = f"-- {clean(row.where)}, {row.slot}: {row.num_tokens} tokens, {row.num_learned} supervised{note}"
    marks = {"learned": ("[[", "]]"), "cut": ("{{", "}}"), "prompt": ("", "")}
    body = ""
    for piece in row.pieces:
        text = clean(piece.text)
        if len(text) > ROOM:
            text = f"{text[: ROOM // 2]} ... {text[-ROOM // 2 :]}"
        left, right = marks[piece.kind]
        body += painted(f"{left}{text}{right}", piece.kind, color)
    return [head, body]


def histogram_lines(lengths: list[int], max_length: int) -> list[str]:
    """Draw the lengths before the cut as bars, with a line where model.max_length cuts."""
    bins = histogram(lengths, max_length)
    most = max((count for _, _, count in bins), default=0)
    lines = []
    for low, high, count in bins:
        if low == max_length + 1:
            lines.append(f"  {'-' * 14} model.max_length={max_length}: what lies below is cut")
        bar = "█" * max(round(BAR * count / max(1, most)), int(count > 0))
        lines.append(f"  {low:6}-{high:<6} {bar} {count}".rstrip())
    while lines and lines[-1].endswith(" 0"):  # empty bins up to max_length say nothing in a terminal
        lines.pop()
    return lines


def in_terminal(seen: Inspection, color: bool) -> str:
    """Return the whole text."""
    lines: list[str] = []
    for name, split in seen.splits.items():
        if not split.rows:
            continue
        told = summary(split)
        lines += [
            f"{name}: {told['rows']} rows, {told['sequences']} responses, {told['tokens']} tokens, "
            f"{told['supervised_tokens']} of them supervised",
            f"  {told['prompts_shortened']} prompts shortened, {told['responses_cut']} responses cut, "
            f"{told['dropped']} rows dropped",
            f"  tokens of prompt and response before the cut: median {told['median_tokens']}, longest "
            f"{told['longest_tokens']}; model.max_length={seen.max_length}",
            *histogram_lines(lengths_of(split), seen.max_length),
        ]
        if split.bias:
            b = split.bias
            lines.append(
                f"  chosen over rejected: {b.mean_difference:+.1f} tokens [{b.mean_ci95[0]:+.1f}, "
                f"{b.mean_ci95[1]:+.1f}], longer in {100 * b.longer / b.pairs:.1f} %, AUC of length {b.auc:.3f} "
                f"[{b.auc_ci95[0]:.3f}, {b.auc_ci95[1]:.3f}]"
            )
    lines.append("\nfindings, the worst first (weight of the severity x share):" if seen.findings else "\nno findings")
    for number, finding in enumerate(seen.findings, 1):
        lines += finding_lines(number, finding, color)
    for name, split in seen.splits.items():
        lines += [f"\n{name} rows: [[supervised]], {{{{cut}}}}, the rest is read only"] if split.shown else []
        for row in split.shown:
            lines += row_lines(row, color)
    return "\n".join(lines)
