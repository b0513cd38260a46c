"""Twenty kills at random moments, start-up and saving included, and the result is the uninterrupted one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT, rows_of, write_pairs

KILLS, SEED = 20, 7
START_UP = 5.0  # seconds from which a third of the kills is drawn, whatever the run has reached
WORKING = 0.3  # seconds after the first new file from which the others are drawn


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "launch.py"), "model=tiny", "datasets=[local]", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def state_of(folder: Path, pattern: str) -> set[tuple[str, int]]:
    found = set()
    for path in folder.glob(pattern):
        try:
            found.add((str(path), path.stat().st_size))
        except FileNotFoundError:  # renamed or removed while we look
            continue
    return found


def killed_then_finished(folder: Path, pattern: str, arguments: list[str]) -> int:
    """Kill the command KILLS times, then let it end; return how many kills found it alive after its first new file."""
    draw, at_work = random.Random(SEED), 0
    print(f"seed {SEED}")
    for number in range(KILLS):
        process, before, began = start(*arguments), state_of(folder, pattern), time.monotonic()
        in_start_up, wait = number % 3 == 0, draw.random()
        if in_start_up:
            time.sleep(wait * START_UP)
        else:
            while state_of(folder, pattern) == before and process.poll() is None and time.monotonic() - began < 60:
                time.sleep(0.002)
            time.sleep(wait * WORKING)
        at_work += not in_start_up and process.poll() is None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        print(f"kill {number}: {time.monotonic() - began:.1f} s, exit {process.returncode}", flush=True)
        assert process.returncode in (0, -signal.SIGKILL), "the command failed on what a kill left behind"
    last = start(*arguments)
    assert last.wait(timeout=200) == 0
    return at_work


@pytest.mark.slow
def test_twenty_kills_of_a_training_run_change_no_bit_and_no_row(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", 30)
    arguments = ["loss=sft", f"datasets.local.train={data}", f"cache_dir={tmp_path}", "lr=1e-3", "n_steps=500",
                 "n_epochs=200", "log_every=3", "save_every=4"]  # fmt: skip
    whole = start(*arguments, "exp_name=whole")
    assert whole.wait(timeout=200) == 0
    assert killed_then_finished(tmp_path / "killed", "checkpoint-*", [*arguments, "exp_name=killed"]) >= 10
    one, other = (tmp_path / name for name in ("whole", "killed"))
    weights = "FINAL/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    rows = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows_of(f / "metrics.jsonl")] for f in (one, other)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_twenty_kills_of_a_cache_change_no_byte(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", 4000)
    arguments = ["task=cache", f"datasets.local.train={data}", f"cache_dir={tmp_path}", "cache.batch_size=4", "cache.top_k=20"]
    whole = start(*arguments, "exp_name=whole")
    assert whole.wait(timeout=200) == 0
    pattern = "CACHE/shard-00000/index.jsonl"
    assert killed_then_finished(tmp_path / "killed", pattern, [*arguments, "exp_name=killed"]) >= 10
    names = sorted(p.name for p in (tmp_path / "whole/CACHE/shard-00000").iterdir())
    assert "index.jsonl" in names
    for name in names:
        one, other = (tmp_path / folder / "CACHE/shard-00000" / name for folder in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), name
