"""Checkpoints to resume from: checkpoint-N/ with model, optimizer and trainer state, DONE written last.

A model that is whole on every rank is written by rank 0 and read back with `weights_only=True`: such a checkpoint runs
no code.
A sharded one is written by all ranks, each its part (torch.distributed.checkpoint, whose index is a pickle: resume only
from
folders of your own). Either can be read by another number of ranks, or by a run of the other kind.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from engine.sharding import is_sharded
from settings.artifacts import mark_done, remove_folder, replace_folder, write_json

Models = dict[str, torch.nn.Module]  # "model", and "reference" where it moves with the policy


def newest(run_dir: Path) -> Path | None:
    """Return the whole checkpoint with the highest step, or None."""
    whole = [p.parent for p in run_dir.glob("checkpoint-*/DONE")]
    return max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)


def save(
    run_dir: Path,
    step: int,
    models: Models,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    is_main: bool,
    keep_last: int,
) -> None:
    """Write checkpoint-{step}; all ranks call it."""
    part, whole = run_dir / f"checkpoint-{step}.tmp", run_dir / f"checkpoint-{step}"
    if is_main:
        for folder in (part, whole):
            remove_folder(folder)
        part.mkdir(parents=True)
    _wait()
    sharded = is_sharded(models["model"])
    options = StateDictOptions() if sharded else StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = {name: get_model_state_dict(model, options=options) for name, model in models.items()}
    tensors["optimizer"] = get_optimizer_state_dict(models["model"], optimizer, options=options)
    if sharded:
        dcp.save(tensors, checkpoint_id=part / "shards")
    if not is_main:
        return
    if not sharded:
        for name, values in tensors.items():
            torch.save(values, part / f"{name}.pt")
    write_json(part / "state.json", {"step": step, **state})
    mark_done(part)
    replace_folder(part, whole)
    if keep_last:
        older = sorted(run_dir.glob("checkpoint-*/DONE"), key=lambda p: int(p.parent.name.split("-")[1]))
        for done in older[:-keep_last]:
            remove_folder(done.parent)


def load(folder: Path, models: Models, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore models and optimizer in place and return the trainer's state; all ranks call it."""
    tensors: dict[str, Any]
    if (folder / "shards").is_dir():
        # The state dicts say what is wanted and in which layout; every rank reads its part into them.
        tensors = {name: get_model_state_dict(model) for name, model in models.items()}  # type: ignore[assignment]
        tensors["optimizer"] = get_optimizer_state_dict(models["model"], optimizer)
        dcp.load(tensors, checkpoint_id=folder / "shards")
        options = StateDictOptions()
    else:
        tensors = {
            name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
            for name in [*models, "optimizer"]
        }
        options = StateDictOptions(full_state_dict=True)
    for name, model in models.items():
        set_model_state_dict(model, tensors[name], options=options)
    set_optimizer_state_dict(models["model"], optimizer, tensors["optimizer"], options=options)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def remove_all(run_dir: Path) -> None:
    """Remove every checkpoint: the final model stands."""
    for folder in run_dir.glob("checkpoint-*"):
        remove_folder(folder)


def examples_seen(run_dir: Path) -> int:
    """Return how many examples the newest whole checkpoint has seen; 0 without one."""
    folder = newest(run_dir)
    return 0 if folder is None else int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["examples"])
