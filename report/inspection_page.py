"""The page of task=inspect: findings, lengths, rows colored by what is learned. Everything of the data is escaped."""

from report.charts import BOTTOM, LEFT, RIGHT, TOP, short, ticks
from report.inspected import Inspection, ShownRow, Split, histogram, lengths_of, summary
from report.inspection import WEIGHTS, Finding
from report.markup import section, text
from report.page import page

WIDTH, HEIGHT = 640, 200
ROOM = 4000  # characters of a stretch that are shown


def finding_block(finding: Finding) -> str:
    """Write a finding and where it was seen."""
    rows = "".join(
        f"<li><b>{text(where)}</b>{f': {text(words)}' if words else ''}</li>" for where, words in finding.examples
    )
    return (
        f'<div class="finding {finding.severity}"><p><span class="severity">{finding.severity}</span> '
        f"<b>{text(finding.split)}: {text(finding.name)}</b>: {finding.number} of {finding.total} {text(finding.unit)} "
        f"({100 * finding.share:.1f} %)</p>"
        f'<p class="note">{text(finding.advice)}</p><ul class="where">{rows}</ul></div>'
    )


def findings_section(findings: list[Finding]) -> str:
    """Write all findings, the worst first."""
    if not findings:
        return section("findings", "Findings", '<p class="empty">Nothing was found.</p>')
    weights = ", ".join(f"{name} {weight:g}" for name, weight in WEIGHTS.items())
    rank = f'<p class="note">The worst first: weight of the severity ({weights}) times share.</p>'
    return section("findings", "Findings", rank + "".join(map(finding_block, findings)))


def histogram_chart(lengths: list[int], max_length: int) -> str:
    """Draw how long the sequences are before the cut, with a line at max_length."""
    bins = histogram(lengths, max_length)
    most, top = max(count for _, _, count in bins), max(bins[-1][1], max_length)

    def x(value: float) -> float:
        return LEFT + value / top * (WIDTH - LEFT - RIGHT)

    def y(count: float) -> float:
        return TOP + (most - count) / most * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(0, most):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        at = y(tick) + 3.5
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(0, top):
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{short(tick)}</text>')
    for low, high, count in bins:
        size = f'width="{max(1.0, x(high) - x(low - 1) - 1):.1f}" height="{y(0) - y(count):.1f}"'
        kind = "bar past" if low > max_length else "bar"
        title = f"<title>{low} to {high} tokens: {count}</title>"
        parts.append(f'<rect class="{kind}" x="{x(low - 1):.1f}" y="{y(count):.1f}" {size}>{title}</rect>')
    line = x(max_length)
    parts.append(f'<line class="limit" x1="{line:.1f}" x2="{line:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    label = f"max_length {max_length}"
    parts.append(f'<text class="tick" x="{line - 4:.1f}" y="{TOP + 10}" text-anchor="end">{label}</text>')
    name = f"tokens of prompt and response before the cut; {label}"
    return f'<svg class="lengths" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def split_block(name: str, split: Split, max_length: int) -> str:
    """Write the numbers and the lengths of a split."""
    told = summary(split)
    rows = [
        ("rows (dropped)", f"{told['rows']} ({told['dropped']})"),
        ("responses (cut)", f"{told['sequences']} ({told['responses_cut']})"),
        ("prompts shortened", str(told["prompts_shortened"])),
        ("tokens (supervised)", f"{told['tokens']} ({told['supervised_tokens']})"),
        ("median, longest", f"{told['median_tokens']}, {told['longest_tokens']}"),
    ]
    if split.bias:
        b = split.bias
        mean = f"{b.mean_difference:+.1f} [{b.mean_ci95[0]:+.1f}, {b.mean_ci95[1]:+.1f}]"
        auc = f"{b.auc:.3f} [{b.auc_ci95[0]:.3f}, {b.auc_ci95[1]:.3f}]"
        rows.append(("chosen − rejected, tokens [95 %]", mean))
        rows.append(("pairs whose chosen response is longer", f"{100 * b.longer / b.pairs:.1f} %"))
        rows.append(("AUC of length [95 %]", auc))
    table = "".join(f'<tr><th scope="row">{label}</th><td>{value}</td></tr>' for label, value in rows)
    lengths = lengths_of(split)
    chart = histogram_chart(lengths, max_length) if lengths else ""
    return f'<div class="stage"><h3>{name}</h3><table class="differences">{table}</table>{chart}</div>'


def row_block(row: ShownRow) -> str:
    """Write a sequence, its stretches marked."""
    pieces = "".join(f'<span class="seen {piece.kind}">{text(shortened(piece.text))}</span>' for piece in row.pieces)
    note = f"; {text(row.note)}" if row.note else ""
    head = f"{text(row.where)}, {row.slot}: {row.num_tokens} tokens, {row.num_learned} supervised{note}"
    return f'<div class="stage"><p class="note">{head}</p><p class="said">{pieces}</p></div>'


def shortened(words: str) -> str:
    """Leave the middle of a very long stretch out, and say so."""
    if len(words) <= ROOM:
        return words
    return f"{words[: ROOM // 2]}\n[... {len(words) - ROOM} characters not shown ...]\n{words[-ROOM // 2 :]}"


def inspection_page(title: str, seen: Inspection) -> str:
    """Return inspect.html: one file that asks for nothing outside itself."""
    splits = {name: split for name, split in seen.splits.items() if split.rows}
    numbers = "".join(split_block(name, split, seen.max_length) for name, split in splits.items())
    legend = (
        '<p class="legend"><span><span class="seen learned">learned</span> supervised</span>'
        '<span><span class="seen prompt">read</span> prompt, template</span>'
        '<span><span class="seen cut">cut</span> behind model.max_length: training does not see it</span></p>'
    )
    rows = "".join(row_block(row) for split in splits.values() for row in split.shown)
    body = findings_section(seen.findings) + section("lengths", "Lengths", numbers)
    return page(title, body + section("rows", "Rows as training sees them", legend + rows))
