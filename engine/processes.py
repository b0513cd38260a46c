"""The processes of a run: who this one is, and what all of them do together.

accelerate opens the process group (torchrun, `accelerate launch` and Slurm set the variables that it reads) and nothing
else: it wraps no model and prepares no optimizer. Every wait has a limit of hours: one rank may work alone for long.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

PATIENCE = timedelta(hours=12)  # of a rank that waits for another one; torch's own limit is 10 minutes with NCCL

Value = TypeVar("Value")


class Processes:
    """This process among the run's processes; made once, before anything else that asks torch.distributed.

    Raises ValueError if processes were started together and do not know of each other.
    """

    def __init__(self) -> None:
        # Without cpu=True accelerate starts every process of a CPU run on its own, unless a variable tells it
        # otherwise.
        on_cpu = not torch.accelerator.is_available()
        if on_cpu:  # DeepSpeed, which accelerate imports where it is installed, else prints that it wonders
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        self.rank, self.world_size = self.state.process_index, self.state.num_processes
        self.device: torch.device = self.state.device
        self.is_main = self.rank == 0
        self.is_local_main = self.state.is_local_main_process
        self.hosts: Any = None  # the group that sums numbers of the host; through NCCL they would wait for the device
        if self.world_size > 1 and self.device.type != "cpu":
            self.hosts = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.world_size:
            raise ValueError(
                f"{started} processes were started but each runs alone and would write the same folder. On CPU start "
                "with torchrun --nproc_per_node N launch.py ..., not `use_cpu: true`"
            )

    def reduce(self, table: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all ranks; all call it."""
        if self.world_size == 1:
            return table
        total = table.clone()
        torch.distributed.all_reduce(total, group=self.hosts)
        return total

    def gathered(self, values: Sequence[Any]) -> list[Any]:
        """Join the lists of all ranks, in the order of ranks; all call it."""
        return gather_object(list(values))

    def from_main(self, make: Callable[[], Value]) -> Value:
        """Return to all ranks what `make` gives on rank 0, where alone it is called; its ValueError is raised on all.

        For what takes long and is the same everywhere, as the digest of a teacher's weights. All ranks call it.
        """
        found: list[tuple[Any, str | None]] = []
        if self.is_main:
            try:
                found = [(make(), None)]
            except ValueError as error:
                if self.world_size == 1:
                    raise
                found = [(None, str(error))]
        value, wrong = self.gathered(found)[0]
        if wrong is not None:
            raise ValueError(wrong)
        return value

    def wait(self) -> None:
        """Return when every rank is here."""
        self.state.wait_for_everyone()

    def print(self, text: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        """End the process group, if there is one: left to the interpreter's end, gloo's threads may abort the process.

        Another run of this Python process may open a new one.
        """
        if self.world_size > 1:
            deepspeed = sys.modules.get("deepspeed.comm")
            if deepspeed is not None and deepspeed.is_initialized():
                deepspeed.destroy_process_group()  # with the groups that it keeps itself
            self.state.destroy_process_group()
            self.state._reset_state()


class Apart(Processes):
    """One of several processes that share files and nothing else: a slow one meets no limit of a process group.

    It knows who it is from what torchrun, `accelerate launch` and Slurm set; what Processes does together, it cannot.
    """

    def __init__(self) -> None:
        names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        self.rank, self.world_size, local = (int(os.environ.get(name, default)) for name, default in names)
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
        found = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
        self.device = torch.device("cpu") if found is None else torch.device(found.type, local)
        if found is not None:
            torch.accelerator.set_device_index(local)
        self.is_main, self.is_local_main = self.rank == 0, local == 0
