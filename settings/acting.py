"""Keys of a loss that are read only beside another one's value: one that was changed in vain is refused."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from settings.help import values_of
from settings.paths import CONFIG
from settings.typed import require


class ReadBeside(NamedTuple):
    """Keys that nobody reads unless `other`, where a loss has it, has this value."""

    keys: tuple[str, ...]
    other: str
    value: Any


RULES = (
    ReadBeside(("kl_weight", "kl_reference", "target_temperature", "rest_advantage"), "objective", "regularized"),
    ReadBeside(("log_epsilon_P", "log_epsilon_R"), "humanline", True),
    ReadBeside(("alpha",), "divergence", "alpha"),
    ReadBeside(("alpha",), "variant", 2),
    ReadBeside(("label_smoothing",), "preference", "sigmoid"),
    ReadBeside(("std_epsilon",), "scale", "std"),
    ReadBeside(("beta", "humanline"), "form", "shaped"),
    ReadBeside(("value_temperature",), "value", "lse"),
    ReadBeside(("hybrid_beta",), "span_loss", "gold"),
    ReadBeside(("min_coverage",), "alignment", "bytes"),
)


def check_acting(loss: Mapping[str, Any]) -> None:
    """Raise ValueError for a key of a loss of ours that differs from its YAML's value and that nobody would read."""
    defaults = _defaults(CONFIG / "loss" / f"{loss['name']}.yaml")
    if defaults.get("trainer") != loss["trainer"]:
        return
    for keys, other, value in RULES:
        if other not in defaults or loss.get(other) == value:
            continue
        for key in keys:
            require(
                key not in defaults or loss.get(key) == defaults[key],
                f"loss.{key}={loss.get(key)} is read with loss.{other}={_said(value)} alone, and this is "
                f"loss.{other}={_said(loss.get(other))}: set that, or leave loss.{key} out",
            )


@cache
def _defaults(file: Path) -> dict[str, Any]:
    return values_of(file) if file.is_file() else {}


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
