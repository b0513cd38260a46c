"""The tables of README.md and docs/results.md, from docs/measured/quickstart.json and regularized.json.

`python -m docs.quickstart_table outputs/quickstart/results.json` keeps the figures of a run there and writes the
tables; so does `outputs/regularized/results.json` for pipeline=regularized. Without a path it writes the tables alone.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.markdown import markdown, span

ROOT = Path(__file__).resolve().parents[1]
MEASURED, REGULARIZED = (ROOT / "docs" / "measured" / f"{name}.json" for name in ("quickstart", "regularized"))
RESULTS = "docs/results.md"
SHORT = (
    "teacher_dpo",
    "student_sft",
    "student_dpo_nll",
    "dckd_long",
    "seq_kd",
    "adpa_plus",
    "adpa_plus_regularized",
    "reverse_kl",
    "online_adpa",
    "no_teacher",
)
WAYS = ("temperature 1", "0.3", "greedy", "equal entropy")
KEPT = ("score", "ci95", "ci95_over_seeds", "per_seed")


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the tables are made of: each model's scores by decoding, and the differences.

    A model that no temperature makes as certain as the teacher, on one seed's world, has no score at equal entropy.
    """
    models = {}
    for name, row in results["models"].items():
        parts = {"1": row, "0.3": row["other_temperatures"]["0.3"], "greedy": row["greedy"]}
        parts |= {"matched": row["matched"]} if "matched" in row else {}
        models[name] = {key: {field: part[field] for field in KEPT} for key, part in parts.items()}
    comparisons = {
        "1": results["comparisons"],
        "0.3": results["other_comparisons"]["0.3"],
        "greedy": results["greedy_comparisons"],
        "matched": results["matched_comparisons"],
    }
    first = next(iter(results["models"].values()))
    return {"seeds": first["seeds"], "prompts": first["n"], "models": models, "comparisons": comparisons}


def short_table(measured: dict[str, Any], names: Sequence[str] = SHORT) -> str:
    """Return the README's table: success with its interval over seeds, four ways to decode."""
    rows = [["model", *WAYS]]
    for name in names:
        parts = measured["models"][name]
        cells = [f"{part['score']:.3f} {span(part['ci95_over_seeds'])}" for part in parts.values()]
        rows.append([name, *cells, *["-"] * (len(WAYS) - len(cells))])
    return markdown(rows).strip()


def full_table(measured: dict[str, Any]) -> str:
    """Return the page's tables: every seed's score at temperature 1, both intervals, and the differences."""
    seeds = measured["seeds"]
    rows = [["model", *(f"seed {seed}" for seed in seeds)]]
    for words in WAYS:
        rows[0] += [words, "over prompts", "over seeds"]
    for name, parts in measured["models"].items():
        cells = [name, *(f"{parts['1']['per_seed'][str(seed)]:.3f}" for seed in seeds)]
        for part in parts.values():
            cells += [f"{part['score']:.3f}", span(part["ci95"]), span(part["ci95_over_seeds"])]
        rows.append(cells)
    return f"{markdown(rows)}\n{markdown(differences(measured['comparisons'], WAYS))}".strip()


def regularized_table(measured: dict[str, Any]) -> str:
    """Return the tables of pipeline=regularized: success and differences over its seeds."""
    table = short_table(measured, list(measured["models"]))
    return f"{table}\n\n{markdown(differences(measured['comparisons'], WAYS))}".strip()


def differences(comparisons: dict[str, Any], ways: Sequence[str]) -> list[list[str]]:
    """Return a row for each compared pair, with its interval over seeds, two columns a way to decode."""
    rows = [["difference", *(cell for words in ways for cell in (words, "over seeds"))]]
    for pairs in zip(*comparisons.values(), strict=True):
        cells = [f"{pairs[0]['first']} − {pairs[0]['second']}"]
        for found in pairs:
            cells += [f"{found['difference']:+.3f}", span(found["ci95_over_seeds"], "+.3f")]
        rows.append(cells)
    return rows


def marks(name: str) -> tuple[str, str]:
    """Return what stands before and after a pipeline's table."""
    return f"<!-- {name}-table: written by python -m docs.quickstart_table -->", f"<!-- /{name}-table -->"


def written(text: str, table: str, name: str = "quickstart") -> str:
    """Return a page with the table between its marks."""
    begin, end = marks(name)
    head, rest = text.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def between(text: str, name: str = "quickstart") -> str:
    """Return what stands between the marks."""
    begin, end = marks(name)
    return text.split(begin)[1].split(end)[0].strip()


def main(arguments: list[str]) -> None:
    """Keep the figures of runs, where some are named, and write the tables."""
    for path in arguments:
        results = kept(json.loads(Path(path).read_text(encoding="utf-8")))
        file = MEASURED if "seq_kd" in results["models"] else REGULARIZED
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    measured, more = (json.loads(file.read_text(encoding="utf-8")) for file in (MEASURED, REGULARIZED))
    for name, table, block in (
        ("README.md", short_table(measured), "quickstart"),
        (RESULTS, full_table(measured), "quickstart"),
        (RESULTS, regularized_table(more), "regularized"),
    ):
        page = ROOT / name
        page.write_text(written(page.read_text(encoding="utf-8"), table, block), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
