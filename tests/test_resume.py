"""Stop and resume is the uninterrupted run, bit for bit on CPU in float32: kill -9 between two steps."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.helpers import begin, rows_of, write_pairs

TIMING = ("tokens_per_second",)


def arguments(base: Path, data: Path, name: str) -> list[str]:
    return [
        "loss=dpo",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"datasets.local.test={data}",
        f"cache_dir={base}",
        f"exp_name={name}",
        "lr=1e-3",
        "n_epochs=15",
        "model.batch_size=8",
        "log_every=3",
        "save_every=7",
        "eval_every=20",
        "model.use_peft=false",
    ]


def without_timing(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows_of(path)]


@pytest.mark.slow  # test_kills.py does it twenty times
def test_a_killed_run_goes_on_to_the_same_bits_and_the_same_metrics(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", 30)
    log = tmp_path / "log.txt"
    whole, killed = (begin(*arguments(tmp_path, data, name), log=log) for name in ("whole", "killed"))
    folder, deadline = tmp_path / "killed", time.time() + 300
    while not list(folder.glob("checkpoint-*/DONE")) and time.time() < deadline and killed.poll() is None:
        time.sleep(0.02)
    time.sleep(0.15)  # some steps past the checkpoint
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    steps_before = max(
        json.loads((d.parent / "state.json").read_text())["step"] for d in folder.glob("checkpoint-*/DONE")
    )
    again = begin(*arguments(tmp_path, data, "killed"), log=log)
    assert again.wait(timeout=400) == 0 == whole.wait(timeout=400), log.read_text()[-2000:]
    assert 0 < steps_before < 60
    one, other = (load_file(tmp_path / n / "FINAL" / "model.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert without_timing(tmp_path / "whole" / "metrics.jsonl") == without_timing(tmp_path / "killed" / "metrics.jsonl")
