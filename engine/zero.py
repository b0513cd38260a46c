"""ZeRO: DeepSpeed's engine as a placement. It shards parameters, gradients and optimizer state over all processes.

The policy is an engine with an optimizer. Every frozen model is an engine without one, sharded the same way (stage 3).
Weights stay float32 shards; where the run computes in bfloat16, DeepSpeed's own autocast does it and sends bfloat16.
Stages 1 and 2 shard the optimizer (and gradients) only, so their models are whole on every process.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from engine.optimizer import optimizer_of
from engine.sharding import blocks_of, receive
from engine.zero_settings import check_installed, zero_section
from settings.schema import ModelConfig, RunConfig

POLICY = "policy"  # DeepSpeed's tag of the policy inside a checkpoint


class ZeRO:
    """Where models live under DeepSpeed. All ranks make every call, in the same order."""

    name = "deepspeed"

    def __init__(self, device: torch.device, model_config: ModelConfig) -> None:
        check_installed()
        os.environ.setdefault("LOCAL_RANK", "0")
        self.deepspeed = _deepspeed()
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device, self.is_main = device, self.rank == 0
        self.model_config = model_config
        self.compute = models.resolve_dtype(model_config.policy_dtype, device)
        self.zero = zero_section(os.environ)
        self.sharded = self.zero["stage"] == 3
        self.empty = not self.is_main  # rank 0's weights are sent
        self.averages: dict[str, Tensor] = {}  # float32 shards of a reference that moves, by parameter name
        self.policy: Any = None
        self.optimizer: Any = None

    # ---- models

    def place_policy(self, model: torch.nn.Module, run: RunConfig, model_config: ModelConfig) -> None:
        """Shard the policy and make its optimizer."""
        config = self._engine_config(model, model_config.max_grad_norm)
        self._fill(model, config)
        engine, *_ = self.deepspeed.initialize(model=model, optimizer=optimizer_of(model, run), config=config)
        self.policy, self.optimizer = engine, engine.optimizer

    def place_frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        """Shard a frozen model as the policy is; stages 1 and 2 keep it whole."""
        model.requires_grad_(False).eval()
        config = self._engine_config(model, 0.0)
        # Small weights are not kept whole either: `move` writes shards, and whole copies would go stale.
        config["zero_optimization"] = {**self.zero, "stage3_param_persistence_threshold": 0}
        self._fill(model, config)
        if not self.sharded:
            return model.to(self.device)
        engine, *_ = self.deepspeed.initialize(model=model, config=config)
        engine.eval()
        return engine

    def _engine_config(self, model: torch.nn.Module, max_grad_norm: float) -> dict[str, Any]:
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
            raise ValueError(
                "strategy=deepspeed needs a model all in float32 or all in bfloat16, this one has "
                f"{sorted(map(str, dtypes))}: set model.master_dtype=float32 "
                "(LoRA adapters are float32)"
            )
        stored = dtypes.pop()
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's bookkeeping alone; the trainer counts and divides
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": self.zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on CPU, too; theirs is compiled on first use
            "steps_per_print": None,
        }
        if stored == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        elif self.compute == torch.bfloat16:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        return config

    def _fill(self, model: torch.nn.Module, config: dict[str, Any]) -> None:
        """Send rank 0's weights; with stage 3 a block is sharded before the next one is sent."""
        blocks = blocks_of(model, self.model_config.block_class)
        inside = {module for block in blocks for module in block.modules()}
        rest = [module for module in model.modules() if module not in inside]
        for block in blocks:
            receive(list(block.modules()), self.device)
            if self.sharded:
                self.deepspeed.zero.Init(module=block, config_dict_or_path=config)
        receive(rest, self.device)

    def precision(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return the context in which a model is run; DeepSpeed's engine enters the same by itself."""
        stored = next(model.parameters()).dtype
        return (
            nullcontext() if stored in (self.compute, torch.float64) else torch.autocast(self.device.type, self.compute)
        )

    def unwrapped(self, model: torch.nn.Module) -> Any:
        """Return the model inside the engine."""
        return model.module if isinstance(model, self.deepspeed.DeepSpeedEngine) else model

    # ---- a step

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradients; the step's last micro-batch completes them."""
        self.policy.set_gradient_accumulation_boundary(last)
        self.policy.backward(loss * self.world_size)  # DeepSpeed averages over ranks; the counts are already global

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip, update with this rate, forget the gradients; return the norm before clipping.

        ValueError where the norm is not finite: DeepSpeed has then skipped the update.
        """
        self.optimizer.clip_grad = max_grad_norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.policy.step()
        norm = float(self.policy.get_global_grad_norm()) if self.policy.was_step_applied() else float("nan")
        if not norm < float("inf"):
            raise ValueError(f"the gradient norm is {norm}; the update was not made. Lower lr or check the data")
        return norm

    @torch.no_grad()
    def move(self, old: torch.nn.Module, new: torch.nn.Module, rate: float) -> None:
        """Move `old` toward `new` by `rate`, in float32: each rank its shards."""
        from deepspeed.utils import safe_get_local_fp32_param

        self._release(old)
        targets = dict(self.unwrapped(new).named_parameters())
        for name, parameter in self.unwrapped(old).named_parameters():
            shard, target = _shard(parameter), targets[name]
            average = self.averages.setdefault(name, shard.float().clone())
            master = safe_get_local_fp32_param(target) if self.sharded and target.requires_grad else None
            average.lerp_((_shard(target) if master is None else master).to(average.device, torch.float32), rate)
            shard.copy_(average)

    # ---- whole weights

    def whole_weights(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Gather the weights to rank 0's memory, a tensor at a time; the others get nothing."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[str, Tensor] = {}
        for name, tensor in self.unwrapped(model).state_dict(keep_vars=True).items():
            with self._gathered([tensor]):
                # Where the model itself is bfloat16, the optimizer holds what was learned.
                masters = tensor.dtype == torch.bfloat16 and tensor.requires_grad
                value = safe_get_full_fp32_param(tensor) if masters else None
                if self.is_main:
                    whole[name] = (tensor if value is None else value).detach().to("cpu", copy=True)
        return whole

    @contextmanager
    def generating(self, model: torch.nn.Module) -> Iterator[None]:
        """Hold the whole model on every rank, without the hooks that would shard each layer again after its use."""
        if not (self.sharded and isinstance(model, self.deepspeed.DeepSpeedEngine)):
            yield
            return
        self._release(model)
        offload = getattr(model.optimizer, "parameter_offload", model.optimizer)
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            with self._gathered(list(model.module.parameters())):
                yield
        finally:
            offload._register_deepspeed_module(offload.module)

    def _gathered(self, tensors: list[Any]) -> AbstractContextManager[Any]:
        return self.deepspeed.zero.GatheredParameters(tensors) if self.sharded else nullcontext()

    def _release(self, model: Any) -> None:
        """Let go of whole weights that DeepSpeed keeps for their next use."""
        if self.sharded and isinstance(model, self.deepspeed.DeepSpeedEngine):
            model.empty_partition_cache()

    # ---- checkpoints

    def save(self, folder: Path, extra_models: dict[str, torch.nn.Module]) -> None:
        """Write DeepSpeed's checkpoint of the policy, and each rank's shards of models that move with it."""
        self._release(self.policy)
        self.policy.save_checkpoint(str(folder), tag=POLICY, save_latest=False)
        for name, model in extra_models.items():
            self._release(model)
            shards = {key: self.averages.get(key, _shard(p)) for key, p in self.unwrapped(model).named_parameters()}
            torch.save({key: value.cpu() for key, value in shards.items()}, folder / f"{name}-{self.rank}.pt")

    def load(self, folder: Path, extra_models: dict[str, torch.nn.Module]) -> None:
        """Read what `save` wrote; ValueError where another number of processes wrote it."""
        written = len(list((folder / POLICY).glob("*_optim_states.pt")))
        if written != self.world_size:
            raise ValueError(
                f"{folder} was written by DeepSpeed with {written} process(es), this run has {self.world_size}: "
                "start it with as many, or remove the folder to begin again"
            )
        self.policy.load_checkpoint(str(folder), tag=POLICY)
        for name, model in extra_models.items():
            self._release(model)
            shards = torch.load(folder / f"{name}-{self.rank}.pt", map_location="cpu", weights_only=True)
            with torch.no_grad():
                for key, parameter in self.unwrapped(model).named_parameters():
                    self.averages[key] = shards[key].to(_shard(parameter).device, torch.float32)
                    _shard(parameter).copy_(shards[key])

    def reduce(self, table: Tensor) -> Tensor:
        """Sum over ranks."""
        if self.world_size == 1:
            return table
        there = table.to(self.device, copy=True)
        torch.distributed.all_reduce(there)
        return there.to(table.device)


def _shard(parameter: Any) -> Tensor:
    """Return this rank's part of a parameter, or the whole of one that is not sharded."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def _deepspeed() -> Any:
    """Import DeepSpeed, which takes seconds."""
    import deepspeed

    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    # On CPU it would compile an all-reduce through shared memory, for inference only, under a lock that a killed run
    # leaves behind: every later run would wait for it forever.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    return deepspeed
