"""A stage's config, composed as launch.py will compose it from the stage's command line, and checked.

Hydra takes 0.2 s to compose, and the stages of a pipeline share their choices of groups. So each choice is composed
once, several of them together, and a stage's values are laid over what its choices give.
"""

import copy
import re
from collections.abc import Iterable
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from settings.schema import require, settings_from

Config = dict[str, Any]


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Lay nested mappings over one another, the later ones on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def spelled(value: Any) -> str:
    """Write a value in the grammar of Hydra's command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(spelled(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {spelled(v)}' for key, v in value.items())}}}"
    if not isinstance(value, str):
        return repr(value)
    plain = re.fullmatch(r"[A-Za-z_./][\w./:@-]*", value) and value.lower() not in (
        "null",
        "true",
        "false",
        "nan",
        "inf",
    )
    return value if plain else "'" + value.replace("'", "\\'") + "'"


class Line(NamedTuple):
    """A stage's command line without exp_name: groups, the values of its recipe, then what the user typed."""

    task: str
    groups: tuple[str, ...]
    values: tuple[tuple[str, Any], ...]
    users: tuple[str, ...]

    def words(self) -> list[str]:
        """Write it out."""
        # Without ++ Hydra names an unknown key of a loss before anything runs.
        own = [f"{'' if key.startswith('loss.') else '++'}{key}={spelled(value)}" for key, value in self.values]
        return [f"task={self.task}", *self.groups, *own, *self.users]


# ---- groups


class Choices:
    """What choices of groups (loss=dpo, model=tiny, datasets=[local]) give: each gives its own section."""

    def __init__(self, lines: Iterable[tuple[str, ...]]) -> None:
        choices = dict.fromkeys(choice for line in lines for choice in line)
        by_group: dict[str, list[str]] = {}
        for choice in choices:
            by_group.setdefault(_group(choice), []).append(choice)
        self.base = composed_by_hydra([])
        self.sections: Config = {}
        for together in zip_longest(*by_group.values()):
            self._learn([choice for choice in together if choice is not None])

    def _learn(self, together: list[str]) -> None:
        try:
            config = composed_by_hydra(together)
        except HydraException:  # said where the stage is known
            return
        own = {_group(choice) for choice in together}
        if {k: v for k, v in config.items() if k not in own} == {k: v for k, v in self.base.items() if k not in own}:
            self.sections |= {choice: config[_group(choice)] for choice in together}

    def config(self, line: tuple[str, ...]) -> Config:
        """Return the config of a line of choices; one that reaches beyond its section is composed by Hydra."""
        if not all(choice in self.sections for choice in line):
            return composed_by_hydra(list(line))
        return self.base | {_group(choice): self.sections[choice] for choice in line}


def _group(choice: str) -> str:
    return choice.partition("=")[0]


def composed_by_hydra(overrides: list[str]) -> Config:
    """Compose the root config as launch.py does."""
    return copy.deepcopy(_composed_once(tuple(overrides)))


@cache
def _composed_once(overrides: tuple[str, ...]) -> Config:
    raw = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(raw, dict)
    plain = {str(key): value for key, value in raw.items()}
    return {**plain, "datasets": plain.get("datasets") or {}}


# ---- values


def composed(name: str, line: Line, choices: Choices) -> Config:
    """Compose a stage's config, and check all that can be checked before it runs."""
    try:
        config = laid_over(choices.config(line.groups), line)
        if config is None:
            config = composed_by_hydra(line.words())
    except HydraException as error:
        raise ValueError(f"stage {name}: {str(error).splitlines()[0]}") from error
    missing = [key for key, value in config["loss"].items() if value == "???"]
    require(not missing, f"pipeline.stages.{name} has no value for loss.{missing[0] if missing else ''}")
    try:
        settings_from(config)
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}") from error
    return config


def laid_over(config: Config, line: Line) -> Config | None:
    """Return a config with a line's values in it, as Hydra would; None for what only Hydra can do."""
    own = [Value(key, value, key.startswith("loss.")) for key, value in line.values]
    for key, value, must_exist in [Value("task", line.task), *own, *_typed_values(line.users)]:
        unknown = must_exist and not _has(config, key)
        if unknown or value is ONLY_HYDRA or (isinstance(value, str) and "${" in value):
            return None
        config = merged(config, _nested(key, value))
    return config


ONLY_HYDRA = object()  # in the place of a value: an override that adds or deletes


class Value(NamedTuple):
    """A value of a command line; without + and ++ its key has to be there."""

    key: str
    value: Any
    must_exist: bool = False


def _typed_values(users: tuple[str, ...]) -> list[Value]:
    """Read the overrides that a user typed."""
    found = []
    for override in OverridesParser.create().parse_overrides(list(users)) if users else []:
        special = override.is_add() or override.is_delete() or override.is_sweep_override() or override.package
        value = ONLY_HYDRA if special else override.value()
        found.append(Value(override.key_or_group, value, not override.is_force_add()))
    return found


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}
