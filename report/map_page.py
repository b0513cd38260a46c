"""The map of a grid's cells as a page and as Markdown: heat maps of the best method and of every method's score."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evaluation.markdown import markdown, span
from report.markup import number, section, text
from report.page import page
from report.tables import html_table

DECODINGS = {"1": "temperature 1", "greedy": "greedy"}
RULE = (
    "A best method is marked ▲ only where its difference to the second one, paired by seed, is above 0 with its whole "
    "95 % interval over seeds. Without the mark the two cannot be told apart by these seeds."
)


def turned(cell: Mapping[str, Any], results: Mapping[str, Any], without: Sequence[str | None] = ()) -> str:
    """Say the knobs of a cell that vary in the grid."""
    grid = results["grid"]
    return ", ".join(f"{k} {v}" for k, v in cell["knobs"].items() if len(grid[k]) > 1 and k not in without)


def fixed(results: Mapping[str, Any]) -> str:
    """Say the knobs that are the same in all cells."""
    return ", ".join(f"{knob} {values[0]}" for knob, values in results["grid"].items() if len(values) == 1)


def verdict(results: Mapping[str, Any]) -> str:
    """Return the sentence that opens the page: in how many cells which method is apart, at temperature 1."""
    apart: dict[str, int] = {}
    for cell in results["cells"]:
        best = cell["decoded"]["1"]["best"]
        if best["apart"]:
            apart[best["first"]] = apart.get(best["first"], 0) + 1
    total, seeds = len(results["cells"]), len(results["seeds"])
    if not apart:
        return f"At temperature 1 no method is apart from the second best in any of {total} cells over {seeds} seeds."
    said = ", ".join(f"{name} in {count}" for name, count in apart.items())
    where = f"in {sum(apart.values())} of {total} cells"
    return f"At temperature 1 a best method is apart from the second, over {seeds} seeds, {where}: {said}."


# ---- Markdown


def scores_rows(results: Mapping[str, Any], decoding: str) -> list[list[str]]:
    """Return a row a cell: the score of every model with its interval over seeds, the best method marked if apart."""
    names = list(results["cells"][0]["decoded"][decoding]["models"])
    rows = [["cell", *names, "best − second"]]
    for cell in results["cells"]:
        found, best = cell["decoded"][decoding], cell["decoded"][decoding]["best"]
        scores = []
        for name in names:
            mark = " ▲" if best["apart"] and name == best["first"] else ""
            entry = found["models"][name]
            scores.append(f"{entry['score']:.3f} {span(entry['ci95_over_seeds'])}{mark}")
        rows.append([turned(cell, results) or "the only one", *scores, difference(best)])
    return rows


def difference(pair: Mapping[str, Any]) -> str:
    """Write a difference of two models with its interval over seeds."""
    return f"{pair['first']} − {pair['second']} {pair['difference']:+.3f} {span(pair['ci95_over_seeds'], '+.3f')}"


def differences_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each cell and pair of map.comparisons, at temperature 1 and greedily; heads alone for none."""
    rows = [["cell", "difference", *DECODINGS.values()]]
    for cell in results["cells"]:
        pairs = zip(*(cell["decoded"][key]["comparisons"] for key in DECODINGS), strict=True)
        for by_decoding in pairs:
            values = [f"{p['difference']:+.3f} {span(p['ci95_over_seeds'], '+.3f')}" for p in by_decoding]
            names = f"{by_decoding[0]['first']} − {by_decoding[0]['second']}"
            rows.append([turned(cell, results) or "the only one", names, *values])
    return rows


def table(results: Mapping[str, Any]) -> str:
    """Return the map as Markdown: the scores of every cell, then the differences."""
    parts = [verdict(results) + "\n"]
    if fixed(results):
        parts.append(f"In all cells: {fixed(results)}.\n")
    for key, words in DECODINGS.items():
        parts.append(f"Success, {words} [95 % over seeds {', '.join(map(str, results['seeds']))}]:\n")
        parts.append(markdown(scores_rows(results, key)))
    if len(differences_rows(results)) > 1:
        parts += ["Differences [95 % over seeds], paired by seed:\n", markdown(differences_rows(results))]
    return "\n".join(parts)


# ---- the page


def panels(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[tuple[Any, Any], Mapping[str, Any]]]]:
    """Yield (what is turned beside the axes, {(row, column): cell}) for each heat map."""
    axes = (results["rows"], results["columns"])
    found: dict[str, dict[tuple[Any, Any], Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        row, column = (cell["knobs"][knob] if knob else "" for knob in axes)
        found.setdefault(turned(cell, results, axes), {})[row, column] = cell
    yield from found.items()


def heat_table(label: str, results: Mapping[str, Any], cells: Mapping[tuple[Any, Any], tuple[str, float, bool]]) -> str:
    """Draw a heat map: {(row, column): (content as HTML, score that colors it, framed)}."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    corner = " \\ ".join(knob for knob in (results["rows"], results["columns"]) if knob)
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = ""
    for row in rows:
        body += f'<tr><th scope="row">{text(row)}</th>'
        for column in columns:
            content, score, framed = cells.get((row, column), ("–", 0.0, False))
            body += f'<td class="{"apart" if framed else "level"}" style="--s:{score:.3f}">{content}</td>'
        body += "</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}"><table class="heat">'
        f'<thead><tr><th scope="col">{text(corner)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def best_cell(found: Mapping[str, Any]) -> tuple[str, float, bool]:
    """Return the content of a cell of the map: who is best, by how much, and whether that is more than chance."""
    best = found["best"]
    own, lead = found["models"][best["first"]], span(best["ci95_over_seeds"], "+.3f")
    mark = "▲ apart from" if best["apart"] else "not told from"
    content = (
        f"<b>{text(best['first'])}</b> {number(own['score'])} <small>{span(own['ci95_over_seeds'])}</small>"
        f"<small>{mark} {text(best['second'])}: {best['difference']:+.3f} {lead}</small>"
    )
    return content, own["score"], best["apart"]


def best_section(results: Mapping[str, Any], decoding: str, words: str) -> str:
    """Draw who is best in every cell."""
    body = ""
    for title, cells in panels(results):
        drawn = {place: best_cell(cell["decoded"][decoding]) for place, cell in cells.items()}
        body += (f"<h3>{text(title)}</h3>" if title else "") + heat_table(f"best method, {words}", results, drawn)
    return section(f"best-{decoding}", f"The best method of each cell, {words}", body + f'<p class="note">{RULE}</p>')


def methods_section(results: Mapping[str, Any]) -> str:
    """Draw a small heat map of the score of each model, at temperature 1 with the greedy score beside it."""
    body = ""
    for title, cells in panels(results):
        figures = ""
        for name in results["cells"][0]["decoded"]["1"]["models"]:
            drawn = {}
            for place, cell in cells.items():
                one, greedy = (cell["decoded"][key]["models"][name] for key in ("1", "greedy"))
                content = f"{number(one['score'])}<small>greedy {number(greedy['score'])}</small>"
                drawn[place] = (content, one["score"], False)
            heat = heat_table(name, results, drawn)
            figures += f'<figure class="panel"><figcaption><b>{text(name)}</b></figcaption>{heat}</figure>'
        body += (f"<h3>{text(title)}</h3>" if title else "") + f'<div class="panels">{figures}</div>'
    note = "Color and first number: success at temperature 1, 0 to 1. What does not compete is shown, too."
    return section("methods", "Each model", f'{body}<p class="note">{note}</p>')


def html(results: Mapping[str, Any]) -> str:
    """Return the page of a map."""
    body = f'<p class="verdict">{text(verdict(results))}</p>'
    body += "".join(best_section(results, key, words) for key, words in DECODINGS.items())
    body += methods_section(results)
    for key, words in DECODINGS.items():
        head, *rows = [[text(cell) for cell in row] for row in scores_rows(results, key)]
        seeds = ", ".join(map(str, results["seeds"]))
        note = f"95 % intervals over seeds {seeds}; {results['prompts']} held-out prompts a seed."
        note += f" In all cells: {fixed(results)}." if fixed(results) else ""
        title = f"Success, {words}"
        body += section(f"scores-{key}", title, html_table(title, head, rows) + f'<p class="note">{text(note)}</p>')
    head, *rows = [[text(cell) for cell in row] for row in differences_rows(results)]
    if rows:
        body += section("pairs", "Differences, paired by seed", html_table("Differences", head, rows))
    return page("Which method when", body)
