"""The scripts on a real two-node Slurm (tests/support/two_node_slurm.sh): layout, warning and requeue, failure,
pipeline, sweep.

One controller serves the module; its jobs are this machine's processes. Skipped where Slurm cannot be installed, and
where this user may not start daemons.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launch as launcher
from engine.preemption import REQUEUE
from tests.support.helpers import ROOT, composed, launch, rows_of, write_pairs
from tests.test_layout import assert_same
from tests.test_sharding import SGD

pytestmark = pytest.mark.slurm
SERVICE = ROOT / "tests" / "support" / "two_node_slurm.sh"
MULTI_NODE = ROOT / "scripts" / "slurm_multi_node.sh"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Path]:
    """Start the two nodes; the folder is the jobs' working directory."""
    if os.geteuid() != 0:
        pytest.skip("starting Slurm's daemons needs root")
    if not shutil.which("slurmctld"):
        installed = subprocess.run(["bash", str(SERVICE), "install"], capture_output=True, text=True, timeout=600)
        if installed.returncode:
            pytest.skip(f"Slurm cannot be installed here: {installed.stderr[-300:]}")
    folder = tmp_path_factory.mktemp("slurm")
    before = dict(os.environ)
    os.environ |= {
        "SLURM_TEST_DIR": str(folder / "service"),
        "OMP_NUM_THREADS": "1",
        "VENV": sys.prefix,
        "CLUSTER_ENV": "/dev/null",
    }
    (folder / "service").mkdir()
    started = subprocess.run(
        ["bash", str(SERVICE), "start"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    os.environ["SLURM_CONF"] = str(folder / "service" / "slurm.conf")
    try:
        assert "idle" in started.stdout, started.stdout
        yield folder
    finally:
        subprocess.run(["scancel", "--me"], timeout=30)
        deadline = time.time() + 30
        while (
            subprocess.run(["squeue", "--me", "-h"], capture_output=True, timeout=30).stdout and time.time() < deadline
        ):
            time.sleep(0.5)  # or their daemons would outlive the controller
        subprocess.run(["bash", str(SERVICE), "stop"], timeout=60)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def data(slurm: Path) -> Path:
    return write_pairs(slurm / "pairs.jsonl", 22)


def run_overrides(slurm: Path, data: Path, name: str, *more: str) -> list[str]:
    return [
        f"cache_dir={slurm}/runs",
        f"exp_name={name}",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        "loss=dpo",
        *SGD,
        "model.batch_size=8",
        "log_every=1",
        *more,
    ]


def sbatch(slurm: Path, *words: str | Path) -> str:
    """Submit and return the job's number."""
    line = ["sbatch", "--parsable", f"--output={slurm}/%j.out", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=slurm, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def facts(job: str) -> dict[str, str]:
    """Return what scontrol says of a job."""
    for _ in range(3):  # the controller of a busy machine misses a call now and then
        shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=60)
        if shown.returncode == 0:
            break
        time.sleep(2)
    assert shown.returncode == 0, shown.stderr
    return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))


def wait_for(job: str, states: tuple[str, ...], timeout: float) -> dict[str, str]:
    """Wait until a job is in one of the states; a requeued one waits 5 seconds instead of Slurm's two minutes.

    At once would be too early: the nodes still revoke the credentials of its first run.
    """
    deadline = time.time() + timeout
    while (found := facts(job))["JobState"] not in states:
        assert time.time() < deadline, found
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
            time.sleep(5)
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True, timeout=30)
        time.sleep(0.3)
    return found


def log(slurm: Path, job: str) -> str:
    return (slurm / f"{job}.out").read_text(errors="replace")


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def finished(slurm: Path, job: str, timeout: float = 240) -> None:
    """Wait for a job that has to end well."""
    found = wait_for(job, ENDED, timeout)
    assert found["JobState"] == "COMPLETED", log(slurm, job)[-3000:]


def result(slurm: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    folder = slurm / "runs" / name
    return load_file(folder / "FINAL" / "model.safetensors"), rows_of(folder / "metrics.jsonl")


def test_two_nodes_give_the_parameters_of_one_process(slurm, data):
    job = sbatch(slurm, MULTI_NODE, *run_overrides(slurm, data, "two", "n_steps=3"))
    launcher.run_task(composed(*run_overrides(slurm, data, "one", "n_steps=3")))
    finished(slurm, job)
    assert "2 process(es)" in log(slurm, job)
    assert facts(job)["NodeList"] == "n[1-2]"
    assert_same(result(slurm, "one"), result(slurm, "two"))


def test_an_interactive_allocation_runs_the_same_on_both_nodes(slurm, data):
    line = ["salloc", "--nodes=2", "--ntasks-per-node=1", str(ROOT / "scripts" / "slurm_interactive.sh")]
    run = subprocess.run(
        [*line, *run_overrides(slurm, data, "tried", "n_steps=3")],
        capture_output=True,
        text=True,
        cwd=slurm,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    launcher.run_task(composed(*run_overrides(slurm, data, "alone", "n_steps=3")))
    assert "2 process(es)" in run.stdout
    assert_same(result(slurm, "alone"), result(slurm, "tried"))


@pytest.fixture(scope="module")
def uninterrupted(slurm, data) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The result of 120 steps on two nodes."""
    finished(slurm, sbatch(slurm, MULTI_NODE, *run_overrides(slurm, data, "whole", "n_steps=120")))
    return result(slurm, "whole")


@pytest.mark.parametrize("to", ["batch", "steps"])
def test_a_warned_job_is_requeued_and_ends_with_the_bits_of_the_uninterrupted_one(slurm, data, uninterrupted, to):
    """`to`: Slurm's own --signal=B:USR1 reaches the batch script; scancel --signal the ranks themselves."""
    job = sbatch(slurm, MULTI_NODE, *run_overrides(slurm, data, f"warned_{to}", "n_steps=120"))
    metrics, deadline = slurm / "runs" / f"warned_{to}" / "metrics.jsonl", time.time() + 200
    while not (metrics.is_file() and len(rows_of(metrics)) >= 3):
        assert time.time() < deadline and facts(job)["JobState"] in ("PENDING", "RUNNING"), log(slurm, job)[-3000:]
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR1", *(["--batch"] if to == "batch" else []), job], check=True, timeout=30)
    assert wait_for(job, ("PENDING", *ENDED), 90)["JobState"] == "PENDING", log(slurm, job)[-3000:]
    saved = [p.parent.name for p in metrics.parent.glob("checkpoint-*/DONE")]
    assert len(saved) == 1 and 3 <= int(saved[0].split("-")[1]) < 120
    finished(slurm, job)
    assert facts(job)["Restarts"] == "1" and "resumed from" in log(slurm, job) and f"{REQUEUE}" in log(slurm, job)
    (one, rows), (other, other_rows) = uninterrupted, result(slurm, f"warned_{to}")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [r["loss/train"] for r in rows] == [r["loss/train"] for r in other_rows]


def test_a_canceled_job_stays_canceled(slurm, data):
    job = sbatch(slurm, MULTI_NODE, *run_overrides(slurm, data, "canceled", "n_steps=100000", "log_every=1"))
    metrics, deadline = slurm / "runs" / "canceled" / "metrics.jsonl", time.time() + 200
    while not metrics.is_file() and time.time() < deadline:
        time.sleep(0.1)
    subprocess.run(["scancel", job], check=True, timeout=30)
    assert wait_for(job, ENDED, 60)["JobState"] == "CANCELLED"
    time.sleep(2)
    assert facts(job)["JobState"] == "CANCELLED" and facts(job)["Restarts"] == "0"


def test_a_rank_that_dies_ends_the_whole_job(slurm, data):
    job = sbatch(slurm, MULTI_NODE, *run_overrides(slurm, data, "dies", "n_steps=100000"))
    metrics, deadline = slurm / "runs" / "dies" / "metrics.jsonl", time.time() + 200
    while not metrics.is_file() and time.time() < deadline:
        time.sleep(0.1)
    victim = next(p for p in our_ranks(job) if p[1] == "1")
    os.kill(victim[0], signal.SIGKILL)
    found = wait_for(job, ENDED, 45)
    assert found["JobState"] == "FAILED" and found["ExitCode"] != "0:0" and found["Restarts"] == "0"
    assert "task 1: Killed" in log(slurm, job)


def our_ranks(job: str) -> list[tuple[int, str]]:
    """Return (process, rank) of a job's ranks, which are processes of this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            env = dict(e.split("=", 1) for e in (folder / "environ").read_text().split("\0") if "=" in e)
            line = (folder / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if (
            env.get("SLURM_JOB_ID") == job
            and "launch.py" in line
            and "RANK" in env
            and "srun" not in line.split("\0")[0]
        ):
            found.append((int(folder.name), env["RANK"]))
    return found


def test_a_mistake_ends_the_job_with_its_message(slurm, data):
    job = sbatch(slurm, MULTI_NODE, *run_overrides(slurm, data, "mistake", "model.batch_size=7"))
    found = wait_for(job, ENDED, 120)
    assert found["JobState"] == "FAILED" and found["Restarts"] == "0"
    assert "model.batch_size=7" in log(slurm, job) and "Traceback" not in log(slurm, job)


def test_a_pipeline_is_a_chain_of_jobs_and_finished_stages_get_none(slurm):
    from tests.test_pipeline import only

    line = [
        sys.executable,
        str(ROOT / "scripts" / "submit_pipeline.py"),
        "pipeline=quickstart",
        f"cache_dir={slurm}/chain",
        *only("world", "student_sft", "student_dpo_nll"),
        "++n_steps=3",
        "++n_examples=64",
        "++n_eval_examples=16",
    ]
    first = subprocess.run(line, capture_output=True, text=True, cwd=slurm, timeout=120)
    assert first.returncode == 0, first.stderr
    jobs = re.findall(r"^(\d+)  ", first.stdout, re.M)
    assert len(jobs) == 4 and f"student_sft  after {jobs[0]}" in first.stdout
    again = subprocess.run(line, capture_output=True, text=True, cwd=slurm, timeout=120)
    assert set(re.findall(r"^(\d+)  ", again.stdout, re.M)) <= set(jobs), "a queued stage was submitted again"
    for job in jobs:
        assert wait_for(job, ENDED, 240)["JobState"] == "COMPLETED", [
            p.read_text()[-1500:] for p in (slurm / "chain" / "slurm").glob("*.out")
        ]
    assert len(list((slurm / "chain" / "stages").glob("*/DONE"))) == 3
    third = subprocess.run(line, capture_output=True, text=True, cwd=slurm, timeout=120)
    assert re.findall(r"^\d+  (\S+)", third.stdout, re.M) == ["results"]


def test_a_submitit_sweep_runs_on_slurm_and_a_second_call_skips_both(slurm, data):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    line = [
        "-m",
        "hydra/launcher=submitit_slurm_cpu",
        *run_overrides(slurm, data, "sweep", "n_steps=2"),
        "loss.beta=0.1,0.3",
    ]
    first = launch(*line, timeout=300, cwd=slurm)
    assert first.returncode == 0, first.stderr[-3000:]
    done = sorted((slurm / "runs" / "sweep").glob("*/DONE"))
    assert [p.parent.name for p in done] == ["loss.beta=0.1", "loss.beta=0.3"]
    before = [p.stat().st_mtime_ns for p in done]
    second = launch(*line, timeout=300, cwd=slurm)
    assert second.returncode == 0, second.stderr[-3000:]
    assert [p.stat().st_mtime_ns for p in done] == before
    logs = "".join(p.read_text() for p in (slurm / "runs" / "sweeps" / ".submitit").rglob("*_log.out"))
    assert logs.count("already done") == 2
