"""The warm start: a forked command is the command, with its code and signals; what if the forking process dies."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launch
from pipeline.warm import WarmStart
from tests.support.helpers import ALONE, ROOT, begin, composed, rows_of, write_pairs


def training(base: Path, name: str, steps: int = 3) -> list[str]:
    data = write_pairs(base / "pairs.jsonl", 8)
    run = ["loss=sft", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={base}"]
    return [*run, f"exp_name={name}", f"n_steps={steps}", "log_every=1", "lr=1e-3", "model.batch_size=4"]


def test_a_forked_run_has_the_bits_of_one_that_was_not(tmp_path):
    assert begin(*training(tmp_path, "forked"), log=tmp_path / "log.txt").wait(timeout=120) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    launch.run_task(composed(*training(tmp_path, "here")))
    torch.set_num_threads(threads)
    one, other = (load_file(tmp_path / name / "FINAL" / "model.safetensors") for name in ("forked", "here"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [[row["loss/train"] for row in rows_of(tmp_path / n / "metrics.jsonl")] for n in ("forked", "here")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('a word')", 1, "a word"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import atexit; atexit.register(print, 'the end')", 0, "the end"),
        ("import os; print(os.getcwd(), os.environ['OWN'], os.getpid() == os.getsid(0))", 0, f"{ROOT} set True"),
    ],
)
def test_a_program_ends_as_it_would_alone(tmp_path, program, code, said):
    (tmp_path / "program.py").write_text(program)
    process = begin(program=str(tmp_path / "program.py"), log=tmp_path / "log.txt", env={"OWN": "set"})
    assert process.wait(timeout=30) == code == process.poll()
    assert said in (tmp_path / "log.txt").read_text()


def test_a_signal_reaches_the_program_alone(tmp_path):
    (tmp_path / "program.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    one, other = (begin(program=str(tmp_path / "program.py"), log=tmp_path / f"{n}.txt") for n in range(2))
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(timeout=0.2)
    os.killpg(one.pid, signal.SIGTERM)
    assert one.wait(timeout=30) == -signal.SIGTERM and other.poll() is None
    os.kill(other.pid, signal.SIGKILL)
    assert other.wait(timeout=30) == -signal.SIGKILL


@pytest.mark.slow  # a process of its own has to import torch
def test_commands_end_with_the_process_that_forked_them(tmp_path):
    server = WarmStart({**os.environ, **ALONE})
    assert server.server is not None
    (tmp_path / "program.py").write_text("import time\ntime.sleep(60)\n")
    with (tmp_path / "log.txt").open("wb") as log:
        child = server.start([str(tmp_path / "program.py")], dict(os.environ), log.fileno(), log.fileno())
        server.server.kill()
        assert child.wait(timeout=30) == -signal.SIGKILL
        with pytest.raises(RuntimeError, match="the warm start ended with code -9"):
            server.start([str(tmp_path / "program.py")], dict(os.environ), log.fileno(), log.fileno())


def test_a_process_that_still_imports_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("pipeline.warm.PATIENCE", 0.05)  # its imports take seconds
    warm = WarmStart(dict(os.environ))
    warm.close()
    assert warm.server is not None and warm.server.poll() == -signal.SIGKILL
