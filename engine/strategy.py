"""Which placement runs: what `strategy=` asks for against how the processes were started."""

import os

from engine.placement import Placement, Replicated
from engine.processes import Processes
from engine.sharding import Sharded
from settings.schema import ModelConfig


def placement_of(asked: str, config: ModelConfig, processes: Processes) -> Placement:
    """Return the placement that `strategy=` asks for; auto takes what the launcher's file says, else DDP or nothing.

    Raises ValueError where another one would run than was asked for.
    """
    launched = launched_for()
    several = processes.world_size > 1
    wanted = asked if asked != "auto" else launched or ("ddp" if several else "none")
    how = f"strategy={asked}: {processes.world_size} process(es)"
    if launched and wanted != launched:
        raise ValueError(
            f"{how}, started by an accelerate file for {launched}: leave strategy=auto, or take another file"
        )
    if wanted != "none" and not several:
        raise ValueError(f"{how}, and {wanted} needs several: start with torchrun --nproc_per_node N launch.py ...")
    if wanted == "none" and several:
        raise ValueError(f"{how}: strategy=none runs one; choose ddp, fsdp or auto")
    if wanted == "deepspeed":
        from engine.zero import ZeRO  # which needs an extra

        return ZeRO(processes, config)
    return (Sharded if wanted == "fsdp" else Replicated)(processes, config)


def launched_for() -> str | None:
    """Return the strategy of the accelerate file by which the processes were started; None without one, or for DDP."""
    for name, variable in (("fsdp", "ACCELERATE_USE_FSDP"), ("deepspeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            return name
    return None
