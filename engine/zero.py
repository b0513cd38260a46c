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

from engine.compiling import blocks_of
from engine.optimizer import optimizer_of
from engine.placement import Models, Placement
from engine.processes import Processes
from engine.sharding import receive
from engine.zero_settings import check_installed, zero_section
from settings.schema import ModelConfig, RunConfig

POLICY = "policy"  # DeepSpeed's tag of the policy inside a checkpoint


class ZeRO(Placement):
    """Where models live under DeepSpeed. All ranks make every call, in the same order."""

    name = "deepspeed"
    narrow = torch.bfloat16  # its engines take no float16 without scaling losses

    def __init__(self, processes: Processes, config: ModelConfig) -> None:
        super().__init__(processes, config)
        check_installed()
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed wants to read
        self.zero = zero_section(os.environ)
        self.sharded = self.zero["stage"] == 3
        self.deepspeed = _deepspeed()
        self.averages: dict[str, Tensor] = {}  # float32 shards of a reference that moves, by parameter name

    @property
    def empty(self) -> bool:
        """Tell whether rank 0's weights are sent to this rank."""
        return self.processes.rank > 0

    # ---- placing

    def _policy(self, model: torch.nn.Module, run: RunConfig) -> tuple[Any, torch.optim.Optimizer]:
        config = self._engine_config(self._remember_autocast(model, "master_dtype"), self.zero, True)
        self._fill(model, config)
        engine, *_ = self.deepspeed.initialize(model=model, optimizer=optimizer_of(model, run), config=config)
        return engine, engine.optimizer

    def _reference(self, model: torch.nn.Module, moving: bool) -> torch.nn.Module:
        return self._without_optimizer(model, self._remember_autocast(model, "reference_dtype"), True)

    def _frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        return self._without_optimizer(model, stored_dtype(model, "reference_dtype") if self.sharded else None, False)

    def _remember_autocast(self, model: torch.nn.Module, key: str) -> torch.dtype:
        stored = stored_dtype(model, key)
        if stored != self.compute == torch.bfloat16:
            self.cast.add(id(model))
        return stored

    def _without_optimizer(self, model: torch.nn.Module, stored: torch.dtype | None, as_policy: bool) -> Any:
        # Small weights are not kept whole either: `move_reference` writes shards, and whole copies would go stale.
        zero = {**self.zero, "stage3_param_persistence_threshold": 0}
        config = self._engine_config(stored, zero, as_policy)
        self._fill(model, config)
        if not self.sharded:
            return model
        engine, *_ = self.deepspeed.initialize(model=model, config=config)
        engine.eval()
        return engine

    def _engine_config(self, stored: torch.dtype | None, zero: dict[str, Any], as_policy: bool) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's bookkeeping alone; the trainer counts and divides
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on CPU, too; theirs is compiled on first use
            "steps_per_print": None,
        }
        if stored == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        elif as_policy and self.compute == torch.bfloat16:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        return config

    def _fill(self, model: torch.nn.Module, config: dict[str, Any]) -> None:
        """Send rank 0's weights; with stage 3 a block is sharded before the next one is sent."""
        blocks = blocks_of(model, self.config.block_class)
        inside = {module for block in blocks for module in block.modules()}
        rest = [module for module in model.modules() if module not in inside]
        for block in blocks:
            receive(list(block.modules()), self.device)
            if self.sharded:
                self.deepspeed.zero.Init(module=block, config_dict_or_path=config)
        receive(rest, self.device)

    def unwrapped(self, model: torch.nn.Module) -> Any:
        """Return the model inside the engine."""
        return model.module if self._is_engine(model) else model

    def _is_engine(self, model: torch.nn.Module) -> bool:
        return isinstance(model, self.deepspeed.DeepSpeedEngine)

    # ---- computing

    @contextmanager
    def generating(self, model: torch.nn.Module) -> Iterator[None]:
        """Hold the whole model on every rank, without the hooks that would shard each layer again after its use."""
        with self.precision(model):
            if not (self.sharded and self._is_engine(model)):
                yield
                return
            self._release(model)
            engine: Any = model
            offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                with self._gathered(list(engine.module.parameters())):
                    yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Tell DeepSpeed which micro-batch completes the step's gradients."""
        self.policy.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; DeepSpeed averages them over ranks, and the counts are already global."""
        self.policy.backward(loss * self.processes.world_size)  # type: ignore[operator]

    def step(self, rate: float, max_grad_norm: float) -> float:
        """Clip, update with this learning rate, forget the gradients; return the global norm before clipping.

        A norm that is not finite makes no update: DeepSpeed skips it.
        """
        engine: Any = self.policy
        engine.optimizer.clip_grad = max_grad_norm
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else float("nan")

    @torch.no_grad()
    def move_reference(self, reference: torch.nn.Module, rate: float) -> None:
        """Move a reference's weights toward the policy's by `rate`, in float32: each rank its shards."""
        from deepspeed.utils import safe_get_local_fp32_param

        self._release(reference)
        current = dict(self.unwrapped(self.policy).named_parameters())
        for name, old in self.unwrapped(reference).named_parameters():
            shard, new = _shard(old), current[name]
            average = self.averages.setdefault(name, shard.float().clone())
            master = safe_get_local_fp32_param(new) if self.sharded and new.requires_grad else None
            average.lerp_((_shard(new) if master is None else master).to(average.device, torch.float32), rate)
            shard.copy_(average)

    # ---- saving

    def whole_weights(self) -> dict[str, Tensor]:
        """Gather the policy's weights to rank 0's memory; the others get nothing."""
        return self.whole_weights_of(self.policy)

    def whole_weights_of(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Gather the weights of any model placed here to rank 0's memory, tensor by tensor; the others get nothing."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[str, Tensor] = {}
        for name, tensor in self.unwrapped(model).state_dict(keep_vars=True).items():
            with self._gathered([tensor]):
                # Where the model itself is bfloat16, the optimizer holds what was learned.
                masters = tensor.dtype == torch.bfloat16 and tensor.requires_grad
                value = safe_get_full_fp32_param(tensor) if masters else None
                if self.processes.is_main:
                    whole[name] = (tensor if value is None else value).detach().to("cpu", copy=True)
        return whole

    def _gathered(self, tensors: list[Any]) -> AbstractContextManager[Any]:
        return self.deepspeed.zero.GatheredParameters(tensors) if self.sharded else nullcontext()

    def _release(self, model: torch.nn.Module) -> None:
        """Let go of whole weights that DeepSpeed keeps for their next use."""
        if self.sharded and self._is_engine(model):
            model.empty_partition_cache()  # type: ignore[operator]

    def write(self, folder: Path, others: Models) -> None:
        """Write DeepSpeed's checkpoint of the policy, and each rank's shards of models that move with it."""
        self._release(self.policy)
        self.policy.save_checkpoint(str(folder), tag=POLICY, save_latest=False)  # type: ignore[operator]
        for name, model in others.items():
            self._release(model)
            shards = {key: self.averages.get(key, _shard(p)) for key, p in self.unwrapped(model).named_parameters()}
            torch.save({key: value.cpu() for key, value in shards.items()}, self._others_file(folder, name))

    def read(self, folder: Path, others: Models) -> None:
        """Restore what `write` wrote; ValueError where another placement or number of processes did."""
        written = len(list((folder / POLICY).glob("*_optim_states.pt")))
        if not written:
            raise ValueError(
                f"{folder} was not written by DeepSpeed: go on with the strategy that wrote it, or choose another "
                "exp_name"
            )
        if written != self.processes.world_size:
            raise ValueError(
                f"{folder} was written by DeepSpeed with {written} process(es), this run has "
                f"{self.processes.world_size}: start it with as many, or remove the folder to begin again"
            )
        self.policy.load_checkpoint(str(folder), tag=POLICY)  # type: ignore[operator]
        for name, model in others.items():
            self._release(model)
            shards = torch.load(self._others_file(folder, name), map_location="cpu", weights_only=True)
            with torch.no_grad():
                for key, parameter in self.unwrapped(model).named_parameters():
                    self.averages[key] = shards[key].to(_shard(parameter).device, torch.float32)
                    _shard(parameter).copy_(shards[key])

    def _others_file(self, folder: Path, name: str) -> Path:
        return folder / f"{name}-{self.processes.rank}.pt"


def stored_dtype(model: torch.nn.Module, key: str) -> torch.dtype:
    """Return the one precision of a model's weights; ValueError for what DeepSpeed's engines do not take."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        raise ValueError(
            "strategy=deepspeed needs a model all in float32 or all in bfloat16, this one has "
            f"{', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}: set model.{key}=float32"
            + (" (LoRA adapters are float32)" if key == "master_dtype" else " or bfloat16")
        )
    return dtypes.pop()


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
