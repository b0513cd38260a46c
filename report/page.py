"""One self-contained report.html of a run: scores with intervals, training curves, responses, advantages.

The file opens offline: style and script stand inside it, charts are inline SVG, and a content security policy forbids
every request. What models and data say is untrusted: it reaches the page through `text` only.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.metrics import is_number
from evaluation.standing import base_of
from report.charts import Curves, Series, line_chart, panel_of, read_curves
from report.differences import changed_share, marked
from report.markup import number, section, text
from report.questions import Part, answered, contents
from report.scores import results_section
from report.tables import html_table
from settings.artifacts import write_text

HERE = Path(__file__).resolve().parent
MAX_TOP = 12  # entries of a token's list on hover
MAX_PUSHED = 12  # tokens in the table of those pushed most
# Panels that stand open, in this order; every other metric is folded away.
MAIN_PANELS = ("loss", "rewards/accuracies", "rewards/margins", "kl/chosen", "kl/rejected", "advantage", "entropy")


# ---- training curves


def curves_section(curves: Mapping[str, Path]) -> str:
    """Draw small multiples for every stage; names like seed_2/dckd put several seeds into one panel."""
    stages: dict[str, dict[str, Curves]] = {}
    for name, path in curves.items():
        seed, slash, stage = name.partition("/") if name.startswith("seed") else ("", "", name)
        stages.setdefault(stage if slash else name, {})[seed] = read_curves(Path(path))
    if not stages:
        return section("curves", "Training", '<p class="empty">No training curves in this run.</p>')
    names = [name for seeds in stages.values() for read in seeds.values() for name in read.points]
    held_out = any(panel_of(name)[1] == "eval" for name in names)
    legend = (
        '<p class="legend"><span><i class="key line train"></i>training</span>'
        + ('<span><i class="key line eval"></i>held out</span>' if held_out else "")
        + "<span>horizontal axis: optimizer step</span></p>"
    )
    return section("curves", "Training", legend + "".join(stage_block(stage, seeds) for stage, seeds in stages.items()))


def stage_block(stage: str, seeds: Mapping[str, Curves]) -> str:
    """Draw a stage's panels: the main ones open, the rest folded."""
    panels: dict[str, list[Series]] = {}
    for seed, read in seeds.items():
        for metric, points in read.points.items():
            panel, split = panel_of(metric)
            panels.setdefault(panel, []).append(Series(split, seed, sorted(points)))
    main = [name for name in MAIN_PANELS if name in panels]
    rest = sorted(name for name in panels if name not in main)
    problems = "".join(
        f'<p class="note">{text(f"{seed}: " if seed else "")}{text(read.problem)}</p>'
        for seed, read in seeds.items()
        if read.problem
    )
    count = f" <small>{len(seeds)} seeds</small>" if len(seeds) > 1 else ""
    body = f'<div class="panels">{"".join(line_chart(text(name), panels[name]) for name in main)}</div>' if main else ""
    if rest:
        more = "".join(line_chart(text(name), panels[name]) for name in rest)
        folded = "" if main else " open"
        body += f'<details{folded}><summary>{len(rest)} more</summary><div class="panels">{more}</div></details>'
    return f'<div class="stage"><h3>{text(stage)}{count}</h3>{body}{problems}</div>'


# ---- responses


def samples_section(samples: Sequence[Mapping[str, Any]], base: str | None = None) -> str:
    """Lay responses side by side: a row per prompt, a column per model; marked is what the base does not say there."""
    if not samples:
        return section("responses", "Responses side by side", '<p class="empty">No responses in this run.</p>')
    prompts = list(dict.fromkeys(str(row["prompt"]) for row in samples))
    models = list(dict.fromkeys(str(row["model"]) for row in samples))
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in samples:
        cells.setdefault((str(row["prompt"]), str(row["model"])), []).append(row)
    base = base if base in models and len(models) > 1 else None
    of_base = {prompt: str(rows[0].get("response", "")) for (prompt, model), rows in cells.items() if model == base}
    head = "".join(f'<th scope="col">{text(model)}</th>' for model in models)
    rows = "".join(
        f'<tr><th scope="row">{text(prompt)}</th>'
        + "".join(
            f"<td>{''.join(response_cell(row, other) for row in cells.get((prompt, model), ())) or '–'}</td>"
            for model in models
            for other in [None if model == base else of_base.get(prompt)]
        )
        + "</tr>"
        for prompt in prompts
    )
    table = (
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Responses side by side"><table '
        'class="responses">'
        f'<thead><tr><th scope="col">prompt</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    legend = f"Underlined: what {base} does not say at that place." if base else ""
    note = f'<p class="note">{text(legend)}</p>' if legend else ""
    return section("responses", "Responses side by side", note + table)


def response_cell(row: Mapping[str, Any], other: str | None = None) -> str:
    """Write a response under its mark: a sign and a word, color only beside them; `other` is what it is compared to."""
    score = row.get("score")
    if not is_number(score):
        kind, mark = "none", "no score"
    elif score >= 1:
        kind, mark = "good", "✓ right"
    elif score <= 0:
        kind, mark = "bad", "✗ wrong"
    else:
        kind, mark = "part", f"◐ {number(score, 2)}"
    said = str(row.get("response", ""))
    response = (text(said) if other is None else marked(said, other)) or "<em>empty</em>"
    return f'<div class="response {kind}"><span class="mark">{mark}</span><div class="said">{response}</div></div>'


# ---- advantages


def advantages_section(advantages: Sequence[Mapping[str, Any]]) -> str:
    """Color each generated token by its own advantage; the teacher's top entries show on hover and on focus."""
    if not advantages:
        return section("advantages", "Advantages, token by token", '<p class="empty">No advantages in this run.</p>')
    sizes = sorted(abs(t["advantage"]) for row in advantages for t in row["tokens"] if is_number(t.get("advantage")))
    scale = max(sizes[int(0.95 * (len(sizes) - 1))], 1e-6) if sizes else 1.0
    legend = (
        f'<p class="legend"><span><i class="key ramp"></i><span>−{number(scale, 2)} … 0 … +{number(scale, 2)} nat '
        "(log π<sub>dpo</sub> − log π<sub>ref</sub>)</span></span>"
        '<span><span class="tok neg sample">lower</span> dotted line: the aligned teacher likes it less</span>'
        '<span><span class="tok pos sample">higher</span> solid line: more</span>'
        '<span><span class="tok none sample">outside</span> not among the teacher’s top entries</span>'
        '<label><input type="checkbox" id="values"> show the numbers</label></p>'
        '<p class="note">Point at a token, or reach a response with Tab and its tokens with the arrow keys.</p>'
    )
    blocks = "".join(advantage_block(i, row, scale) for i, row in enumerate(advantages))
    tip = '<div id="tip" role="tooltip" hidden></div>'
    return section("advantages", "Advantages, token by token", legend + blocks + tip)


def advantage_block(index: int, row: Mapping[str, Any], scale: float) -> str:
    """Write a prompt and its response as colored tokens; their lists travel as JSON beside them."""
    tokens = "<wbr>".join(token_span(token, scale) for token in row["tokens"])
    tops = [
        [
            [str(name), round(value, 3), round(probability, 4)]
            for name, value, probability in token.get("top", ())[:MAX_TOP]
            if is_number(value) and is_number(probability)
        ]
        for token in row["tokens"]
    ]
    # "<" as an escape: no text inside can close the script element.
    data = json.dumps(tops, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    whose = f'<p class="whose">{text(row["whose"])}</p>' if row.get("whose") else ""
    return (
        f'<div class="advantages"><p class="prompt">{text(row["prompt"])}</p>{whose}'
        f'<p class="tokens" role="group" aria-label="response {index + 1}">{tokens}</p>'
        f'<script type="application/json">{data}</script></div>'
    )


def token_span(token: Mapping[str, Any], scale: float) -> str:
    """Write one token: its sign as a line below it, its size as the strength of the color."""
    value = token.get("advantage")
    shown = text(str(token["text"]).replace("\n", "↵\n").replace("\t", "⇥"))
    if not is_number(value):
        return f'<span class="tok none" tabindex="0" data-a="outside the top entries">{shown}</span>'
    strength = min(1.0, abs(value) / scale)
    kind = "pos" if value >= 0 else "neg"
    shown_value = f"{value:+.2f}".replace("-", "−")
    return f'<span class="tok {kind}" tabindex="0" style="--s:{strength:.2f}" data-a="{shown_value}">{shown}</span>'


# ---- short answers


def changes_said(samples: Sequence[Mapping[str, Any]], base: str | None) -> list[str]:
    """Say how much of each model's answers the base does not say."""
    models = list(dict.fromkeys(str(row["model"]) for row in samples))
    shares = {model: changed_share(samples, model, base) for model in models if base and model != base}
    words = [f"{share:.0%} of what {model} says" for model, share in shares.items() if share is not None]
    return [f"{', '.join(words)} does not stand in {base}'s answers to the prompts below."] if words else []


def pushed_tokens(advantages: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float]]:
    """Return (token, times, sum of its advantages in nats) of all responses, the largest push first, up or down."""
    sums: dict[str, tuple[int, float]] = {}
    for token in (token for row in advantages for token in row["tokens"]):
        if is_number(token.get("advantage")):
            times, total = sums.get(str(token["text"]), (0, 0.0))
            sums[str(token["text"])] = (times + 1, total + token["advantage"])
    return sorted(((word, n, total) for word, (n, total) in sums.items()), key=lambda row: -abs(row[2]))


def pushes_said(advantages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the tokens that were pushed most, up and down."""
    found, said = pushed_tokens(advantages), []
    for sign, word in ((1, "up"), (-1, "down")):
        names = [f"{token!r} ({total:+.2f} nats in {n})" for token, n, total in found if sign * total > 0][:3]
        said += [f"Most {word}: {', '.join(names)}."] if names else []
    return said


def pushed_section(advantages: Sequence[Mapping[str, Any]]) -> str:
    """List the tokens with the largest sum of advantages over the responses shown; empty without any."""
    found = pushed_tokens(advantages)[:MAX_PUSHED]
    rows = [[text(repr(word)), str(n), f"{total / n:+.3f}", f"{total:+.2f}"] for word, n, total in found]
    columns = ["token", "times", "mean advantage, nats", "sum, nats"]
    return section("pushed", "Tokens pushed most", html_table("Tokens pushed most", columns, rows)) if rows else ""


# ---- the page


def page(title: str, body: str) -> str:
    """Put style and script inside the page; the policy allows this very script and no request at all."""
    style = (HERE / "report.css").read_text(encoding="utf-8")
    script = (HERE / "report.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; "
        "base-uri 'none'; form-action 'none'"
    )
    links = {
        "findings": "Findings",
        "lengths": "Lengths",
        "rows": "Rows",
        "verdict": "Verdict",
        "kept": "Kept",
        "learned": "Learned",
        "precisions": "Precision",
        "drift": "Drift",
        "worst": "Worst tokens",
        "standing": "Side by side",
        "best-1": "Best",
        "best-greedy": "Best, greedy",
        "methods": "Each model",
        "scores-1": "Scores",
        "facts": "What was run",
        "results": "Scores",
        "temperatures": "Temperatures",
        "strengths": "Strengths",
        "pairs": "Pairs",
        "samples": "Samples",
        "text": "Text",
        "benchmarks": "Benchmarks",
        "spent": "Spent",
        "latency": "Latency",
        "running": "Not finished",
        "curves": "Training",
        "glossary": "Metrics",
        "responses": "Responses",
        "pushed": "Pushed",
        "advantages": "Advantages",
        "held_out": "Data",
    }
    menu = "".join(f'<a href="#{name}">{label}</a>' for name, label in links.items() if f'id="{name}"' in body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light '
        'dark">'
        f"<title>{text(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{text(title)}</h1><nav>{menu}</nav></header><main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )


def write_report(
    run_dir: Path,
    title: str,
    curves: Mapping[str, Path],
    results: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    advantages: Sequence[Mapping[str, Any]],
    more: Mapping[str, str] | None = None,
    answers: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write run_dir/report.html, whole or not at all, and return its path.

    curves: stage (or seed_N/stage) -> its metrics.jsonl. results: {"models": {name: {"score", "ci95", "n", "seeds",
    "per_seed", "ci95_over_seeds" (optional), "greedy": {"score", "ci95"}}}, "comparisons" (optional), "verdict"
    (optional, one sentence that opens the page)}. samples:
    {"prompt", "model", "response", "score"}. advantages:
    {"prompt", "whose" (optional: which of several caches), "tokens": [{"text", "advantage" | None, "top":
    [[text, advantage, teacher probability], ...]}]}.
    more: further sections of a question (a key of report.questions.ASKED), as HTML made by `section` and `text`.
    answers: short answers to a question beside those found here.
    """
    more, base = more or {}, base_of(results) if results.get("models") else None
    found = {
        "who": ([results["verdict"]] if results.get("verdict") else [], results_section(results)),
        "cost": ([], ""),
        "changed": (changes_said(samples, base), samples_section(samples, base)),
        "teacher": (pushes_said(advantages), pushed_section(advantages) + advantages_section(advantages)),
        "data": ([], ""),
        "training": ([], curves_section(curves)),
    }
    parts = [
        Part(name, [*said, *(answers or {}).get(name, ())], more.get(f"{name}, first", "") + body + more.get(name, ""))
        for name, (said, body) in found.items()
    ]
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "report.html", page(title, contents(parts) + answered(parts)))
    return run_dir / "report.html"
