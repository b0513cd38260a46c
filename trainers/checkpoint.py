"""Checkpoints to resume from: checkpoint-N/ with model, optimizer and trainer state, DONE written last.

State dicts are gathered to rank 0 whatever the strategy, so another number of ranks can resume. Read back with
`weights_only=True`: a checkpoint runs no code.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def newest(run_dir: Path) -> Path | None:
    """Return the whole checkpoint with the highest step, or None."""
    whole = [p.parent for p in run_dir.glob("checkpoint-*/DONE")]
    return max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)


def save(
    run_dir: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
    reference: torch.nn.Module | None, state: dict[str, Any], is_main: bool, keep_last: int,
) -> None:  # fmt: skip
    """Write checkpoint-{step}; all ranks call it, rank 0 writes. A reference is given where it moves with the policy."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    reference_weights = None if reference is None else get_model_state_dict(reference, options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    if not is_main:
        return
    part, whole = run_dir / f"checkpoint-{step}.tmp", run_dir / f"checkpoint-{step}"
    for folder in (part, whole):
        shutil.rmtree(folder, ignore_errors=True)
    part.mkdir(parents=True)
    torch.save(weights, part / "model.pt")
    torch.save(moments, part / "optimizer.pt")
    if reference_weights is not None:
        torch.save(reference_weights, part / "reference.pt")
    (part / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    (part / "DONE").touch()
    part.rename(whole)
    if keep_last:
        older = sorted(run_dir.glob("checkpoint-*/DONE"), key=lambda p: int(p.parent.name.split("-")[1]))
        for done in older[:-keep_last]:
            done.unlink()  # no longer whole, whatever happens to the rest
            shutil.rmtree(done.parent, ignore_errors=True)


def load(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, reference: torch.nn.Module | None
) -> dict[str, Any]:
    """Restore model, optimizer and (where it moves) reference in place and return the trainer's state."""
    options = StateDictOptions(full_state_dict=True)
    weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, moments, options=options)
    if reference is not None:
        moved = torch.load(folder / "reference.pt", map_location="cpu", weights_only=True)
        set_model_state_dict(reference, moved, options=options)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def remove_all(run_dir: Path) -> None:
    """Remove every checkpoint: the final model stands."""
    for folder in run_dir.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
