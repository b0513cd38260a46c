"""The tables of the quickstart in README.md and docs/results.md, from docs/measured/quickstart*.json.

`python -m docs.quickstart_table outputs/quickstart/results.json` keeps the figures of a run of pipeline=quickstart in
quickstart.json and writes the tables; without a path it writes the tables alone. A second path is that of a run of
task=summarize over evaluations with evaluation.match_entropy, kept in quickstart_matched.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from evaluation.markdown import markdown, span

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured" / "quickstart.json"
MATCHED = ROOT / "docs" / "measured" / "quickstart_matched.json"
BEGIN, END = "<!-- quickstart-table: written by python -m docs.quickstart_table -->", "<!-- /quickstart-table -->"
BEGIN_MATCHED = "<!-- matched-table: written by python -m docs.quickstart_table -->"
END_MATCHED = "<!-- /matched-table -->"
SHORT = (
    "teacher_dpo",
    "student_sft",
    "student_dpo_nll",
    "dckd_long",
    "seq_kd",
    "adpa_plus",
    "adpa_plus_regularized",
    "reverse_kl",
    "no_teacher",
)
KEPT = ("score", "ci95", "ci95_over_seeds", "per_seed")


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the tables are made of: each model's scores by decoding, and the differences."""
    models = {}
    for name, row in results["models"].items():
        parts = {"1": row, "0.3": row["other_temperatures"]["0.3"], "greedy": row["greedy"]}
        models[name] = {key: {field: part[field] for field in KEPT} for key, part in parts.items()}
    comparisons = {
        "1": results["comparisons"],
        "0.3": results["other_comparisons"]["0.3"],
        "greedy": results["greedy_comparisons"],
    }
    first = next(iter(results["models"].values()))
    return {"seeds": first["seeds"], "prompts": first["n"], "models": models, "comparisons": comparisons}


def short_table(measured: dict[str, Any]) -> str:
    """Return the README's table: success with its interval over seeds at temperature 1 and 0.3, and greedily."""
    rows = [["model", "temperature 1", "0.3", "greedy"]]
    for name in SHORT:
        parts = measured["models"][name]
        rows.append([name, *(f"{part['score']:.3f} {span(part['ci95_over_seeds'])}" for part in parts.values())])
    return markdown(rows).strip()


def full_table(measured: dict[str, Any]) -> str:
    """Return the page's tables: every seed's score at temperature 1, both intervals, and the differences."""
    seeds = measured["seeds"]
    rows = [["model", *(f"seed {seed}" for seed in seeds)]]
    for words in ("temperature 1", "0.3", "greedy"):
        rows[0] += [words, "over prompts", "over seeds"]
    for name, parts in measured["models"].items():
        cells = [name, *(f"{parts['1']['per_seed'][str(seed)]:.3f}" for seed in seeds)]
        for part in parts.values():
            cells += [f"{part['score']:.3f}", span(part["ci95"]), span(part["ci95_over_seeds"])]
        rows.append(cells)
    compared = [["difference", "temperature 1", "over seeds", "0.3", "over seeds", "greedy", "over seeds"]]
    for number, pair in enumerate(measured["comparisons"]["1"]):
        cells = [f"{pair['first']} − {pair['second']}"]
        for found in measured["comparisons"].values():
            cells += [f"{found[number]['difference']:+.3f}", span(found[number]["ci95_over_seeds"], "+.3f")]
        compared.append(cells)
    return f"{markdown(rows)}\n{markdown(compared)}".strip()


def kept_matched(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the table at matched entropy is made of; every model must have a temperature in every seed."""
    first = next(iter(results["models"].values()))["matched"]
    models = {name: {field: row["matched"][field] for field in KEPT} for name, row in results["models"].items()}
    return {
        "seeds": first["seeds"],
        "prompts": first["n"],
        "models": models,
        "comparisons": results["matched_comparisons"],
    }


def matched_table(measured: dict[str, Any]) -> str:
    """Return the scores at matched entropy, and the differences, with intervals over seeds."""
    rows = [["model", "success", "over seeds"]]
    rows += [[n, f"{m['score']:.3f}", span(m["ci95_over_seeds"])] for n, m in measured["models"].items()]
    compared = [["difference", "success", "over seeds"]]
    for pair in measured["comparisons"]:
        over_seeds = span(pair["ci95_over_seeds"], "+.3f")
        compared.append([f"{pair['first']} − {pair['second']}", f"{pair['difference']:+.3f}", over_seeds])
    return f"{markdown(rows)}\n{markdown(compared)}".strip()


def written(text: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """Return a page with the table between its marks."""
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def between(text: str, begin: str = BEGIN, end: str = END) -> str:
    """Return what stands between the marks."""
    return text.split(begin)[1].split(end)[0].strip()


def main(arguments: list[str]) -> None:
    """Keep a run's figures, where one is named, and write the tables."""
    for path, file, keep in zip(arguments, (MEASURED, MATCHED), (kept, kept_matched), strict=False):
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        file.write_text(json.dumps(keep(results), indent=1) + "\n", encoding="utf-8")
    measured, matched = (json.loads(file.read_text(encoding="utf-8")) for file in (MEASURED, MATCHED))
    for name, make in (("README.md", short_table), ("docs/results.md", full_table)):
        page = ROOT / name
        page.write_text(written(page.read_text(encoding="utf-8"), make(measured)), encoding="utf-8")
    page = ROOT / "docs/results.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(written(text, matched_table(matched), BEGIN_MATCHED, END_MATCHED), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
