"""task=map: the cells of a grid side by side: which method is best where, and where that is apart from chance.

map.evaluations names the folders of task=evaluate, a cell and a seed each; map.knobs says what is turned in a cell
(pipeline=map fills both in). Writes results.json, results.md and report.html (a heat map) into the run's folder.
"""

from pathlib import Path
from typing import Any

from evaluation.cells import cell_results
from report.gather import Evaluation, read_evaluation
from report.map_page import html, table
from settings.artifacts import write_json, write_text
from settings.schema import MapConfig, Settings
from settings.typed import nearest

DECODED = {"1": "1", "0": "greedy"}  # temperatures of an evaluation, by their names in results.json


def read_cell(name: str, folders: dict[str, str]) -> list[Evaluation]:
    """Read the evaluations of a cell, one a seed; ValueError without temperature 1 and greedy, or with a seed twice."""
    found = [read_evaluation(Path(folder).expanduser()) for folder in folders.values()]
    for one in found:
        missing = [key for key in DECODED if key not in one.scores]
        if missing:
            raise ValueError(
                f"map.evaluations.{name}: {one.folder} has no temperature {missing[0]}; it needs [1.0, 0.0]"
            )
    if len({one.seed for one in found}) < len(found):
        raise ValueError(f"map.evaluations.{name} holds a seed twice: {[one.seed for one in found]}")
    return found


def check_alike(cells: dict[str, list[Evaluation]]) -> None:
    """Refuse cells of other models or seeds: a map compares like with like."""
    (first, one), *others = cells.items()
    for name, other in others:
        if [e.seed for e in other] != [e.seed for e in one]:
            raise ValueError(f"map.evaluations.{name} has seeds {[e.seed for e in other]}, {first} has others")
    names = [*one[0].results["models"]]
    for name, evaluations in cells.items():
        for e in evaluations:
            if [*e.results["models"]] != names:
                raise ValueError(f"map.evaluations.{name}: {e.folder} holds other models than those of {first}")


def means(evaluations: list[Evaluation], temperature: str) -> dict[str, list[float]]:
    """Return each model's mean success by seed."""
    found: dict[str, list[float]] = {name: [] for name in evaluations[0].scores[temperature]}
    for e in evaluations:
        for name, scores in e.scores[temperature].items():
            found[name].append(sum(scores) / len(scores))
    return found


def mapped(config: MapConfig) -> dict[str, Any]:
    """Return what results.json holds."""
    cells = {name: read_cell(name, dict(folders)) for name, folders in config.evaluations.items()}
    check_alike(cells)
    first = next(iter(cells.values()))
    names = [*first[0].results["models"]]
    methods = config.methods or names
    for key, wanted in (("methods", methods), ("comparisons", [name for pair in config.comparisons for name in pair])):
        for name in wanted:
            if name not in names:
                raise ValueError(f"map.{key} holds {name!r}, which is no evaluated model.{nearest(name, names)}")
    knobs = [dict(config.knobs[name]) for name in cells]
    grid = {knob: list(dict.fromkeys(cell[knob] for cell in knobs)) for knob in knobs[0]}
    axes = axes_of(config, grid)
    return {
        "columns": axes[0],
        "rows": axes[1],
        "grid": grid,
        "seeds": [e.seed for e in first],
        "prompts": len(next(iter(first[0].scores["1"].values()))),
        "methods": methods,
        "cells": [
            {
                "knobs": turned,
                "decoded": {
                    said: cell_results(means(evaluations, key), methods, config.comparisons)
                    for key, said in DECODED.items()
                },
            }
            for turned, evaluations in zip(knobs, cells.values(), strict=True)
        ],
    }


def axes_of(config: MapConfig, grid: dict[str, list[Any]]) -> tuple[str | None, str | None]:
    """Return the knobs of columns and rows: those asked for, else the first that vary; None where none is left."""
    for key in ("columns", "rows"):
        knob = getattr(config, key)
        if knob is not None and knob not in grid:
            raise ValueError(f"map.{key}={knob!r} is no knob of this grid.{nearest(knob, list(grid))}")
    varied = [knob for knob, values in grid.items() if len(values) > 1 and knob not in (config.columns, config.rows)]
    columns = config.columns or (varied.pop(0) if varied else None)
    return columns, config.rows or (varied.pop(0) if varied else None)


def run(settings: Settings) -> None:
    """Write the map."""
    results = mapped(settings.map)
    run_dir = settings.run.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "results.json", results)
    write_text(run_dir / "results.md", table(results))
    write_text(run_dir / "report.html", html(results))
    print(table(results))
    print(run_dir / "report.html", flush=True)
