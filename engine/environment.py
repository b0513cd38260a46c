"""The launch environment: variables set before torch is imported, and what a launcher sets against the config.

This module imports no torch, so that launch.py can ask it first.
"""

import runpy
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# vLLM forks; a process that has touched CUDA must not. A user's own settings win.
BEFORE_TORCH = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}

ON_DEVICE = ("train", "cache", "generate", "evaluate", "label")  # tasks that run a model
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}  # accelerate's names of dtypes
# What accelerate would do to a model itself. Here it launches processes and wraps none.
NOT_HERE = {
    "ACCELERATE_DYNAMO_BACKEND": ("no", "set model.compile=true instead"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "use fsdp_config or deepspeed_config"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "use fsdp_config or deepspeed_config"),
}


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set what torch and vLLM read when they are imported."""
    for name, value in BEFORE_TORCH.items():
        environment.setdefault(name, value)


def check(environment: Mapping[str, str], raw: Mapping[str, Any]) -> None:
    """ValueError where the launcher contradicts the resolved config, or this build of torch would leave GPUs idle."""
    pipeline = bool(raw.get("pipeline"))
    if raw["dry_run"] or not (pipeline or raw["task"] in ON_DEVICE):
        return
    if cuda_of_torch() is None and has_gpu(environment):
        raise ValueError(
            "this machine has an NVIDIA GPU, and the torch installed here is a CPU build: ./install.sh --cuda installs "
            "the other one; CUDA_VISIBLE_DEVICES='' in front of the command means that the CPU is wanted"
        )
    if not pipeline and raw["task"] == "train":
        check_launcher(environment, raw["model"])


def check_launcher(environment: Mapping[str, str], model: Mapping[str, Any]) -> None:
    """ValueError where accelerate's file or variables ask for other numbers than the model section."""
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto", str(model["gradient_accumulation_steps"])):
        raise ValueError(
            f"the launcher sets gradient_accumulation_steps={accumulation}, the run has "
            f"model.gradient_accumulation_steps={model['gradient_accumulation_steps']}: set that key, and take the "
            "launcher's (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) away"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no" and PRECISIONS.get(precision) != model["policy_dtype"]:
        wanted = PRECISIONS.get(precision)
        key = "model.policy_dtype=bfloat16" if wanted == "bfloat16" else "model.policy_dtype (float32 or bfloat16)"
        raise ValueError(
            f"the launcher sets mixed_precision={precision}, the run has model.policy_dtype={model['policy_dtype']}: "
            f"set {key}, and mixed_precision: 'no' for the launcher (ACCELERATE_MIXED_PRECISION)"
        )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto").lower()
    if clipping not in ("auto", "none") and float(clipping) != float(model["max_grad_norm"]):
        raise ValueError(
            f"the launcher sets gradient_clipping={clipping}, the run has "
            f"model.max_grad_norm={model['max_grad_norm']}: set that key, and take "
            "gradient_clipping out of deepspeed_config"
        )
    for name, (neutral, instead) in NOT_HERE.items():
        value = environment.get(name, neutral).lower()
        if value != neutral:
            raise ValueError(f"{name}={value} is not honored: {instead}")


def cuda_of_torch() -> str | None:
    """Return the CUDA version that torch was built for (or ROCm), None for a CPU build, without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "unknown"
    found = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return found.get("cuda") or found.get("hip")


def has_gpu(environment: Mapping[str, str]) -> bool:
    """Tell whether an NVIDIA GPU is here and not hidden on purpose."""
    if environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    if Path("/dev/nvidia0").exists():
        return True
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    return program is not None and subprocess.run([program, "-L"], capture_output=True).returncode == 0
