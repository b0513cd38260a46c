"""How a run is laid out: the strategy that runs against the one asked for, the optimizer, the learning rate over
steps.
"""

import math
import os

import torch
from accelerate import Accelerator

from engine.sharding import is_ours
from settings.schema import RunConfig


def optimizer_of(model: torch.nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the run names, over the parameters that are trained."""
    params = [p for p in model.parameters() if p.requires_grad]
    if run.optimizer in ("SGD", "RMSprop"):
        simple = torch.optim.SGD if run.optimizer == "SGD" else torch.optim.RMSprop
        return simple(params, lr=run.lr, weight_decay=run.weight_decay)
    cls = torch.optim.AdamW if run.optimizer == "AdamW" else torch.optim.Adam
    return cls(params, lr=run.lr, betas=(run.betas[0], run.betas[1]), eps=1e-8, weight_decay=run.weight_decay)


def learning_rate_scale(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the factor on the peak rate at `step` (from 0): linear warm-up from 0, then cosine, linear or constant."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress) if schedule == "linear" else 1.0


def check_strategy(asked: str, accelerator: Accelerator) -> str:
    """Return the strategy that runs; raise ValueError if another one was asked for (accelerate drops FSDP on CPU)."""
    kind = accelerator.distributed_type.value
    running = {"NO": "none", "FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(kind, "ddp")
    if is_ours(asked, accelerator):
        running = "fsdp"  # trainers/sharding.py
    asks_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    wanted = "fsdp" if asked == "auto" and asks_fsdp else asked
    if wanted not in ("auto", running):
        raise ValueError(
            f"strategy {wanted!r} was asked for, {running!r} is running ({accelerator.num_processes} processes on "
            f"{accelerator.device.type}). accelerate runs FSDP on GPUs only; anywhere, `torchrun --nproc_per_node N "
            "launch.py "
            "strategy=fsdp ...` shards by itself"
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != accelerator.num_processes:
        raise ValueError(
            f"{world_size} processes were started but each runs alone and would write the same folder. On CPU start "
            "with "
            "torchrun --nproc_per_node N launch.py ..., not `use_cpu: true`"
        )
    return running


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, rank), so that it needs no state in a checkpoint."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)
