"""How a run steps: the optimizer, the learning rate over steps, the seed of a step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from settings.schema import RunConfig

UNREAD = 100  # gradient norms that wait on a device at most, where nothing else is read: a run logs, saves or evaluates


def optimizer_of(model: torch.nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the run names, over the parameters that are trained."""
    params = [p for p in model.parameters() if p.requires_grad]
    if run.optimizer in ("SGD", "RMSprop"):
        simple = torch.optim.SGD if run.optimizer == "SGD" else torch.optim.RMSprop
        return simple(params, lr=run.lr, weight_decay=run.weight_decay)
    cls = torch.optim.AdamW if run.optimizer == "AdamW" else torch.optim.Adam
    betas = run.betas[0], run.betas[1]
    return cls(params, lr=run.lr, betas=betas, eps=1e-8, weight_decay=run.weight_decay, fused=True)


def learning_rate_scale(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the factor on the peak rate at `step` (from 0): linear warm-up from 0, then cosine, linear or constant."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress) if schedule == "linear" else 1.0


def scheduled_steps(run: RunConfig, total: int, steps_per_batch: int = 1) -> int:
    """Return the steps of the schedule that a run of `total` steps is on: its own, or those of the longer run that it
    is a round of. ValueError where the round reaches beyond its end, or begins inside a batch of several steps.
    """
    length = run.schedule_steps or run.first_step + total
    if run.first_step + total > length:
        raise ValueError(
            f"first_step={run.first_step} and {total} steps reach beyond schedule_steps={length}: the rate would be 0 "
            "there. Raise schedule_steps"
        )
    if run.first_step % steps_per_batch:
        raise ValueError(
            f"first_step={run.first_step} is no multiple of {steps_per_batch}, the steps that the loss makes of a batch"
        )
    return length


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, rank), so that it needs no state in a checkpoint."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def check_finite(norms: Mapping[int, Tensor | float]) -> None:
    """Refuse gradient norms, by their step, of which one is no number; all are read from their device at once."""
    if not norms:
        return
    read = torch.stack([torch.as_tensor(norm) for norm in norms.values()]).tolist()
    bad = next(((step, norm) for step, norm in zip(norms, read, strict=True) if not math.isfinite(norm)), None)
    if bad is not None:
        raise ValueError(
            f"step {bad[0]}: the gradient norm is {bad[1]}; nothing was written since. Lower lr or check the data"
        )
