"""The plan of a pipeline: recipes of the `pipeline` group -> stages with folder, digest and command. Nothing runs here.

A stage lives in cache_dir/stages/NAME-DIGEST (digests.py says what counts). DONE there: skip. So a changed knob runs
again exactly what is downstream, and two pipelines share a teacher.
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pipeline.composing import Choices, Line, composed, merged, spelled
from pipeline.digests import digest_of
from pipeline.grid import Cell, cell_pipeline, cell_recipes, cells_of, common, words_of
from pipeline.recipes import (
    PLACEHOLDER,
    PipelineConfig,
    Recipe,
    check_lineage,
    flat,
    in_order,
    inputs_of,
    mentioned,
)
from pipeline.refresh import refreshed
from settings.artifacts import is_done
from settings.paths import CONFIG, ROOT
from settings.tasks import STAGES, TASKS, reads
from settings.typed import nearest

OWN_KEYS = ("pipeline", "hydra", "exp_name", "run_count", "cache_dir", "dry_run", "datasets", "estimate")
PER_STAGE = {
    "task": "pipeline.stages.STAGE.task=...",
    "loss": "pipeline.stages.STAGE.set.loss.KEY=...",
    "seed": "pipeline.seeds=[...]",
    "model": "pipeline.teacher=GROUP and pipeline.student=GROUP",
    "model.name_or_path": "++pipeline.teacher_set.model.name_or_path=... (or student_set)",
    "model.load_from": "++pipeline.teacher_set.model.name_or_path=... (or student_set)",
    "model.from_checkpoint": "++pipeline.teacher_set.model.name_or_path=... (or student_set)",
}


class Stage(NamedTuple):
    """A stage of one seed, ready to run."""

    label: str
    name: str
    seed: int
    digest: str
    folder: Path
    needs: tuple[Path, ...]
    command: list[str]
    config: dict[str, Any]  # composed, as its process will see it
    cell: str = ""  # the knobs of the cells that share it, as far as they are alike

    @property
    def done(self) -> bool:
        """Tell whether the stage has finished."""
        return is_done(self.folder)


# ---- the plan


def key_of(override: str) -> str:
    """Return the key of a command-line override."""
    return override.lstrip("+~").split("=", 1)[0]


def users_overrides(overrides: list[str], recipes: dict[str, Recipe]) -> list[str]:
    """Return what goes to the stages; refuse what can only be meant for one of them."""
    wired = {key: name for name, recipe in recipes.items() for key, value in flat(recipe.set) if mentioned(value)}
    kept = []
    for override in overrides:
        key = key_of(override)
        section = key.split(".")[0]
        if key in PER_STAGE or section == "loss":
            raise ValueError(
                f"{override}: every stage of a pipeline has its own {section}; write "
                f"{PER_STAGE.get(key, PER_STAGE[section])}"
            )
        if key in wired:
            raise ValueError(f"{override}: stage {wired[key]!r} gets it from another stage")
        if section not in OWN_KEYS or "." in key and section == "datasets":
            kept.append(override)
    return kept


def data_groups(name: str, recipe: Recipe, pipeline: PipelineConfig, groups: list[str]) -> list[str]:
    """Return the choices of `datasets` that a stage's data comes from: its own, or those that the user typed."""
    if recipe.task not in STAGES:
        raise ValueError(
            f"pipeline.stages.{name}.task={recipe.task!r} is not known.{nearest(recipe.task, list(STAGES))}"
        )
    if recipe.data is not None:
        if recipe.data not in pipeline.data:
            raise ValueError(
                f"pipeline.stages.{name}.data={recipe.data!r} is not in "
                f"pipeline.data.{nearest(recipe.data, list(pipeline.data))}"
            )
        own = (pipeline.data[recipe.data] or {}).get("datasets")
        if own is not None and groups and (pipeline.data[recipe.data] or {}).get("set"):
            raise ValueError(
                f"pipeline={pipeline.name} brings its own data; for datasets={spelled(groups)} choose "
                "pipeline=adpa_plus or another"
            )
        groups = own or groups
    if "datasets" in TASKS[recipe.task].sections and not groups:
        raise ValueError(
            f"pipeline={pipeline.name} has no data: add e.g. datasets=[dpo_mix], or for files of your own "
            "datasets=[local] datasets.local.train=train.jsonl datasets.local.test=test.jsonl"
        )
    return groups


def stage_groups(recipe: Recipe, pipeline: PipelineConfig, groups: list[str]) -> tuple[str, ...]:
    """Return the choices of groups of a stage; `groups` are those of its data."""
    sections = TASKS[recipe.task].sections
    chosen = [f"loss={recipe.loss}"] if recipe.loss else []
    if "model" in sections:
        chosen.append(f"model={getattr(pipeline, recipe.model)}")
    if groups and "datasets" in sections:
        chosen.append(f"datasets={spelled(groups)}")
    return tuple(chosen)


def stage_line(
    recipe: Recipe, pipeline: PipelineConfig, groups: list[str], users: list[str], values: dict[str, Any]
) -> Line:
    """Return a stage's command line; what its task does not read is left out."""
    typed_by_user = [o for o in users if _read_by(recipe.task, key_of(o), groups)]
    overridden = {key_of(o) for o in typed_by_user}
    own = [(k, v) for k, v in flat(values) if _read_by(recipe.task, k, groups) and k not in overridden]
    return Line(recipe.task, stage_groups(recipe, pipeline, groups), tuple(own), tuple(typed_by_user))


def _read_by(task: str, key: str, groups: list[str]) -> bool:
    section, _, rest = key.partition(".")
    return reads(task, section) and (section != "datasets" or rest.split(".")[0] in groups)


class Planned(NamedTuple):
    """What a cell is made of, before its stages are composed; a pipeline without a grid is one such."""

    cell: Cell
    pipeline: PipelineConfig
    recipes: dict[str, Recipe]
    order: list[str]
    groups: dict[str, list[str]]  # by stage: choices of datasets
    users: list[str]


Built = dict[tuple[str, int], Stage]  # by name and seed, of one cell


def build_plan(config: dict[str, Any], overrides: list[str]) -> list[Stage]:
    """Compose, check and digest every stage, in an order in which they can run; nothing is written."""
    section = config["pipeline"]
    cells = [planned(section, cell, config, overrides) for cell in cells_of(section)]
    stages_dir = Path(os.path.abspath(Path(config["cache_dir"]).expanduser())) / "stages"
    every: list[tuple[Cell, Built]] = [(one.cell, {}) for one in cells]
    behind: Built = {}
    outer = GlobalHydra.instance().hydra  # the one that composed launch.py's own config, where there is one
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG), version_base="1.3"):
            lines = {
                stage_groups(one.recipes[n], one.pipeline, one.groups[n]): None for one in cells for n in one.order
            }
            work = Composer(Choices(lines), stages_dir)
            for one, (cell, built) in zip(cells, every, strict=True):
                for name, seed in instances(one):
                    if not (cell.knobs and one.recipes[name].once):
                        built[name, seed] = work.stage(name, seed, one, [(cell, built)])
            for name, seed in instances(cells[0]):
                if cells[0].cell.knobs and cells[0].recipes[name].once:  # behind all cells
                    behind[name, seed] = work.stage(name, seed, cells[0], every)
    finally:
        GlobalHydra.instance().hydra = outer
    return [*labeled(every, section.get("grid") or {}), *behind.values()]


def planned(section: dict[str, Any], cell: Cell, config: dict[str, Any], overrides: list[str]) -> Planned:
    """Type and check a cell's recipes and put them in order."""
    pipeline = cell_pipeline(section, cell)
    recipes = cell_recipes(pipeline, cell)
    if pipeline.refresh_every is not None:
        recipes = refreshed(recipes, pipeline.refresh, pipeline.refresh_every, overrides)
    check_lineage(recipes)
    order = in_order(recipes)
    groups = {name: data_groups(name, recipes[name], pipeline, list(config["datasets"] or {})) for name in order}
    return Planned(cell, pipeline, recipes, order, groups, users_overrides(overrides, recipes))


def instances(one: Planned) -> list[tuple[str, int]]:
    """Return name and seed of every stage of a cell, in order."""
    seeds = one.pipeline.seeds
    return [(name, seed) for name in one.order for seed in (seeds[:1] if one.recipes[name].once else seeds)]


class Composer:
    """Compose stages; one that another cell has already is that one."""

    def __init__(self, choices: Choices, stages_dir: Path) -> None:
        self.choices, self.stages_dir = choices, stages_dir
        self.known: dict[str, Stage] = {}

    def stage(self, name: str, seed: int, one: Planned, cells: list[tuple[Cell, Built]]) -> Stage:
        """Return the stage of a name and a seed; `cells` holds what it may read, of one cell or of all."""
        recipe, pipeline = one.recipes[name], one.pipeline
        values = {**recipe.set, "seed": seed}
        if recipe.start:
            values = merged(values, {"model": {"load_from": f"{{{recipe.start}}}/FINAL"}})
        values = _filled(values, seed, pipeline, cells[0], cells)
        line = stage_line(recipe, pipeline, one.groups[name], one.users, values)
        accelerate = recipe.accelerate_config or pipeline.accelerate_config
        key = repr((name, seed, line, accelerate))
        if key not in self.known:
            needed = inputs_of(recipe)
            needs = [
                stage.folder
                for _, built in cells
                for (other, s), stage in built.items()
                if other in needed and (s == seed or recipe.once)
            ]
            self.known[key] = self._composed(name, seed, line, accelerate, tuple(dict.fromkeys(needs)))
        return self.known[key]

    def _composed(self, name: str, seed: int, line: Line, accelerate: str | None, needs: tuple[Path, ...]) -> Stage:
        raw = composed(name, line, self.choices)
        digest = digest_of(raw, self.stages_dir)
        folder = self.stages_dir / f"{name}-{digest[:12]}"
        launcher = [sys.executable]
        if accelerate and shares_devices(raw):
            launcher += ["-m", "accelerate.commands.launch", "--config_file", accelerate]
        paths = [f"exp_name=stages/{folder.name}", f"cache_dir={spelled(str(self.stages_dir.parent))}"]
        command = [*launcher, str(ROOT / "launch.py"), *line.words(), *paths]
        return Stage(name, name, seed, digest, folder, needs, command, raw)


def labeled(every: list[tuple[Cell, Built]], grid: dict[str, list[Any]]) -> list[Stage]:
    """Return every stage once, labeled with the knobs that the cells which share it have in common, and its seed."""
    found: dict[Path, tuple[Stage, list[Cell]]] = {}
    for cell, built in every:
        for stage in built.values():
            found.setdefault(stage.folder, (stage, []))[1].append(cell)
    seeds: dict[str, set[int]] = {}
    for stage, _ in found.values():
        seeds.setdefault(stage.name, set()).add(stage.seed)
    result = []
    for stage, cells in found.values():
        words = words_of(common(cells), grid)
        seed = f"seed {stage.seed}" if len(seeds[stage.name]) > 1 else ""
        result.append(stage._replace(label=" ".join(filter(None, (stage.name, words, seed))), cell=words))
    return result


def shares_devices(raw: dict[str, Any]) -> bool:
    """Tell whether several processes do a stage's work faster than one: it trains, or asks models of its own here.

    A server answers many requests of one process, an engine of several GPUs has them all, and a model is timed alone.
    """
    if raw["task"] == "cache":
        config = raw["cache"]
        return config["backend"] != "server" and config["tensor_parallel"] == 1 and config["import_from"] is None
    if raw["task"] == "generate":
        return raw["generation"]["backend"] != "openai" and raw["generation"]["tensor_parallel"] == 1
    if raw["task"] == "evaluate":
        return not raw["evaluation"]["latency"]
    return raw["task"] == "train" or (raw["task"] == "label" and bool(raw["label"]["reward_model"]))


def _filled(
    values: Any, seed: int, pipeline: PipelineConfig, here: tuple[Cell, Built], cells: list[tuple[Cell, Built]]
) -> Any:
    """Replace "{stage}" by its folder; where a key says {seed} or {cell}, repeat the entry for each of them."""
    cell, built = here
    if isinstance(values, dict):
        result = {}
        for key, value in values.items():
            for other in cells if "{cell}" in key else [here]:
                for s in pipeline.seeds if "{seed}" in key else [seed]:
                    named = key.replace("{seed}", str(s)).replace("{cell}", other[0].name)
                    result[named] = _filled(value, s, pipeline, other, cells)
        return result
    if isinstance(values, list):
        return [_filled(value, seed, pipeline, here, cells) for value in values]
    if not isinstance(values, str):
        return values
    if values in ("{seed}", "{knobs}"):
        return seed if values == "{seed}" else cell.knobs
    own = {"seed": str(seed), "cell": cell.name}
    return PLACEHOLDER.sub(lambda m: own[m[1]] if m[1] in own else str(built[m[1], seed].folder), values)
