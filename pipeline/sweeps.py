"""Sweeps: each job of `launch.py -m ...` gets a folder of its own, named by what varies.

A job of a launcher may be another process on another machine, which knows its own overrides only. So the keys that do
not vary travel in the place that Hydra has for them: exclude_keys of hydra.job.override_dirname.
"""

import hashlib
import os
import re

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode

from settings.paths import ROOT

MAX_NAME = 150  # characters; file systems end at 255 bytes
NAMING = ("exp_name", "run_count")
EXCLUDE = "hydra.job.config.override_dirname.exclude_keys"


def fixed_keys(arguments: list[str]) -> list[str] | None:
    """Return the keys on a sweep's command line that do not vary; None if the user names the jobs' folders.

    A folder is the user's where exp_name or run_count varies or refers to what does (exp_name='b${loss.beta}').
    """
    typed = [a for a in arguments if "=" in a and not a.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(typed)
    except HydraException:
        return None  # Hydra words it when it gets there
    if any(o.key_or_group == EXCLUDE for o in overrides):
        return None
    if any(o.key_or_group in NAMING and (o.is_sweep_override() or "${" in str(o.value())) for o in overrides):
        return None
    return [o.key_or_group for o in overrides if not o.is_sweep_override()]


def _check_once(arguments: list[str]) -> None:
    """Refuse a key that varies and is also given one value: the jobs would share a folder."""
    seen: dict[str, str] = {}
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            return  # Hydra words it when it gets there
        key = override.key_or_group
        first = seen.setdefault(key, argument)
        if first is not argument and (override.is_sweep_override() or is_swept(first)):
            raise ValueError(f"{key} stands twice on a sweep's command line, {first} and {argument}: leave one out")


def is_swept(argument: str) -> bool:
    """Tell whether an override has several values."""
    return OverridesParser.create().parse_override(argument).is_sweep_override()


def with_fixed_keys(arguments: list[str]) -> list[str]:
    """Return a sweep's command line with the keys that do not vary named for Hydra."""
    _check_once(arguments)
    fixed = fixed_keys(arguments)
    if fixed is None:
        return arguments
    # Beside another override: argparse takes them in one stretch only.
    place = next((i for i, a in enumerate(arguments) if "=" in a and not a.startswith("-")), len(arguments))
    named = f"{EXCLUDE}=[{','.join(repr(key) for key in [*fixed, EXCLUDE])}]"
    return [*arguments[:place], named, *arguments[place:]]


def as_sweep(arguments: list[str]) -> list[str]:
    """Make a sweep's command line ready for any launcher and return it; return any other line as it is."""
    if not {"-m", "--multirun"} & set(arguments):
        return arguments
    # Processes that Submitit starts on other machines find our modules by this.
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{known}" if known else str(ROOT)
    return with_fixed_keys(arguments)


def folder_name(varied: list[str]) -> str:
    """Return what varies (["++lr=1e-7", "loss=dpo"]) as one folder's name: no +, no path separators, not too long."""
    name = ",".join(sorted(override.lstrip("+~") for override in varied))
    short = re.sub(r"[^\w.,=+@-]+", "-", name)
    if len(short) <= MAX_NAME:
        return short
    return f"{short[:MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def job_folder() -> str | None:
    """Return the folder's name of this job of a sweep; None outside of one, or where the user names the folders."""
    config = HydraConfig.get()
    excluded = config.job.config.override_dirname.exclude_keys
    if config.mode != RunMode.MULTIRUN or EXCLUDE not in excluded:
        return None
    return folder_name([o for o in config.overrides.task if o.lstrip("+~").split("=", 1)[0] not in excluded]) or None
