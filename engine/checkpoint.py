"""Checkpoints to resume from: checkpoint-N/ with model, optimizer and trainer state, DONE written last.

A model that is whole on every rank is written by rank 0 and read back with `weights_only=True`: that runs no code.
A sharded one is written by all ranks, each its part (torch.distributed.checkpoint). Its index is a pickle: resume only
from folders of your own. Either can be read by another number of ranks, or by a run of the other kind.
state.json holds the size and digest of every file, and one of itself: what changed on the disk is not resumed from.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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

from settings.artifacts import is_done, mark_done, remove_folder, replace_folder, write_json

Models = Mapping[str, torch.nn.Module]  # "model", and "reference" where it moves with the policy
STATE = "state.json"


def whole_ones(run_dir: Path) -> list[Path]:
    """Return the whole checkpoints by step; a `part` is none, even if a kill came between its DONE and its renaming."""
    steps = {p: p.name.removeprefix("checkpoint-") for p in run_dir.glob("checkpoint-*") if is_done(p)}
    return sorted((p for p, step in steps.items() if step.isdigit()), key=lambda p: int(steps[p]))


def newest(run_dir: Path) -> Path | None:
    """Return the whole checkpoint with the highest step, or None."""
    return next(reversed(whole_ones(run_dir)), None)


def part(run_dir: Path, step: int) -> Path:
    """Return the folder that becomes checkpoint-{step} when it is whole; it has one name, as all ranks write there."""
    return run_dir / f"checkpoint-{step}.tmp"


def open_folder(run_dir: Path, step: int) -> None:
    """Make `part`, and remove what an earlier run left of this step; one rank calls it."""
    for folder in (part(run_dir, step), run_dir / f"checkpoint-{step}"):
        remove_folder(folder)
    part(run_dir, step).mkdir(parents=True)


def close_folder(run_dir: Path, step: int, state: dict[str, Any], keep_last: int) -> None:
    """Write the trainer's state and DONE, give the folder its name, remove older ones; one rank calls it."""
    unfinished = part(run_dir, step)
    whole = {"step": step, **state, "files": _digests(unfinished, _files(unfinished))}
    write_json(unfinished / STATE, {**whole, "digest": _digest_of(whole)}, indent=None)
    mark_done(unfinished)
    replace_folder(unfinished, run_dir / f"checkpoint-{step}")
    for folder in whole_ones(run_dir)[:-keep_last] if keep_last else ():
        remove_folder(folder)


def state_of(folder: Path) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint; ValueError where it is not as it was written."""
    file = folder / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {way_out(folder)}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{file} is no state of a checkpoint: {str(state)[:80]!r}. {way_out(folder)}")
    found = state.pop("digest", None)
    if found is None and "files" not in state:
        print(f"{file} is of a version without digests: that its files are as they were written is not checked")
    elif found != _digest_of(state):
        raise ValueError(f"{file} is not as it was written: its digest is {found}. {way_out(folder)}")
    return state


def damage(folder: Path, state: Mapping[str, Any], rank: int = 0, world_size: int = 1) -> list[str]:
    """Return a sentence for each file of a checkpoint that is not as it was written; a rank looks at its share."""
    wanted: Mapping[str, list[Any]] = state.get("files", {})
    own = sorted(wanted)[rank::world_size]
    found = _digests(folder, [name for name in own if (folder / name).is_file()])
    return [
        f"{folder / name} is not as it was written ({_told(wanted[name])} then, {_told(found.get(name))} now)"
        for name in own
        if found.get(name) != wanted[name]
    ]


def way_out(folder: Path) -> str:
    """Say what to do about a checkpoint that cannot be used."""
    earlier = [other.name for other in whole_ones(folder.parent) if other != folder]
    then = f"goes on from {earlier[-1]}" if earlier else "begins anew"
    return f"Remove {folder}: the same command then {then}"


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != STATE)


def _digests(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """Return [bytes, digest] of files, several of them read at once."""

    def one(name: str) -> list[Any]:
        with (folder / name).open("rb") as file:
            return [(folder / name).stat().st_size, hashlib.file_digest(file, "blake2b").hexdigest()[:32]]

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _digest_of(state: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in state.items() if key != "digest"}, sort_keys=True)
    return hashlib.blake2b(text.encode()).hexdigest()[:32]


def _told(file: list[Any] | None) -> str:
    return f"{file[0]:,} bytes, digest {file[1][:8]}" if file else "not there"


# ---- tensors


def write_whole(folder: Path, models: Models, optimizer: torch.optim.Optimizer, is_main: bool) -> None:
    """Write models and optimizer as rank 0 holds them, one file each."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = {name: get_model_state_dict(model, options=options) for name, model in models.items()}
    tensors["optimizer"] = get_optimizer_state_dict(models["model"], optimizer, options=options)
    if is_main:
        for name, values in tensors.items():
            torch.save(values, folder / f"{name}.pt")


def write_shards(folder: Path, models: Models, optimizer: torch.optim.Optimizer) -> None:
    """Write models and optimizer, every rank its part."""
    dcp.save(_wanted(models, optimizer), checkpoint_id=folder / "shards")


def read_tensors(folder: Path, models: Models, optimizer: torch.optim.Optimizer) -> None:
    """Restore models and optimizer in place, whole files or shards; all ranks call it.

    ValueError for a checkpoint that another engine wrote (ZeRO's own format).
    """
    tensors: dict[str, Any]
    options = StateDictOptions()
    if (folder / "shards").is_dir():
        # The state dicts say what is wanted and in which layout; every rank reads its part into them.
        tensors = _wanted(models, optimizer)
        dcp.load(tensors, checkpoint_id=folder / "shards")
    elif (folder / "model.pt").is_file():
        tensors = {
            name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
            for name in [*models, "optimizer"]
        }
        options = StateDictOptions(full_state_dict=True)
    else:
        raise ValueError(
            f"{folder} was written by DeepSpeed: go on with strategy=deepspeed, or choose another exp_name"
        )
    for name, model in models.items():
        set_model_state_dict(model, tensors[name], options=options)
    if tensors["optimizer"]["state"]:  # plain SGD has none, and torch does not take an empty one
        set_optimizer_state_dict(models["model"], optimizer, tensors["optimizer"], options=options)


def _wanted(models: Models, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    tensors: dict[str, Any] = {name: get_model_state_dict(model) for name, model in models.items()}
    tensors["optimizer"] = get_optimizer_state_dict(models["model"], optimizer)
    return tensors


# ---- housekeeping


def remove_all(run_dir: Path) -> None:
    """Remove every checkpoint: the final model stands."""
    for folder in run_dir.glob("checkpoint-*"):
        remove_folder(folder)


def examples_seen(run_dir: Path) -> int:
    """Return how many examples the newest whole checkpoint has seen; 0 without one."""
    folder = newest(run_dir)
    return 0 if folder is None else int(state_of(folder)["examples"])
