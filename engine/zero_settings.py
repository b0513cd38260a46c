"""DeepSpeed's settings as `accelerate launch` hands them on (ACCELERATE_DEEPSPEED_*): honored or refused."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PREFIX = "ACCELERATE_DEEPSPEED_"
# Honored without being asked: weights are always sent block by block, FINAL is always gathered.
ALWAYS = ("ZERO3_INIT", "ZERO3_SAVE_16BIT_MODEL")
UNSET = ("", "none")
AUTO = "auto"


def check_installed() -> None:
    """ValueError without DeepSpeed, which is an extra."""
    if find_spec("deepspeed") is None:
        raise ValueError(
            "strategy=deepspeed needs the package deepspeed, which is not installed: ./install.sh --deepspeed"
        )


def zero_section(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return DeepSpeed's zero_optimization section; ZeRO-3 where nothing was asked."""
    given = {
        key.removeprefix(PREFIX): value
        for key, value in environment.items()
        if key.startswith(PREFIX) and value.lower() not in UNSET
    }
    file = given.pop("CONFIG_FILE", None)
    stage = int(given.pop("ZERO_STAGE", "3"))
    section: dict[str, Any] = _from_file(Path(file)) if file else {"stage": stage}
    if section["stage"] not in (1, 2, 3):
        raise ValueError(
            f"deepspeed_config.zero_stage={section['stage']} shards nothing: use 1, 2 or 3, or strategy=ddp"
        )
    for part in ("optimizer", "param"):
        device = given.pop(f"OFFLOAD_{part.upper()}_DEVICE", None)
        if device is None:
            continue
        if device != "cpu":
            raise ValueError(f"deepspeed_config.offload_{part}_device={device} is not supported: use cpu or none")
        section[f"offload_{part}"] = {"device": "cpu", "pin_memory": False}
    if "offload_param" in section and section["stage"] != 3:
        raise ValueError("deepspeed_config.offload_param_device=cpu needs zero_stage 3")
    left = sorted(set(given) - set(ALWAYS))
    if left:
        raise ValueError(
            f"deepspeed_config.{left[0].lower()}={given[left[0]]} is not supported here: take it out of the file"
        )
    return section


def _from_file(file: Path) -> dict[str, Any]:
    """Return the zero_optimization section of a DeepSpeed JSON; whatever else it decides is the run's own config."""
    if not file.is_file():
        raise ValueError(f"deepspeed_config.deepspeed_config_file={file} is not there")
    content = json.loads(file.read_text(encoding="utf-8"))
    others = sorted(key for key, value in content.items() if key != "zero_optimization" and not _is_auto(value))
    if others:
        raise ValueError(
            f"{file} sets {others[0]}: batch, precision, clipping, optimizer and schedule are this run's own keys. "
            'Write "auto" there, or take it out'
        )
    section = {key: value for key, value in content.get("zero_optimization", {}).items() if value != AUTO}
    return {"stage": 3, **section}


def _is_auto(value: Any) -> bool:
    """Tell whether a value, and all within it, is left to the run."""
    return all(map(_is_auto, value.values())) if isinstance(value, dict) else value in (AUTO, None)
