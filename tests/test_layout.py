"""Layout invariance: 1x8, 8x1 and two processes give the same gradient and the same parameters, for every method."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import launch
from tests.support.chain import chain_of
from tests.support.helpers import composed, rows_of
from tests.support.ranks import Ranks
from tests.test_sharding import SGD, SGD_ATOL

STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    return chain_of(tmp_path_factory.mktemp("layout"))


def loss_overrides(method: str, world: dict[str, str]) -> list[str]:
    base = world["base"]
    return {
        "sft": ["loss=sft"],
        "dpo": ["loss=dpo", "loss.nll_weight=0.3"],
        "dckd": ["loss=dckd", f"loss.teacher_cache={base}/cache/CACHE"],
        "adpa": ["loss=adpa", f"loss.generations={world['generations']}", f"loss.advantages={base}/adv/CACHE"],
    }[method]


def run_overrides(method: str, world: dict[str, str], name: str, accumulation: int) -> list[str]:
    return [
        f"cache_dir={world['base']}",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={world['data']}",
        world["start"],
        f"exp_name={method}_{name}",
        *SGD,
        f"n_steps={STEPS}",
        "log_every=1",
        "model.batch_size=8",
        f"model.gradient_accumulation_steps={accumulation}",
        *loss_overrides(method, world),
    ]


def result(world: dict[str, str], name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    folder = Path(world["base"]) / name
    return load_file(folder / "FINAL" / "model.safetensors"), rows_of(folder / "metrics.jsonl")


def assert_same(one, other) -> None:
    weights, rows = one
    other_weights, other_rows = other
    for key, value in weights.items():
        torch.testing.assert_close(value, other_weights[key], atol=SGD_ATOL, rtol=0)
    for a, b in zip(rows, other_rows, strict=True):
        for key in ("loss/train", "grad_norm"):
            np.testing.assert_allclose(a[key], b[key], rtol=2e-5)


@pytest.mark.parametrize("method", ["sft", "dpo", "dckd", "adpa"])
def test_accumulation_changes_nothing(method, world):
    launch.run_task(composed(*run_overrides(method, world, "whole", 1)))
    launch.run_task(composed(*run_overrides(method, world, "parts", 8)))
    whole = result(world, f"{method}_whole")
    assert_same(whole, result(world, f"{method}_parts"))
    # The steps moved the parameters by far more than the tolerance: 1e-4 of a gradient would be seen.
    begun = load_file(Path(world["base"]) / "start" / "FINAL" / "model.safetensors")
    assert max(float((whole[0][k] - begun[k]).abs().max()) for k in begun) > 10_000 * SGD_ATOL


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["sft", "dpo", "dckd", "adpa"])
def test_two_processes_change_nothing(method, world):
    # 22 pairs: the third step has 6 rows, so one micro-batch of a rank is short.
    launch.run_task(composed(*run_overrides(method, world, "one", 1)))
    Ranks(*run_overrides(method, world, "two", 2), folder=Path(world["base"])).output()
    assert_same(result(world, f"{method}_one"), result(world, f"{method}_two"))
