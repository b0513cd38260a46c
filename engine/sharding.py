"""Full sharding by torch's own fully_shard (FSDP2), where `strategy=fsdp` runs without accelerate's plugin.

`torchrun --nproc_per_node N launch.py strategy=fsdp ...` shards parameters, gradients and optimizer state over N
processes,
on GPUs and (gloo) on CPU. accelerate's FSDP, chosen by its configuration file, does the same through its own wrapping.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def is_ours(strategy: str, accelerator: Accelerator) -> bool:
    """Tell whether this module shards: strategy=fsdp was asked for and accelerate runs plain data parallelism."""
    return strategy == "fsdp" and accelerator.distributed_type.value not in ("FSDP", "NO", "DEEPSPEED")


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


def shard(model: torch.nn.Module, device: torch.device, class_name: str | None = None) -> torch.nn.Module:
    """Shard every block, then the rest, over all processes; in place.

    Only rank 0's weights count: the others may hold an empty model (models.load_model). A block is sent and sharded
    before the next one,
    so no device ever holds more than its shards and one whole block.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = blocks_of(model, class_name)
    inside: set[torch.nn.Module] = set()
    for block in blocks:
        receive(list(block.modules()), device)
        fully_shard(block, mesh=mesh)
        inside |= set(block.modules())
    receive([module for module in model.modules() if module not in inside], device)
    fully_shard(model, mesh=mesh)
    return model


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


def is_sharded(model: torch.nn.Module) -> bool:
    """Tell whether parameters are distributed tensors, by whoever sharded them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def set_gradient_sync(model: torch.nn.Module, on: bool) -> None:
    """Reduce gradients in the next backward pass, or keep them until the last micro-batch of a step."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(on)


def plain(value: Any) -> Tensor:
    """Return a whole tensor of a distributed one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gather the whole weights to rank 0's memory; all ranks call it, the others get nothing."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]
