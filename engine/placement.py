"""Where models live: on every process (Replicated), or a part on each (engine/sharding.py, engine/zero.py).

A placement puts policy, reference, frozen models and optimizer in their places. It does the backward pass with or
without a reduction over ranks, clips, steps, gathers the weights, writes and reads checkpoints, and lets the policy
generate. BasicTrainer asks it and has no `if` about it. A policy and its reference take one numeric path: with equal
weights they give equal log-probabilities to the bit.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine import checkpoint
from engine.checkpoint import Models
from engine.compiling import compile_blocks
from engine.optimizer import optimizer_of
from engine.processes import Processes
from models import NumericPath, resolve_dtype
from settings.schema import ModelConfig, RunConfig


class Placement(ABC):
    """What BasicTrainer asks for; subclasses place, reduce and gather in their way.

    policy, optimizer: there after place_policy. compute: the precision of the policy's matrix products.
    """

    name: ClassVar[str]
    narrow: ClassVar[torch.dtype] = torch.float16  # of live teachers on a GPU, unless asked for
    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, processes: Processes, config: ModelConfig) -> None:
        self.processes, self.config, self.device = processes, config, processes.device
        self.compute = resolve_dtype(config.policy_dtype, processes.device)
        self.cast: set[int] = set()  # ids of the models that run under autocast

    # ---- loading

    @property
    def empty(self) -> bool:
        """Tell whether this rank builds models without weights, to be filled with rank 0's."""
        return False

    def master_dtype(self) -> torch.dtype:
        """Return the precision in which the policy is stored: float32 unless asked for (5e-7 vanishes in bfloat16)."""
        return (
            torch.float32
            if self.config.master_dtype == "auto"
            else resolve_dtype(self.config.master_dtype, self.device)
        )

    def reference_dtype(self, moving: bool) -> torch.dtype:
        """Return the precision in which a reference is loaded; one that moves needs the policy's own, to add up."""
        asked = self.config.reference_dtype
        return self.master_dtype() if asked == "auto" or moving else resolve_dtype(asked, self.device)

    def reference_path(self) -> NumericPath:
        """Return the numeric path of a reference that stands still: its log-probabilities depend on it."""
        attention = self.config.attn_implementation or "default"
        return NumericPath(self.reference_dtype(moving=False), self.compute, self.compute, attention)

    # ---- placing

    def place_policy(self, model: torch.nn.Module, run: RunConfig) -> None:
        """Compile what is to be compiled, place the model, make its optimizer."""
        compile_blocks(model, self.config)
        self.policy, self.optimizer = self._policy(model, run)

    def place_reference(self, model: torch.nn.Module, moving: bool = False) -> torch.nn.Module:
        """Place the policy's reference on the policy's numeric path, in evaluation mode."""
        compile_blocks(model.eval(), self.config)
        return self._reference(model, moving)

    def place_frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        """Place another frozen model, which computes in the precision that it is stored in."""
        compile_blocks(model.eval(), self.config)
        return self._frozen(model)

    @abstractmethod
    def _policy(self, model: torch.nn.Module, run: RunConfig) -> tuple[Any, torch.optim.Optimizer]:
        """Place the policy and make its optimizer."""

    @abstractmethod
    def _reference(self, model: torch.nn.Module, moving: bool) -> torch.nn.Module:
        """Place the reference on the policy's numeric path."""

    @abstractmethod
    def _frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        """Place a model that computes as it is stored."""

    def unwrapped(self, model: torch.nn.Module) -> Any:
        """Return the model itself, with its methods and names."""
        return model

    # ---- computing

    def precision(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return autocast for a policy and a reference that need it, nothing for models that compute as stored."""
        on = id(self.unwrapped(model)) in self.cast
        return torch.autocast(self.device.type, self.compute) if on else nullcontext()

    def generating(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return the context in which `unwrapped(model).generate` works; all ranks enter it together."""
        return self.precision(model)

    @property
    def in_step(self) -> bool:
        """Tell whether a forward pass needs every rank: then all generate as long as any of them does."""
        return False

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch's forward and backward pass."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; `loss` is divided by global counts, so gradients are summed over ranks."""
        (loss * self.processes.world_size).backward()  # a reduction averages over ranks

    @property
    def reads_late(self) -> bool:
        """Tell whether a device runs ahead of this process, which would wait where it reads a number."""
        return self.device.type != "cpu"

    def step(self, rate: float, max_grad_norm: float) -> Tensor | float:
        """Clip, update with this learning rate, forget the gradients; return the global norm before clipping.

        A norm that is not finite makes no update; where numbers are read late, that is found when it is read.
        """
        norm = whole(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), max_grad_norm))
        norm = norm.to(self.device)  # where other metrics are: offloaded gradients lie on the host
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.reads_late or bool(norm.isfinite()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def move_reference(self, reference: torch.nn.Module, rate: float) -> None:
        """Move a reference's weights toward the policy's by `rate` (1: copy them), matched by name."""
        current = dict(self.unwrapped(self.policy).named_parameters())
        for name, old in self.unwrapped(reference).named_parameters():
            local(old).lerp_(local(current[name]).to(old.dtype), rate)

    # ---- saving

    def whole_weights(self) -> dict[str, Tensor]:
        """Return the policy's whole weights on rank 0 and nothing elsewhere; all ranks call it."""
        return dict(self.unwrapped(self.policy).state_dict()) if self.processes.is_main else {}

    def write(self, folder: Path, others: Models) -> None:
        """Write the tensors of a checkpoint: policy, optimizer, and the models that move with the policy."""
        checkpoint.write_whole(folder, {"model": self.policy, **others}, self.optimizer, self.processes.is_main)

    def read(self, folder: Path, others: Models) -> None:
        """Restore what `write` wrote, by this placement or another one."""
        checkpoint.read_tensors(folder, {"model": self.policy, **others}, self.optimizer)


class Replicated(Placement):
    """The whole model in every process: one process, or DistributedDataParallel over several.

    The policy is stored in float32 and computes under autocast where another precision is asked for.
    """

    @property
    def name(self) -> str:  # type: ignore[override]
        """Return what strategy= calls this."""
        return "none" if self.processes.world_size == 1 else "ddp"

    def _policy(self, model: torch.nn.Module, run: RunConfig) -> tuple[Any, torch.optim.Optimizer]:
        self._remember_autocast(model)
        model = model.to(self.device)
        if self.processes.world_size > 1:
            devices = None if self.device.type == "cpu" else [self.device]
            model = DistributedDataParallel(model, device_ids=devices)
        return model, optimizer_of(model, run)

    def _reference(self, model: torch.nn.Module, moving: bool) -> torch.nn.Module:
        self._remember_autocast(model)
        if id(model) in self.cast and not moving:
            round_linear(model, self.compute)
        return model.to(self.device)

    def _frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.to(self.device)

    def _remember_autocast(self, model: torch.nn.Module) -> None:
        if self.compute != torch.float32 and any(p.dtype == torch.float32 for p in model.parameters()):
            self.cast.add(id(model))

    def unwrapped(self, model: torch.nn.Module) -> Any:
        """Return the model inside DistributedDataParallel."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Reduce gradients over ranks with the last micro-batch only."""
        return nullcontext() if last or self.processes.world_size == 1 else self.policy.no_sync()  # type: ignore[operator]


@torch.no_grad()
def round_linear(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in `dtype`, in place: autocast would round them at every use.

    What autocast leaves in float32 (norms, embeddings, a head that shares their weights) stays as it is. So a frozen
    reference takes half the memory and gives the same bits as a policy with the same weights.
    """
    modules = list(model.modules())
    linear = [module for module in modules if isinstance(module, torch.nn.Linear)]
    kept = {id(p) for module in modules if not isinstance(module, torch.nn.Linear) for p in module._parameters.values()}
    for module in linear:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)


def local(value: Any) -> Tensor:
    """Return this rank's part of a distributed tensor, or the tensor itself."""
    return value.to_local() if hasattr(value, "to_local") else value


def whole(value: Any) -> Tensor:
    """Return the whole of a distributed tensor, or the tensor itself."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
