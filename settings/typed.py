"""From a plain section of the configuration to a flat frozen dataclass, and the words for what is wrong with it."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Annotated, Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")

# Types of keys whose content counts in a stage's digest (pipeline/digests.py), not the words they are written in.
Place = Annotated[str, "a file or a folder; where none is here, a name of the hub"]
Places = Annotated[Any, "a Place, or a list or a mapping of them"]
Code = Annotated[str, "module:function"]

# Spellings of neighboring projects, with ours beside them.
OTHER_SPELLINGS = {
    "train_datasets": "datasets=[NAME]",
    "test_datasets": "datasets.NAME.test=PATH",
    "config": "the key itself, without `config.`",
    "loss_fn": "loss=NAME",
    "learning_rate": "lr",
    "num_train_epochs": "n_epochs",
    "per_device_train_batch_size": "model.batch_size (global, in examples)",
    "output_dir": "cache_dir and exp_name",
}


def nearest(name: str, known: list[str], where: str = "") -> str:
    """Return ' Did you mean ...?' for the closest of the known names, or the list of them; `where` stands before both.

    Case does not matter, and neighboring letters that changed places win over any other likeness.
    """
    if name in OTHER_SPELLINGS:
        return f" Here it is spelled: {OTHER_SPELLINGS[name]}."
    spelled = {other.lower(): other for other in known}
    low = name.lower()
    swapped = [low[:i] + low[i + 1] + low[i] + low[i + 2 :] for i in range(len(low) - 1)]
    sure = [word for word in (low, *swapped) if word in spelled]
    close = sure[:1] or difflib.get_close_matches(low, list(spelled), n=1, cutoff=0.55)
    return f" Did you mean {where + spelled[close[0]]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def check_keys(given: Iterable[Any], known: list[str], where: str = "") -> None:
    """Refuse the first key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {where + str(key)!r}.{nearest(str(key), known, where)}")


def typed(section: Mapping[str, Any], cls: type[T], where: str = "") -> T:
    """Build the frozen dataclass `cls` from a plain mapping.

    Raises ValueError for an unknown key (the nearest one is named), a missing one, or a value of another type.
    """
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    check_keys(section, known, where)
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.name not in section and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]} has no value: set it in the YAML or on the command line")
    try:
        merged = OmegaConf.merge(_structured(cls), dict(section))  # type: ignore[arg-type]
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (ConfigKeyError, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None) or "?"
        if isinstance(error, MissingMandatoryValue):
            raise ValueError(f"{where}{key} has no value: set it in the YAML or on the command line") from error
        seen = section.get(str(key).split(".")[0])
        detail = str(error).splitlines()[0]
        shown = "" if repr(seen) in detail else f" (value seen: {seen!r})"
        raise ValueError(f"{where}{key}: {detail}{shown}") from error


@cache
def _structured(cls: Any) -> Any:
    return OmegaConf.structured(cls)  # merge copies it


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_name(key: str, name: str, levels: bool = False) -> None:
    """Refuse a name that would leave its folder, or that nobody can read; with `levels`, it may say folders in it."""
    parts = name.split("/") if levels else [name]
    fits = all(part not in ("", ".", "..") and "/" not in part and "\\" not in part for part in parts)
    require(
        fits and name.isprintable() and not name.startswith("~") and max(len(part.encode()) for part in parts) <= 240,
        f"{key}={name!r} must be a name{' (a/b is one in a folder of its own)' if levels else ''} of printable "
        f"characters: no {'/ at its ends' if levels else '/'}, no . or .., at most 240 bytes. Where it lies is said by "
        "cache_dir",
    )


def check_seed(key: str, seed: int) -> None:
    """Refuse a seed from which a generator cannot be set: those of steps and responses are some 10^9 times as large."""
    require(0 <= seed < 2**32, f"{key}={seed} must be at least 0 and below 2^32")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    require(value in choices, f"{key}={value!r} is not known; choose one of {', '.join(choices)}")
