"""A scheduler's warning: the run is checkpointed at a step boundary, leaves with 85, and goes on to the same bits."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.preemption import REQUEUE
from pipeline.warm import Process
from scripts.slurm_rank import accelerate_variables, free_port, rank_variables
from tests.support.helpers import ROOT, begin, rows_of, write_pairs
from tests.test_resume import without_timing


def command(base: Path, data: Path, name: str) -> list[str]:
    return [
        "loss=dpo",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"cache_dir={base}",
        f"exp_name={name}",
        "lr=1e-3",
        "n_steps=60",
        "model.batch_size=8",
        "log_every=5",
    ]


def wait_for_rows(process: Process | subprocess.Popen, file: Path, rows: int, timeout: float = 120) -> None:
    """Wait until a run has written so many rows."""
    deadline = time.time() + timeout
    while not (file.is_file() and len(file.read_text().splitlines()) >= rows):
        assert process.poll() is None and time.time() < deadline, (
            "the run ended, or stood still, before it could be signalled"
        )
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warned_run_leaves_with_the_code_that_requeues_and_resumes_to_the_same_bits(tmp_path, warning):
    data = write_pairs(tmp_path / "pairs.jsonl", 30)
    log = tmp_path / "log.txt"
    whole, warned = (begin(*command(tmp_path, data, name), log=log) for name in ("whole", "warned"))
    wait_for_rows(warned, tmp_path / "warned" / "metrics.jsonl", 1)
    os.kill(warned.pid, warning)
    assert warned.wait(timeout=60) == REQUEUE, log.read_text()[-2000:]
    saved = [p.parent.name for p in (tmp_path / "warned").glob("checkpoint-*/DONE")]
    assert len(saved) == 1 and 5 <= int(saved[0].split("-")[1]) < 60  # save_every=0: the warning alone made it
    assert not (tmp_path / "warned" / "DONE").exists()
    again = begin(*command(tmp_path, data, "warned"), log=log)
    assert again.wait(timeout=150) == 0 == whole.wait(timeout=150), log.read_text()[-2000:]
    one, other = (load_file(tmp_path / n / "FINAL" / "model.safetensors") for n in ("whole", "warned"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert without_timing(tmp_path / "whole" / "metrics.jsonl") == without_timing(tmp_path / "warned" / "metrics.jsonl")


@pytest.mark.distributed
def test_a_warning_to_one_rank_stops_both_at_the_same_step(tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 30)
    port = str(free_port(os.getpid()))
    ranks = []
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | env
        ranks.append(
            subprocess.Popen(
                [sys.executable, "launch.py", *command(tmp_path, data, "two"), "n_steps=4000"],
                env=env,
                cwd=ROOT,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        )
    wait_for_rows(ranks[0], tmp_path / "two" / "metrics.jsonl", 1)
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.wait(timeout=60) for rank in ranks] == [REQUEUE, REQUEUE]
    saved = [p.parent.name for p in (tmp_path / "two").glob("checkpoint-*/DONE")]
    assert len(saved) == 1
    assert rows_of(tmp_path / "two" / "metrics.jsonl")[-1]["step"] <= int(saved[0].split("-")[1])


# ---- what a rank gets from Slurm


def test_a_taken_port_is_passed_over():
    first = free_port(4711)
    with socket.socket() as taken:
        taken.bind(("", first))
        assert free_port(4711) != first


def test_a_rank_is_told_its_place_and_one_process_nothing():
    step = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    assert rank_variables(step) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "1",
    }
    assert rank_variables({"SLURM_STEP_NUM_TASKS": "1"}) == {}
    with pytest.raises(ValueError, match="gpus-per-node"):
        rank_variables({**step, "CUDA_VISIBLE_DEVICES": "0"})


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "accelerate_config").glob("fsdp_*.yaml")))
def test_the_ranks_get_what_accelerate_launch_would_set(name, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    variables = accelerate_variables(ROOT / "accelerate_config" / name, nodes=2, world=4)
    assert variables["ACCELERATE_USE_FSDP"] == "true" and variables["FSDP_VERSION"] == "2"
    assert variables["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
