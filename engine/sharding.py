"""Full sharding by torch's fully_shard (FSDP2): parameters, gradients and optimizer state over all processes.

One engine, whoever started the processes: torchrun or Slurm with strategy=fsdp, or `accelerate launch` with an FSDP
file, whose settings are read here. It runs on GPUs and (gloo) on CPU.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from engine import checkpoint
from engine.compiling import blocks_of
from engine.optimizer import optimizer_of
from engine.placement import Models, Placement
from engine.processes import Processes
from settings.schema import ModelConfig, RunConfig


class Plugin(NamedTuple):
    """What an accelerate FSDP file says of sharding."""

    reshard_after_forward: bool = True  # gather a block again for its backward pass: less memory
    offload_params: bool = False  # keep shards, gradients and optimizer on the CPU
    block_class: str | None = None


def plugin_of(environment: Any, config: ModelConfig) -> Plugin:
    """Read the FSDP settings that `accelerate launch` hands on in the environment.

    Raises ValueError for a setting that would be ignored: nothing runs other than its file says.
    """

    def value(name: str, default: str) -> str:
        return str(environment.get(name, default))

    def on(name: str) -> bool:
        return value(name, "false").lower() in ("1", "true", "yes")

    def refuse(condition: bool, key: str, seen: str, advice: str) -> None:
        if condition:
            raise ValueError(f"{key}: {seen} in the accelerate file is not supported: {advice}")

    if not on("ACCELERATE_USE_FSDP"):
        return Plugin(block_class=config.block_class)
    version, strategy = value("FSDP_VERSION", "1"), value("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    refuse(version != "2", "fsdp_version", version, "FSDP1 is gone; set fsdp_version: 2")
    refuse("HYBRID" in strategy or strategy in ("4", "5"), "fsdp_sharding_strategy", strategy, "leave it out")
    wrap = value("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    refuse(
        wrap != "TRANSFORMER_BASED_WRAP", "fsdp_auto_wrap_policy", wrap, "the decoder's blocks are sharded one by one"
    )
    kind = value("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    refuse(kind != "SHARDED_STATE_DICT", "fsdp_state_dict_type", kind, "checkpoints are sharded, FINAL is whole")
    ignored = value("FSDP_IGNORED_MODULES", "")
    refuse(bool(ignored), "fsdp_ignored_modules", ignored, "every parameter is sharded")
    refuse(
        on("FSDP_ACTIVATION_CHECKPOINTING") and not config.activation_checkpointing,
        "fsdp_activation_checkpointing",
        "true",
        "say model.activation_checkpointing=true",
    )
    refuse(
        on("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"),
        "fsdp_activation_checkpointing_offload",
        "true",
        "use model.activation_checkpointing=true",
    )
    named = [name for name in value("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name]
    refuse(len(named) > 1, "fsdp_transformer_layer_cls_to_wrap", ",".join(named), "name one class")
    contradiction = bool(named and config.block_class and named[0] != config.block_class)
    refuse(
        contradiction, "fsdp_transformer_layer_cls_to_wrap", str(named), f"model.block_class is {config.block_class}"
    )
    return Plugin(
        value("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("0", "false", "no"),
        on("FSDP_OFFLOAD_PARAMS"),
        named[0] if named else config.block_class,
    )


class Sharded(Placement):
    """Every process holds a part of each parameter; blocks are gathered for their forward and backward pass.

    Shards are float32, compute is in model.policy_dtype, gradients are reduced in float32, with every micro-batch:
    gradients that wait for the last one would be whole on every process (32 GB at 8B).
    """

    name = "fsdp"

    def __init__(self, processes: Processes, config: ModelConfig) -> None:
        super().__init__(processes, config)
        self.plugin = plugin_of(os.environ, config)
        self.mesh = init_device_mesh(self.device.type, (processes.world_size,))

    @property
    def empty(self) -> bool:
        """Tell whether rank 0's weights are sent to this rank."""
        return self.processes.rank > 0

    def reference_dtype(self, moving: bool) -> torch.dtype:
        """Return the precision of a reference's shards: what the policy's are rounded to before they compute."""
        asked = self.config.reference_dtype
        return self.compute if asked == "auto" and not moving else super().reference_dtype(moving)

    def _sharded(self, model: torch.nn.Module, compute: torch.dtype | None) -> torch.nn.Module:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        shard(model, self.device, self.mesh, self.plugin, policy)
        if hasattr(model, "get_base_model"):  # PEFT's generate calls the inner model, past the outer one's hooks
            register_fsdp_forward_method(model, "generate")
        return model

    def _policy(self, model: torch.nn.Module, run: RunConfig) -> tuple[Any, torch.optim.Optimizer]:
        sharded = self._sharded(model, self.compute)
        return sharded, optimizer_of(sharded, run)

    def _reference(self, model: torch.nn.Module, moving: bool) -> torch.nn.Module:
        return self._sharded(model, self.compute)

    def _frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        return self._sharded(model, None)

    @property
    def in_step(self) -> bool:
        """Tell that a forward pass gathers parameters from every rank."""
        return True

    def move_reference(self, reference: torch.nn.Module, rate: float) -> None:
        """Move each rank's own shards; a model that was only evaluated still holds its outermost weights whole."""
        for model in (reference, self.policy):
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        super().move_reference(reference, rate)

    def whole_weights(self) -> dict[str, Tensor]:
        """Gather the policy's weights into rank 0's memory; all ranks call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.policy, options=options)  # type: ignore[return-value]

    def write(self, folder: Path, others: Models) -> None:
        """Write the tensors of a checkpoint, each rank its shards."""
        checkpoint.write_shards(folder, {"model": self.policy, **others}, self.optimizer)


def shard(
    model: torch.nn.Module, device: torch.device, mesh: Any, plugin: Plugin, precision: MixedPrecisionPolicy
) -> None:
    """Shard every block, then the rest, over all processes; in place.

    Only rank 0's weights count: the others may hold an empty model (models.load_model). A block is sent and sharded
    before the next one. So no device ever holds more than its shards and one whole block.
    """
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision}
    if plugin.offload_params:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    inside: set[torch.nn.Module] = set()
    for block in blocks_of(model, plugin.block_class):
        receive(list(block.modules()), device)
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **options)
        inside |= set(block.modules())
    receive([module for module in model.modules() if module not in inside], device)
    fully_shard(model, **options)


def receive(modules: list[torch.nn.Module], device: torch.device) -> None:
    """Give every tensor that these modules themselves hold rank 0's values, on `device`; tied parameters stay tied. All
    ranks call it.
    """
    tables: list[dict[str, Any]] = [
        table for module in modules for table in (module._parameters, module._buffers, vars(module))
    ]  # type: ignore[misc]
    places = [(held, name) for held in tables for name, value in held.items() if isinstance(value, Tensor)]
    described = [(name, tuple(held[name].shape), held[name].dtype) for held, name in places]
    told = [described]
    torch.distributed.broadcast_object_list(told, src=0)
    if [entry[:2] for entry in told[0]] != [entry[:2] for entry in described]:
        raise ValueError(
            f"process {torch.distributed.get_rank()} built another model than process 0 loaded: "
            f"{first_difference(told[0], described)}"
        )
    old = [held[name] for held, name in places]  # alive until the end, so that no id is used twice
    moved: dict[int, Tensor] = {}
    for (held, name), tensor, (_, _, dtype) in zip(places, old, told[0], strict=True):
        if id(tensor) not in moved:
            value = (
                torch.empty(tensor.shape, dtype=dtype, device=device)
                if tensor.is_meta
                else tensor.detach().to(device, dtype).contiguous()
            )
            torch.distributed.broadcast(value, src=0)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = torch.nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        held[name] = moved[id(tensor)]


def first_difference(told: list[Any], own: list[Any]) -> str:
    """Name the first entry in which two lists differ, or their lengths."""
    found = (f"{one} there, {other} here" for one, other in zip(told, own, strict=False) if one[:2] != other[:2])
    return next(found, f"{len(told)} tensors there, {len(own)} here")
