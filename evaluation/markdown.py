"""Tables and intervals as Markdown has them."""

from collections.abc import Sequence


def span(interval: Sequence[float] | None, digits: str = ".3f") -> str:
    """Write an interval; a dash for none."""
    return f"[{interval[0]:{digits}}, {interval[1]:{digits}}]" if interval else "-"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a Markdown table, the heads first; empty for none."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]] if rows else []
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
