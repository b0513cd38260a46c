"""Further tables of report.html for one evaluation: pairs, responses, benchmarks, latency. Everything passes `text`."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.comparisons import interval_of
from report.page import number, section, text, written_interval

Row = Sequence[str]  # cells as HTML; the first one heads the row


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


def with_interval(entry: Mapping[str, Any], key: str) -> str:
    """Write a metric with its 95 % interval, KEY_ci95, where it has one."""
    interval = f" {written_interval(entry, f'{key}_ci95')}" if interval_of(entry, f"{key}_ci95") else ""
    return number(entry.get(key)) + interval


def pairs_section(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Write how the models rank the held-out pairs; empty where none was asked to."""
    rows = []
    for name, entry in models.items():
        for kind, words in (("reward", "log-ratio to the reference"), ("logprob", "log-probability")):
            if f"{kind}_accuracy" in entry:
                cells = [
                    with_interval(entry, f"{kind}_accuracy"),
                    number(entry.get(f"{kind}_margin")),
                    text(entry["num_pairs"]),
                ]
                rows.append([text(name), words, *cells])
    columns = ["model", "ranked by", "accuracy [95 %]", "mean margin, nats", "pairs"]
    return section("pairs", "Held-out pairs", html_table("Held-out pairs", columns, rows)) if rows else ""


def text_section(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Write lengths, refusals and repetition, sampled and greedy; empty without responses."""
    rows = []
    for name, entry in models.items():
        passes = {f"temperature {entry.get('temperature', 0):g}": entry}
        if entry.get("temperature") != 0:
            passes["greedy"] = entry.get("greedy") or {}
        for how, one in passes.items():
            if "refusal_rate" not in one:
                continue
            lengths = [number(one[f"{key}_response_tokens"], 1) for key in ("mean", "p50", "p95")]
            rates = [with_interval(one, key) for key in ("eot_rate", "refusal_rate", "repeated_4grams", "loop_rate")]
            rows.append([text(name), how, *lengths, *rates])
    columns = [
        "model",
        "decoding",
        "tokens, mean",
        "p50",
        "p95",
        "ended",
        "refused [95 %]",
        "repeated 4-grams",
        "loops [95 %]",
    ]
    note = (
        '<p class="note">Refused: one of evaluation.refusal_phrases stands in the first 150 characters. Repeated '
        "4-grams: share of a "
        "response’s 4-grams of words that stood in it before. Loops: responses that end by saying the same thing over "
        "and over.</p>"
    )
    return section("text", "Text statistics", html_table("Text statistics", columns, rows) + note) if rows else ""


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
