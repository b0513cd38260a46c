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
from pipeline.recipes import (
    PLACEHOLDER,
    PipelineConfig,
    Recipe,
    check_lineage,
    flat,
    in_order,
    inputs_of,
    mentioned,
    recipes_of,
)
from pipeline.refresh import refreshed
from settings.artifacts import is_done
from settings.paths import CONFIG, ROOT
from settings.schema import typed
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


def build_plan(config: dict[str, Any], overrides: list[str]) -> list[Stage]:
    """Compose, check and digest every stage, in an order in which they can run; nothing is written."""
    pipeline = typed(config["pipeline"], PipelineConfig, "pipeline.")
    recipes = recipes_of(pipeline)
    if pipeline.refresh_every is not None:
        recipes = refreshed(recipes, pipeline.refresh, pipeline.refresh_every, overrides)
    check_lineage(recipes)
    order = in_order(recipes)
    users = users_overrides(overrides, recipes)
    stages_dir = Path(os.path.abspath(Path(config["cache_dir"]).expanduser())) / "stages"
    built: dict[tuple[str, int], Stage] = {}
    outer = GlobalHydra.instance().hydra  # the one that composed launch.py's own config, where there is one
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG), version_base="1.3"):
            groups = {n: data_groups(n, recipes[n], pipeline, list(config["datasets"] or {})) for n in order}
            choices = Choices(stage_groups(recipes[n], pipeline, groups[n]) for n in order)
            for name in order:
                for seed in pipeline.seeds[:1] if recipes[name].once else pipeline.seeds:
                    built[name, seed] = _stage(
                        name, seed, recipes[name], pipeline, groups[name], users, choices, built, stages_dir
                    )
    finally:
        GlobalHydra.instance().hydra = outer
    return list(built.values())


def _stage(
    name: str,
    seed: int,
    recipe: Recipe,
    pipeline: PipelineConfig,
    groups: list[str],
    users: list[str],
    choices: Choices,
    built: dict[tuple[str, int], Stage],
    stages_dir: Path,
) -> Stage:
    values = {**recipe.set, "seed": seed}
    if recipe.start:
        values = merged(values, {"model": {"load_from": f"{{{recipe.start}}}/FINAL"}})
    values = _filled(values, seed, recipe, pipeline, built)
    line = stage_line(recipe, pipeline, groups, users, values)
    raw = composed(name, line, choices)
    digest = digest_of(raw, stages_dir)
    folder = stages_dir / f"{name}-{digest[:12]}"
    needed = inputs_of(recipe)
    needs = tuple(stage.folder for (other, s), stage in built.items() if other in needed and (s == seed or recipe.once))
    launcher = [sys.executable]
    accelerate = recipe.accelerate_config or pipeline.accelerate_config
    if accelerate and shares_devices(raw):
        launcher += ["-m", "accelerate.commands.launch", "--config_file", accelerate]
    paths = [f"exp_name=stages/{folder.name}", f"cache_dir={spelled(str(stages_dir.parent))}"]
    label = name if recipe.once or len(pipeline.seeds) == 1 else f"{name} seed {seed}"
    command = [*launcher, str(ROOT / "launch.py"), *line.words(), *paths]
    return Stage(label, name, seed, digest, folder, needs, command, raw)


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
    values: Any, seed: int, recipe: Recipe, pipeline: PipelineConfig, built: dict[tuple[str, int], Stage]
) -> Any:
    """Replace "{stage}" by its folder; in a stage that runs once, repeat an entry whose key says {seed}."""
    if isinstance(values, dict):
        result = {}
        for key, value in values.items():
            for s in pipeline.seeds if "{seed}" in key else [seed]:
                result[key.replace("{seed}", str(s))] = _filled(value, s, recipe, pipeline, built)
        return result
    if isinstance(values, list):
        return [_filled(value, seed, recipe, pipeline, built) for value in values]
    if not isinstance(values, str):
        return values
    if values == "{seed}":
        return seed
    return PLACEHOLDER.sub(lambda m: str(seed if m[1] == "seed" else built[m[1], seed].folder), values)
