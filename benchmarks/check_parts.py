"""What the checks on a GPU share: their size, their lines, and when one is left out."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from settings.schema import ModelConfig, typed

ROOT = Path(__file__).resolve().parents[1]


class Scale(NamedTuple):
    """How large the checks are: a file of config/model, and a batch of B pairs."""

    model: str
    rows: int
    prompt: int
    response: int
    steps: int
    answers: int  # responses that generation is timed on


SCALES = {"1b": Scale("llama_1b_shape", 4, 512, 512, 10, 256), "tiny": Scale("tiny", 2, 8, 8, 2, 4)}


class Row(NamedTuple):
    """One line of the table; figures that a check does not have are None."""

    check: str
    result: str
    seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None


class Skipped(Exception):
    """A check that cannot run here; its text says why."""


def model_config(name: str, **changes: Any) -> ModelConfig:
    """Read a file of config/model over the base."""
    files = [ROOT / "config" / "model" / f"{part}.yaml" for part in ("base_model", name)]
    merged: dict[str, Any] = {}
    for file in files:
        merged |= yaml.safe_load(file.read_text(encoding="utf-8"))
    merged.pop("defaults", None)
    return typed({**merged, **changes}, ModelConfig)


def needs_gpu() -> None:
    """Skip without a GPU."""
    if not torch.cuda.is_available():
        raise Skipped("no GPU here")


def needs_vllm() -> None:
    """Skip without a GPU, or without vLLM."""
    needs_gpu()
    if find_spec("vllm") is None:
        raise Skipped("vLLM is not installed (./install.sh --vllm)")
