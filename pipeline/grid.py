"""The grid of a pipeline: cells that turn knobs (pipeline.grid), and what of the pipeline each cell is.

`grid: {pairs: [100, 4000], flipped: [0.0, 0.4]}` makes four cells. In each, "{pairs}" and "{flipped}" anywhere in the
group stand for that cell's values, also inside another placeholder ("{pairs_{policy}}" is the stage pairs_own or
pairs_foreign). A stage that comes out alike in two cells is one stage, by its digest. Stages that run `once` stand
behind all cells: in them a key with {cell} is repeated for every cell, and the value "{knobs}" is what is turned there.
Stages that none of these needs in any cell are left out.
"""

import re
from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

from pipeline.recipes import PLACEHOLDER, RESERVED, PipelineConfig, Recipe, known_inputs_of, recipes_of, with_texts
from settings.schema import require, typed
from settings.typed import nearest

UNTURNED = ("grid", "name", "seeds", "parallel", "warm_start")  # keys of the group that no knob reaches
VALUE = re.compile(r"[\w.+-]+")


class Cell(NamedTuple):
    """One cell: its name, and the value of every knob; a pipeline without a grid is one cell without knobs."""

    name: str
    knobs: dict[str, Any]


def checked_grid(section: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the grid of the `pipeline` group; ValueError for a knob or a value that cannot be one."""
    grid = section.get("grid") or {}
    require(isinstance(grid, dict), f"pipeline.grid={grid!r} must be a mapping, e.g. {{pairs: [100, 4000]}}")
    body = {key: value for key, value in section.items() if key not in UNTURNED}
    used = {name for text in _texts(body) for name in PLACEHOLDER.findall(text)}
    for knob, values in grid.items():
        where = f"pipeline.grid.{knob}"
        good_name = re.fullmatch(r"[A-Za-z_]\w*", str(knob)) and knob not in RESERVED
        require(bool(good_name), f"{where}: a knob is a word, and none of {', '.join(RESERVED)}")
        require(knob not in section["stages"], f"{where}: a stage has this name; call the knob otherwise")
        known = sorted(used - {*RESERVED, *section["stages"]})
        require(knob in used, f"{where}: nothing in this pipeline says {{{knob}}}.{nearest(str(knob), known)}")
        require(isinstance(values, list), f"{where}={values!r} must be a list of values, e.g. [{values!r}]")
        require(len(values) > 0, f"{where}=[] has no value: give one or more")
        for value in values:
            plain = isinstance(value, bool | int | float) or (isinstance(value, str) and VALUE.fullmatch(value))
            require(bool(plain), f"{where}: {value!r} must be a number, true, false or a word")
        require(len({repr(v) for v in values}) == len(values), f"{where}={values}: a value stands there twice")
    return grid


def _texts(value: Any) -> Iterable[str]:
    """Yield every text in a nested value."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts(entry)
    elif isinstance(value, str):
        yield value


def cells_of(section: dict[str, Any]) -> list[Cell]:
    """Return the cells of the `pipeline` group, the last knob turning fastest."""
    grid = checked_grid(section)
    if not grid:
        return [Cell("", {})]
    turns = product(*grid.values())
    return [Cell(f"cell_{n}", dict(zip(grid, values, strict=True))) for n, values in enumerate(turns, 1)]


def turned(value: Any, knobs: dict[str, Any]) -> Any:
    """Return a value with those of the knobs in the place of their names; a knob alone keeps its type."""

    def changed(text: str) -> Any:
        alone = PLACEHOLDER.fullmatch(text)
        if alone and alone[1] in knobs:
            return knobs[alone[1]]
        return PLACEHOLDER.sub(lambda found: str(knobs[found[1]]) if found[1] in knobs else found[0], text)

    return with_texts(value, changed)


def cell_pipeline(section: dict[str, Any], cell: Cell) -> PipelineConfig:
    """Return the pipeline of a cell, typed."""
    body = {key: value if key in UNTURNED else turned(value, cell.knobs) for key, value in section.items()}
    return typed(body, PipelineConfig, "pipeline.")


def cell_recipes(pipeline: PipelineConfig, cell: Cell) -> dict[str, Recipe]:
    """Return the recipes of a cell; with a grid only those that the stages behind all cells need."""
    recipes = recipes_of(pipeline)
    if not cell.knobs:
        return recipes
    needed = [name for name, recipe in recipes.items() if recipe.once]
    require(bool(needed), "pipeline.grid needs a stage with `once: true` behind its cells, e.g. task: map")
    for name in needed:  # grows as it goes
        needed += [other for other in known_inputs_of(name, recipes) if other not in needed]
    return {name: recipe for name, recipe in recipes.items() if name in needed}


def words_of(knobs: dict[str, Any], grid: dict[str, list[Any]]) -> str:
    """Say the knobs that have several values in the grid: pairs=100 flipped=0.4."""
    return " ".join(f"{key}={value}" for key, value in knobs.items() if len(grid[key]) > 1)


def common(cells: list[Cell]) -> dict[str, Any]:
    """Return the knobs that stand alike in all of the cells."""
    first, *others = cells
    return {key: value for key, value in first.knobs.items() if all(cell.knobs[key] == value for cell in others)}
