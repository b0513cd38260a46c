"""model.compile: torch.compile on the decoder's blocks, one by one and in place, so that parameters keep their names.

Embeddings, head and hooks stay as they are; blocks of one shape share one compiled graph.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from settings.schema import ModelConfig, require


def check_compiler(config: ModelConfig, device: torch.device) -> None:
    """Raise ValueError if model.compile is asked for and what torch.compile builds its kernels with is not there."""
    if not config.compile:
        return
    on_cpu = device.type == "cpu"
    variable, usual = ("CXX", ["g++"]) if on_cpu else ("CC", ["gcc", "clang"])
    wanted = [os.environ[variable]] if os.environ.get(variable) else usual
    require(
        any(shutil.which(name) for name in wanted),
        f"model.compile=true needs a {'C++' if on_cpu else 'C'} compiler on {device.type}, and {' or '.join(wanted)} "
        "is not found: install one, "
        f"name yours in the environment variable {variable}, or leave model.compile=false",
    )
    headers = Path(sysconfig.get_paths()["include"])
    require(
        (headers / "Python.h").is_file(),
        f"model.compile=true needs Python's headers, and there is no Python.h in {headers}: install them "
        "(python3-dev), or leave model.compile=false",
    )


def compile_blocks(model: torch.nn.Module, config: ModelConfig) -> None:
    """Compile every block in place if model.compile says so: after LoRA, before it is sharded or wrapped."""
    if config.compile:
        for block in blocks_of(model, config.block_class):
            block.compile()


def blocks_of(model: torch.nn.Module, class_name: str | None = None) -> list[torch.nn.Module]:
    """Return the modules that are sharded (or compiled) one by one: the decoder's blocks, as the model names them, or
    `class_name`.

    ValueError if the model has none of them.
    """
    named = {class_name} if class_name else set(getattr(model, "_no_split_modules", None) or [])
    found = [module for module in model.modules() if type(module).__name__ in named]
    if not found:
        layers = sorted(
            {type(m).__name__ for parent in model.modules() if isinstance(parent, torch.nn.ModuleList) for m in parent}
        )
        raise ValueError(
            f"no block to shard or compile: {sorted(named) or 'the model names none'} is not in it. Set "
            f"model.block_class to one of {layers}"
        )
    return found
