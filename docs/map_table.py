"""The tables of docs/map_results.md, from docs/measured/map.json.

`python -m docs.map_table outputs/map/results.json outputs/map_own/results.json` keeps what runs of pipeline=map wrote
in that file and writes the tables; without a path it writes the tables alone.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from report.map_page import difference, table

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured" / "map.json"
PAGE = ROOT / "docs" / "map_results.md"
BEGIN, END = "<!-- map-table: written by python -m docs.map_table -->", "<!-- /map-table -->"
FIGURE = re.compile(r"[+−-]\d\.\d{3} \[[+−-]\d\.\d{3}, [+−-]\d\.\d{3}\]")


def tables(maps: list[dict[str, Any]]) -> str:
    """Return the tables of every map, sentences in lines of a page's width."""
    lines = "\n".join(table(one) for one in maps).strip().splitlines()
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, 120) for line in lines)


def written(text: str, maps: list[dict[str, Any]]) -> str:
    """Return the page with the tables between their marks."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{tables(maps)}\n\n{END}{rest.split(END)[1]}"


def figures(text: str) -> set[str]:
    """Return the differences with their intervals that a text says, with plain minus signs."""
    return {found.replace("−", "-") for found in FIGURE.findall(" ".join(text.split()))}


def known_figures(maps: list[dict[str, Any]]) -> set[str]:
    """Return all differences that were measured, as a text may say them: map.comparisons and best against second."""
    decoded = [found for one in maps for cell in one["cells"] for found in cell["decoded"].values()]
    pairs = [pair for found in decoded for pair in (*found["comparisons"], found["best"])]
    return figures(" ".join(difference(pair) for pair in pairs))


def main(arguments: list[str]) -> None:
    """Keep the figures of runs, where some are named, and write the tables."""
    if arguments:
        maps = [json.loads(Path(file).read_text(encoding="utf-8")) for file in arguments]
        MEASURED.write_text(json.dumps(maps, indent=1) + "\n", encoding="utf-8")
    maps = json.loads(MEASURED.read_text(encoding="utf-8"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), maps), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
