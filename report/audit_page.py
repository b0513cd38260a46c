"""What task=audit writes: audit.json, audit.md, audit.html. Tokens and their context are untrusted: through `text`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.metrics import is_number
from report.markup import section, text
from report.page import page
from report.tables import html_table
from settings.artifacts import write_json, write_text

TITLE = "Audit of a teacher cache"
REASONS = {
    "error": "the entry furthest from exact",
    "mass": "least mass kept",
    "kl": "largest gap of truncated and exact KL",
    "signs": "most probability with a wrong sign",
}
Rows = list[tuple[str, str]]


def figure(value: Any) -> str:
    """Write a figure with four significant digits; a dash where there is none."""
    return f"{value:.4g}" if is_number(value) else "–"


def kept_rows(figures: Mapping[str, Any]) -> Rows:
    """Name what the entries keep, as words and numbers."""
    error = figures["error"]
    return [
        ("entries a token", figure(figures["entries_per_token"])),
        ("mass kept, mean", figure(figures["mass"]["mean"])),
        ("mass kept, least", figure(figures["mass"]["min"])),
        ("mass that as many other ids could hold more", figure(figures["mass_missed"])),
        ("entry off exact, largest (nats)", figure(error["max"])),
        ("… beyond what the codec states", figure(error["beyond_stated"])),
        ("entry off exact, weighted by probability (nats)", figure(error["weighted"])),
        ("stored tail off the mass outside, largest", figure(error["tail"])),
        ("temperature that the entries look like", figure(figures["temperature"])),
        ("fit of that line (1: exactly)", figure(figures["fit"])),
    ]


def learning_rows(figures: Mapping[str, Any]) -> Rows:
    """Name what a student learns from the entries; none without a student."""
    if "kl" not in figures:
        return []
    kl, gradient = figures["kl"], figures["dckd_gradient"]
    rows = [
        ("overlap of student's and teacher's top k", figure(figures["overlap"])),
        ("KL(teacher‖student) truncated, with a bucket for the rest (nats)", figure(kl["truncated"])),
        ("KL exact (nats)", figure(kl["exact"])),
        ("KL gap, largest of a token (nats)", figure(kl["largest_gap"])),
        *_gradient_rows("DCKD", gradient),
    ]
    return rows + (_gradient_rows("ADPA", figures["adpa_gradient"]) if "adpa_gradient" in figures else [])


def _gradient_rows(name: str, gradient: Mapping[str, Any]) -> Rows:
    return [
        (f"{name} gradient: cosine with the exact one", figure(gradient["cosine"])),
        (f"{name} gradient: length beside the exact one", figure(gradient["relative_norm"])),
        (f"{name} gradient: length of the difference beside the exact one", figure(gradient["relative_error"])),
        (f"{name} gradient: cosine of the worst token", figure(gradient["worst_token_cosine"])),
    ]


def precision_table(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return a row each for the stored entries and every precision asked: errors and wrong signs."""
    stored = (figures.get("advantages") or {}).get("stored") or {}
    own = {"max_logp_error": figures["error"]["max"], "weighted_logp_error": figures["error"]["weighted"], **stored}
    rows = []
    for name, row in {"stored": own, **figures.get("precisions", {})}.items():
        if "not_possible" in row:
            rows.append([name, f"not possible here: {row['not_possible']}", *["–"] * 5])
            continue
        keys = ("max_logp_error", "weighted_logp_error", "wrong_signs", "wrong_sign_mass", "mean_error", "max_error")
        rows.append([name, *(figure(row.get(key)) for key in keys)])
    return rows


PRECISION_HEAD = [
    "entries",
    "log-prob. error, largest",
    "… weighted",
    "wrong signs of advantages",
    "… weighted",
    "advantage error, mean",
    "… largest",
]


def drift_words(drift: Mapping[str, Any]) -> list[str]:
    """Say in sentences where text and ids part."""
    found = [
        f"{drift['retokenized_otherwise']} of {drift['sequences']} sequences have other ids when their text is "
        "tokenized again (sampled ids often do; those of a data set should not)."
    ]
    first = drift.get("first")
    if first:
        where = "response" if first["in_response"] else "prompt"
        found.append(
            f"The first: sequence {first['sequence']}, token {first['position']} ({where}): stored "
            f"{first['stored']}, again {first['again']}."
        )
    coverage = drift.get("coverage")
    if coverage:
        found.append(f"This run's data makes {coverage['rows']} sequences; the cache holds {coverage['held']}.")
        found += [coverage["first"]] if "first" in coverage else []
    else:
        found.append("No data was named (datasets=, cache.generations=), so no run's sequences were looked up.")
    return found


def about(audit: Mapping[str, Any]) -> str:
    """Say what was compared with what."""
    cache = audit["cache"]
    student = audit["student"] or "nobody: without audit.student or cache.reference there is no KL and no gradient"
    known = "" if "teacher_digest" in audit["identity"] else " Its teacher's weights are not known by a digest."
    return (
        f"{cache['folder']}: {cache['quantity']}, K = {cache['k']}, {cache['precision']}.{known} "
        f"{audit['figures']['num_tokens']} tokens of {audit['num_sequences']} sequences; teachers asked again in "
        f"{audit['truth']}; who learns: {student}."
    )


def markdown(audit: Mapping[str, Any]) -> str:
    """Write audit.md."""
    figures = audit["figures"]
    lines = [f"# {TITLE}", "", audit["verdict"], "", about(audit), ""]
    for title, rows in (("What is kept", kept_rows(figures)), ("What is learned", learning_rows(figures))):
        if rows:
            lines += [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += [
        "## Mass kept by place in the response",
        "",
        "| from token | tokens | mean | least |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {b['from']} | {b['tokens']} | {figure(b['mean'])} | {figure(b['min'])} |"
        for b in figures["mass"]["by_position"]
    ]
    lines += ["", "## By precision", "", f"| {' | '.join(PRECISION_HEAD)} |", "|---" * len(PRECISION_HEAD) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in precision_table(figures)]
    lines += ["", "## Drift", "", *(f"- {' '.join(words.split())}" for words in drift_words(audit["drift"])), ""]
    return "\n".join(lines)


# ---- the page


def worst_block(token: Mapping[str, Any]) -> str:
    """Show a token in its context, and its stored entries beside the exact ones."""
    figures, advantages = token["figures"], "advantage" in (token["stored"] or [{}])[0]
    columns = [
        "rank",
        "stored",
        "log-prob.",
        "exact at that id",
        *(["advantage", "exact"] if advantages else []),
        "exact top",
        "log-prob.",
    ]
    rows = []
    for rank in range(max(len(token["stored"]), len(token["exact"]))):
        one = token["stored"][rank] if rank < len(token["stored"]) else None
        other = token["exact"][rank] if rank < len(token["exact"]) else None
        cells = [visible(one["token"]), figure(one["logp"]), figure(one["exact"])] if one else ["–"] * 3
        if advantages:
            cells += [figure(one["advantage"]), figure(one["exact_advantage"])] if one else ["–"] * 2
        rows.append(
            [str(rank + 1), *cells, *([visible(other["token"]), figure(other["logp"])] if other else ["–"] * 2)]
        )
    numbers = [f"mass kept {figure(figures['mass'])}", f"entry off by up to {figure(figures['error_max'])} nats"]
    if "kl_exact" in figures:
        numbers.append(f"KL truncated {figure(figures['kl_truncated'])}, exact {figure(figures['kl_exact'])}")
    where = f"sequence {token['sequence']}, response token {token['position']}"
    return (
        f'<div class="stage worst"><h3>{text(REASONS[token["reason"]])} <small>{where}</small></h3>'
        f'<p class="prompt">{text(token["before"])}<mark>{visible(token["token"])}</mark></p>'
        f'<p class="note">{text("; ".join(numbers))}</p>{html_table("Stored and exact entries", columns, rows)}</div>'
    )


def visible(token: str) -> str:
    """Write a token's text so that spaces and line breaks show."""
    return text(token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))


def html(audit: Mapping[str, Any]) -> str:
    """Write audit.html: one file that opens offline."""
    figures = audit["figures"]
    bars = "".join(f"<li>{text(words)}</li>" for words in audit["missed"]) or "<li>every bar is met</li>"
    parts = [
        section("verdict", "Verdict", f'<ul>{bars}</ul><p class="note">{text(about(audit))}</p>'),
        section("kept", "What is kept", _table("What is kept", kept_rows(figures))),
    ]
    rows = learning_rows(figures)
    if rows:
        parts.append(section("learned", "What is learned", _table("What is learned", rows)))
    bins = [
        [str(b["from"]), str(b["tokens"]), figure(b["mean"]), figure(b["min"])] for b in figures["mass"]["by_position"]
    ]
    head = ["from token", "tokens", "mean", "least"]
    parts.append(section("positions", "Mass kept by place in the response", html_table("Mass by place", head, bins)))
    cells = [[text(cell) for cell in row] for row in precision_table(figures)]
    parts.append(section("precisions", "By precision", html_table("By precision", PRECISION_HEAD, cells)))
    drift = "".join(f"<li>{text(words)}</li>" for words in drift_words(audit["drift"]))
    parts.append(section("drift", "Drift of tokenizer or template", f"<ul>{drift}</ul>"))
    if audit["worst"]:
        parts.append(section("worst", "Worst tokens", "".join(worst_block(token) for token in audit["worst"])))
    return page(TITLE, "".join(parts))


def _table(label: str, rows: Rows) -> str:
    return html_table(label, ["", ""], [[text(name), text(value)] for name, value in rows])


def write_audit(run_dir: Path, audit: Mapping[str, Any]) -> None:
    """Write the three files into the run's folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "audit.json", audit)
    write_text(run_dir / "audit.md", markdown(audit))
    write_text(run_dir / "audit.html", html(audit))
