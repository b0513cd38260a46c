"""Rounds: a stage that learns from what its model says gets it made anew every so many steps (pipeline.refresh).

A stage X of N steps becomes X_r1, X_r2, ... of `every` steps each (the last one of what is left). Round 1 reads what is
there: the responses of the model that X starts from. Round k starts from round k - 1, and every stage between that
model and X (generate, cache, label, select) is made again from it as X_rk_STAGE. Who needs X gets the last round. All
of them are ordinary stages: digests, skipping, resuming and dry_run work as for others.

Round k is steps (k - 1) `every` to k `every` of one run of N steps: the order of the examples, the learning rate with
its one warm-up, and the seeds of dropout go on (first_step, schedule_steps in config.yaml). The optimizer's state does
not: a round begins with fresh moments. A reference model, where the loss has one, is the model that the round starts
from.
"""

from dataclasses import replace
from typing import Any

from pipeline.composing import merged
from pipeline.recipes import PLACEHOLDER, Recipe, inputs_of, with_texts
from settings.typed import nearest

MAX_ROUNDS = 1000  # more is a slip of the keyboard: every round is a folder with a model


def refreshed(recipes: dict[str, Recipe], stages: list[str], every: int, overrides: list[str]) -> dict[str, Recipe]:
    """Unroll `stages` into rounds of `every` steps; ValueError where there is nothing to make anew."""
    if not stages:
        able = [name for name in recipes if made_anew(recipes, name)]
        raise ValueError(
            f"pipeline.refresh_every={every} needs pipeline.refresh=[STAGE]. Stages that learn from responses of the "
            f"model they start from: {', '.join(able) or 'none of this pipeline'}"
        )
    for override in overrides:
        if override.lstrip("+~").split("=", 1)[0] in ("n_steps", "first_step", "schedule_steps"):
            raise ValueError(
                f"{override}: with pipeline.refresh_every={every} every round has its own; write "
                f"++pipeline.stages.{stages[0]}.set.n_steps=... for the steps of all rounds together"
            )
    for name in stages:
        recipes = unrolled(recipes, name, every)
    return recipes


def made_anew(recipes: dict[str, Recipe], name: str) -> list[str]:
    """Return the stages between the model that a stage starts from and the stage, which its responses go through."""
    start = recipes[name].start
    if recipes[name].task != "train" or start is None:
        return []
    found: dict[str, bool] = {}

    def comes_from_it(other: str) -> bool:
        if other not in found:
            recipe = recipes.get(other)
            found[other] = False  # of a circle, which in_order refuses
            if recipe is not None and other != start:
                samples = recipe.task == "generate" and recipe.start == start
                needed = [comes_from_it(needed) for needed in inputs_of(recipe)]
                found[other] = samples or any(needed)
        return found[other]

    for other in inputs_of(recipes[name]):
        comes_from_it(other)
    return [other for other in recipes if found.get(other)]


def unrolled(recipes: dict[str, Recipe], name: str, every: int) -> dict[str, Recipe]:
    """Return the recipes with one stage as rounds; one round alone leaves them as they are."""
    steps, between = checked(recipes, name, every)
    rounds = -(-steps // every)
    if rounds == 1:
        return recipes
    stage, last = recipes[name], f"{name}_r{rounds}"
    result: dict[str, Recipe] = {}
    for other, recipe in recipes.items():
        if other != name:
            result[other] = renamed(recipe, {name: last})
            continue
        names: dict[str, str] = {}
        for number in range(1, rounds + 1):
            if number > 1:
                names = {old: f"{name}_r{number}_{old}" for old in between}
                names[str(stage.start)] = f"{name}_r{number - 1}"
                result |= {names[old]: again(recipes[old], names, str(stage.start)) for old in between}
            first = (number - 1) * every
            own = {"n_steps": min(every, steps - first), "first_step": first, "schedule_steps": steps}
            one = again(stage, names, str(stage.start))
            result[f"{name}_r{number}"] = replace(one, set=merged(one.set, own))
    return result


def checked(recipes: dict[str, Recipe], name: str, every: int) -> tuple[int, list[str]]:
    """Return the steps of a stage and what is made anew for it; ValueError says what is missing."""
    key = f"pipeline.refresh=[{name}]"
    if name not in recipes:
        raise ValueError(f"{key}: there is no such stage.{nearest(name, list(recipes))}")
    recipe, between = recipes[name], made_anew(recipes, name)
    if not between:
        reads = ", ".join(inputs_of(recipe)) or "none"
        raise ValueError(
            f"{key}: the stage reads no responses of the model that it starts from (start: {recipe.start}; it needs: "
            f"{reads}), so there is nothing to make anew. Add a stage with task: generate and start: {recipe.start}, "
            "score its generations.jsonl with task: cache (or label), and name both in the stage's `set`, as "
            "config/pipeline/adpa_plus.yaml does; without rounds leave pipeline.refresh_every=null"
        )
    steps = recipe.set.get("n_steps")
    if not isinstance(steps, int):
        raise ValueError(
            f"{key}: how many steps its rounds have together must be known before it runs: set "
            f"++pipeline.stages.{name}.set.n_steps=... (n_epochs alone does not say)"
        )
    if -(-steps // every) > MAX_ROUNDS:
        raise ValueError(f"{key}: n_steps={steps} in rounds of {every} are more than {MAX_ROUNDS} rounds: raise it")
    return steps, between


def again(recipe: Recipe, names: dict[str, str], start: str) -> Recipe:
    """Return a recipe for a later round: other inputs, and the model of the round before where it used `start`.

    A folder of the first model that its `set` names (a reference, say) stays that model's.
    """
    kept = {old: new for old, new in names.items() if old != start}
    moved = names.get(start, start) if recipe.start == start else recipe.start
    return replace(renamed(recipe, kept), start=moved)


def renamed(recipe: Recipe, names: dict[str, str]) -> Recipe:
    """Return a recipe that reads other stages in the place of those named."""
    start = names.get(recipe.start, recipe.start) if recipe.start else None
    return replace(recipe, start=start, set=_replaced(recipe.set, names))


def _replaced(value: Any, names: dict[str, str]) -> Any:
    def changed(text: str) -> str:
        return PLACEHOLDER.sub(lambda match: f"{{{names.get(match[1], match[1])}}}", text)

    return with_texts(value, changed)
