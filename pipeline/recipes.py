"""The recipes of a pipeline: what the `pipeline` group says of its stages, typed and checked, and who needs whom.

A recipe becomes a stage for each seed in plan.py.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.composing import merged
from settings.schema import require, typed
from settings.typed import check_name, nearest

PLACEHOLDER = re.compile(r"\{(\w+)\}")
RESERVED = ("seed", "cell", "knobs")  # placeholders that name no stage; the last two are of a grid (grid.py)


@dataclass(frozen=True)
class Recipe:
    """One entry of `stages`. `set` is laid over the stage's config; "{other}" in it is the folder of another stage,
    "{seed}" the seed.
    """

    task: str = "train"
    loss: str | None = None  # config group
    model: str = "student"  # role: teacher | student
    start: str | None = None  # stage whose FINAL folder this one starts from
    data: str | None = None  # entry of `data`
    set: dict[str, Any] = field(default_factory=dict)
    accelerate_config: str | None = None
    once: bool = False  # one instance for all seeds


@dataclass(frozen=True)
class PipelineConfig:
    """The `pipeline` group."""

    name: str
    teacher: str
    student: str
    stages: dict[str, Any]
    parallel: int = 1
    warm_start: bool = True  # stages share one import of torch where no GPU is (warm.py)
    seeds: list[int] = field(default_factory=lambda: [1])
    set: dict[str, Any] = field(default_factory=dict)
    teacher_set: dict[str, Any] = field(default_factory=dict)
    student_set: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    accelerate_config: str | None = None
    refresh: list[str] = field(default_factory=list)  # stages that train in rounds (refresh.py)
    refresh_every: int | None = None  # steps of a round; null: no stage does
    grid: dict[str, Any] = field(default_factory=dict)  # knobs with their values: a cell for each combination (grid.py)

    def __post_init__(self) -> None:
        check_name("pipeline.name", self.name)
        for stage in self.stages:
            require(
                re.fullmatch(r"\w+", str(stage)) is not None,
                f"pipeline.stages: a stage is called {str(stage)!r}: name it by letters, digits and _, "
                'so that "{name}" can stand for its folder',
            )
            require(
                stage not in RESERVED, f"pipeline.stages.{stage}: {{{stage}}} means something else; rename the stage"
            )
        every = self.refresh_every
        require(every is None or every >= 1, f"pipeline.refresh_every={every} must be at least 1 step (or null)")
        require(self.parallel >= 1, f"pipeline.parallel={self.parallel} must be at least 1")
        distinct = len(set(self.seeds)) == len(self.seeds) > 0
        require(distinct, f"pipeline.seeds={self.seeds} must be one or more different numbers")


def flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("a.b.c", value) for every leaf; a mapping in the loss section is a value, as its method reads it."""
    for key, value in section.items():
        if isinstance(value, dict) and prefix != "loss.":
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def with_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """Return a nested value with every text changed."""
    if isinstance(value, dict):
        return {key: with_texts(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_texts(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


def mentioned(value: Any) -> list[str]:
    """Return the stage names in the placeholders of a value."""
    if isinstance(value, list):
        return [name for item in value for name in mentioned(item)]
    if isinstance(value, dict):
        return mentioned(list(value.values()))
    return [name for name in PLACEHOLDER.findall(value) if name not in RESERVED] if isinstance(value, str) else []


def recipes_of(config: PipelineConfig) -> dict[str, Recipe]:
    """Type the stages that are not switched off (null); models of switched-off stages leave the evaluation."""
    recipes: dict[str, Recipe] = {}
    for name, section in config.stages.items():
        if section is None:
            continue
        recipe = typed(section, Recipe, f"pipeline.stages.{name}.")
        require(
            recipe.model in ("teacher", "student"), f"pipeline.stages.{name}.model={recipe.model!r}: teacher or student"
        )
        data = config.data.get(recipe.data, {}) if recipe.data else {}
        values = merged(config.set, (data or {}).get("set", {}), getattr(config, f"{recipe.model}_set"), recipe.set)
        if "evaluation" in values:
            values["evaluation"] = _evaluated(
                values["evaluation"], {n for n, other in config.stages.items() if other is None}
            )
        recipes[name] = replace(recipe, set=values)
    return recipes


def _evaluated(section: dict[str, Any], off: set[str]) -> dict[str, Any]:
    """Return the evaluation section without what names a stage that is switched off."""
    names = {k: v for k, v in section.get("models", {}).items() if v and not off.intersection(mentioned(v))}
    references = {k: v for k, v in section.get("reference", {}).items() if k in names and v}
    found = {**section, "models": names, "reference": references}
    if "comparisons" in section:
        found["comparisons"] = [pair for pair in section["comparisons"] if not off.intersection(pair)]
    return found


def inputs_of(recipe: Recipe) -> list[str]:
    """Return the names of the stages whose output a recipe reads."""
    names = [recipe.start] if recipe.start else []
    names += [name for _, value in flat(recipe.set) for name in mentioned(value)]
    return list(dict.fromkeys(names))


def known_inputs_of(name: str, recipes: dict[str, Recipe]) -> list[str]:
    """Return the names of the stages that a stage reads; ValueError for one that is not there."""
    inputs = inputs_of(recipes[name])
    for other in inputs:
        if other not in recipes:
            raise ValueError(
                f"pipeline.stages.{name} needs stage {other!r}, which is not there.{nearest(other, list(recipes))}"
            )
    return inputs


def in_order(recipes: dict[str, Recipe]) -> list[str]:
    """Return the names such that each stands after what it needs, else as written."""
    for name in recipes:
        known_inputs_of(name, recipes)
    placed: list[str] = []
    while len(placed) < len(recipes):
        ready = [n for n in recipes if n not in placed and all(o in placed for o in inputs_of(recipes[n]))]
        if not ready:
            raise ValueError(
                f"pipeline.stages need each other in a circle: {', '.join(n for n in recipes if n not in placed)}"
            )
        placed.append(ready[0])
    return placed


def check_lineage(recipes: dict[str, Recipe]) -> None:
    """Refuse an advantage whose reference teacher is not what the aligned teacher started from."""
    for name, recipe in recipes.items():
        reference = recipe.set.get("cache", {}).get("reference")
        if reference is None:
            continue
        key = f"pipeline.stages.{name}.set.cache.reference={reference}"
        aligned = recipe.start
        if aligned is None:
            raise ValueError(f"{key}: the stage has no `start`, so there is no aligned teacher to compare with")
        origin, model = recipes[aligned].start, recipes[aligned].set.get("model", {})
        # Without a stage before it, it started from the weights that its model names.
        wanted = f"{{{origin}}}/FINAL" if origin else model.get("load_from") or model.get("name_or_path")
        if wanted is None:
            raise ValueError(
                f"{key}: the aligned teacher {aligned!r} starts from no stage. Name its weights in "
                "pipeline.teacher_set.model.name_or_path, and the same here"
            )
        if reference != wanted:
            raise ValueError(
                f"{key} is not what the aligned teacher {aligned!r} started from ({origin or wanted!r}): "
                f"log pi_dpo - log pi_ref would not be its advantage. Write {wanted}"
            )
