"""The tables of docs/rewards.md, from docs/measured/rewards.json.

`python -m docs.rewards_table outputs/rewards/results.json outputs/online_dpo/results.json` keeps the figures of runs of
pipeline=rewards and pipeline=online_dpo there and writes the tables; without paths it writes the tables alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

from docs.quickstart_table import differences
from evaluation.lineage import GENERATED, SCORED
from evaluation.markdown import markdown, span

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured" / "rewards.json"
PAGE = ROOT / "docs" / "rewards.md"
NAMES = ("rewards", "online_dpo")
KEPT = ("score", "ci95_over_seeds", "per_seed")
WAYS = {"1": "temperature 1", "greedy": "greedy", "matched": "equal entropy"}  # the last in the first table alone


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """Return what a table is made of: each model's scores, what was sampled and checked for it, the differences."""
    models = {}
    for name, row in results["models"].items():
        parts = {"1": row, "greedy": row["greedy"], "matched": row.get("matched")}
        models[name] = {key: {field: part[field] for field in KEPT} for key, part in parts.items() if part}
        models[name] |= {key: row.get(key) for key in (SCORED, GENERATED)}
    first = next(iter(results["models"].values()))
    named = {"1": "comparisons", "greedy": "greedy_comparisons", "matched": "matched_comparisons"}
    pairs = {key: results[name] for key, name in named.items() if results.get(name)}
    return {"seeds": first["seeds"], "prompts": first["n"], "models": models, "comparisons": pairs}


def table(measured: dict[str, Any]) -> str:
    """Return success with intervals over seeds beside its price, and the differences."""
    ways = list(measured["comparisons"])
    heads = [cell for way in ways for cell in (WAYS[way], "over seeds")]
    rows = [["model", "responses checked for it", "tokens sampled for it", *heads]]
    for name, row in measured["models"].items():
        cells = [name, *(f"{row[key]:,.0f}" if row[key] else "-" for key in (SCORED, GENERATED))]
        for way in ways:
            cells += [f"{row[way]['score']:.3f}", span(row[way]["ci95_over_seeds"])]
        rows.append(cells)
    compared = differences(measured["comparisons"], [WAYS[way] for way in ways])
    return f"{markdown(rows)}\n{markdown(compared)}".strip()


def marks(name: str) -> tuple[str, str]:
    """Return what stands before and after a pipeline's table."""
    return f"<!-- {name}-table: written by python -m docs.rewards_table -->", f"<!-- /{name}-table -->"


def written(text: str, measured: dict[str, Any]) -> str:
    """Return the page with both tables between their marks."""
    for name in NAMES:
        begin, end = marks(name)
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table(measured[name])}\n{end}{rest.split(end)[1]}"
    return text


def main(arguments: list[str]) -> None:
    """Keep the figures of runs, where some are named, and write the tables."""
    if arguments:
        found = [kept(json.loads(Path(file).read_text(encoding="utf-8"))) for file in arguments]
        MEASURED.write_text(json.dumps(dict(zip(NAMES, found, strict=True)), indent=1) + "\n", encoding="utf-8")
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
