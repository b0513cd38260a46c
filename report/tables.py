"""Further tables of report.html for one evaluation: pairs, responses, benchmarks, latency. Everything passes `text`."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.comparisons import interval_of
from evaluation.matched import MATCHED
from evaluation.metrics import DIGITS, Metric, at, is_number, present
from report.markup import number, section, text

Row = Sequence[str]  # cells as HTML; the first one heads the row
SECTIONS = {  # the groups of evaluation/metrics.py that have a section of their own: title, and a note below
    "wins": ("Win rates", '<p class="note">Against the opponent, on the same prompts; a tie counts half.</p>'),
    "pairs": (
        "Held-out pairs",
        '<p class="note">Reward: the log-ratio to the reference. Log-prob: without a reference.</p>',
    ),
    "samples": (
        "Several responses to a prompt",
        '<p class="note">pass@k: the chance that k responses hold a right one. Right ones differ: the chance that two '
        "right responses to a prompt are not the same words; their distance is 1 − Jaccard of 2-grams. Both are means "
        "over the prompts with two right responses.</p>",
    ),
    "text": (
        "Text statistics",
        '<p class="note">Refused: one of evaluation.refusal_phrases stands in the first 150 characters. Repeated '
        "4-grams: share of a response’s 4-grams of words that stood in it before. Loops: responses that end by saying "
        "the same thing over and over.</p>",
    ),
}


DECODED = ("samples", "text")  # groups whose metrics every way of decoding has


def html_table(label: str, columns: Row, rows: Sequence[Row]) -> str:
    """Write a table with a heading row and a heading cell in every row."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="results metrics">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def cells_section(name: str, title: str, rows: Sequence[Sequence[str]], note: str) -> str:
    """Write rows of plain cells, the heads first, as a section; empty for none."""
    if not rows:
        return ""
    head, *body = [[text(cell) for cell in row] for row in rows]
    return section(name, title, html_table(title, head, body) + f'<p class="note">{text(note)}</p>')


def metric_cell(entry: Mapping[str, Any], metric: Metric, prefix: str = "") -> str:
    """Write a metric with its 95 % interval: over seeds where there are several, else over prompts."""
    digits, key = DIGITS[metric.unit], prefix + metric.key
    seeds = at(entry, f"{prefix}over_seeds") or {}
    ends = seeds.get(metric.key) or interval_of(entry, prefix + metric.interval if metric.interval else "")
    interval = f" [{number(ends[0], digits)}, {number(ends[1], digits)}]" if ends else ""
    return number(at(entry, key), digits) + interval


def metric_section(group: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """Write one group of metrics, a row for each model and way of decoding; empty where no model has any."""
    rows: list[tuple[str, str, Mapping[str, Any], str]] = []  # model, decoding, entry, what goes before the key
    for name, entry in models.items():
        rows.append((name, f"temperature {entry.get('temperature', 0):g}", entry, ""))
        if group == "text" and entry.get("temperature") != 0 and "greedy" in entry:
            rows.append((name, "greedy", entry, "greedy."))
        if group in DECODED and MATCHED in entry:
            rows.append((name, f"matched, {at(entry, 'match.temperature'):.3g}", entry, f"{MATCHED}."))
    metrics = present([at(entry, prefix[:-1]) if prefix else entry for _, _, entry, prefix in rows], group)
    if not metrics:
        return ""
    title, note = SECTIONS[group]
    decoded = group in DECODED
    cells = [
        [text(name), *([how] if decoded else []), *(metric_cell(entry, metric, prefix) for metric in metrics)]
        for name, how, entry, prefix in rows
        if any(is_number(at(entry, prefix + metric.key)) for metric in metrics)
    ]
    columns = ["model", *(["decoding"] if decoded else []), *(text(metric.label) for metric in metrics)]
    return section(group, title, html_table(title, columns, cells) + note)


def metric_sections(models: Mapping[str, Mapping[str, Any]], groups: Sequence[str] = tuple(SECTIONS)) -> str:
    """Write groups of metrics beside the scores, by default every one."""
    return "".join(metric_section(group, models) for group in groups)


def benchmarks_section(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the metrics of lm-evaluation-harness; empty without any."""
    rows = [
        [text(name), text(task), text(metric), number(one["value"]), number(one["stderr"]), text(found["n"])]
        for name, entry in models.items()
        for task, found in (entry.get("lm_eval") or {}).items()
        for metric, one in found["metrics"].items()
    ]
    columns = ["model", "task", "metric", "value", "standard error", "n"]
    return section("benchmarks", "lm-evaluation-harness", html_table("Benchmarks", columns, rows)) if rows else ""


def latency_section(timed: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write what one batch of prompts takes; empty where nothing was timed."""
    rows = []
    for name, entries in timed.items():
        for entry in entries:
            first, token, speed = entry["first_token_ms"], entry["token_ms"], entry["decode_tokens_per_second"]
            peak = entry["peak_memory_bytes"]
            rows.append(
                [
                    text(name),
                    text(entry["backend"]),
                    text(entry["batch_size"]),
                    number(first["p50"], 1),
                    number(first["p95"], 1),
                    number(token["p50"], 2),
                    number(token["p95"], 2),
                    number(speed["p50"], 1),
                    number(peak / 1e9, 2) if peak else "–",
                ]
            )
    if not rows:
        return ""
    columns = [
        "model",
        "backend",
        "batch",
        "first token, ms p50",
        "p95",
        "next token, ms p50",
        "p95",
        "decode tokens/s p50",
        "peak GB",
    ]
    one = next(entries[0] for entries in timed.values() if entries)
    note = (
        f'<p class="note">{text(one["device"])}, {text(one["dtype"])}; prompts of the data set, {one["new_tokens"]} '
        "new tokens a response, "
        f"{one['repetitions']} timed batches after {one['warmup']} that are not timed; keys and values are cached.</p>"
    )
    return section("latency", "Latency", html_table("Latency", columns, rows) + note)
