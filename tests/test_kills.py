"""Twenty kills at random moments of a run, of task=cache and of a pipeline: nothing is lost, the same bits come out.

A kill is SIGKILL to every process of the command. One in five hits the start-up. The others come at a random moment
within `window` seconds after the run has gone on from where the last one was killed: a slow machine goes on, too.
"""

import hashlib
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

import models
from pipeline.warm import Process
from settings.schema import ModelConfig, typed
from tests.support.helpers import ROOT, begin, composed, write_pairs
from tests.support.ranks import Ranks
from tests.support.scoring_server import ScoringServer
from tests.test_resume import without_timing

SEED = 20261121


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it may go between two questions
        return False


def kill_all(process: Process | Ranks) -> None:
    """Kill a command with all its descendants, whatever process groups they have."""
    family: list[psutil.Process] = []
    for root in getattr(process, "processes", [process]):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            family += [*psutil.Process(root.pid).children(recursive=True), psutil.Process(root.pid)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    deadline = time.time() + 30
    while any(alive(member.pid) for member in family) and time.time() < deadline:
        time.sleep(0.005)


def survive(
    start: Callable[..., Process | Ranks],
    command: Callable[[], list[str]],
    log: Path,
    kills: int,
    state: Callable[[], object],
    start_up: float,
    window: float,
) -> int:
    """Start the command `kills` times and kill it, then let it end; return how many kills came while it worked.

    `state` is anything that changes when the work goes on; `start_up` is about how long a start takes, in seconds.
    """
    rng, at_work = random.Random(SEED), 0
    for _ in range(kills):
        before, process = state(), start(*command(), log=log)
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, start_up))
        else:
            deadline = time.time() + 120
            while state() == before and process.poll() is None and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, window))
            at_work += process.poll() is None
        kill_all(process)
        process.wait(timeout=30)
    assert start(*command(), log=log).wait(timeout=400) == 0, log.read_text(errors="replace")[-3000:]
    return at_work


def files_of(folder: Path, *patterns: str) -> dict[str, str]:
    """Return the digest of every file."""
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    assert found, f"{folder} has nothing that matches {patterns}"
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def training(base: Path, name: str, steps: int) -> list[str]:
    return [
        "loss=dpo",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={base}/pairs.jsonl",
        f"datasets.local.test={base}/pairs.jsonl",
        f"cache_dir={base}",
        f"exp_name={name}",
        "lr=1e-3",
        f"n_steps={steps}",
        "log_every=1",
        "save_every=3",
        "eval_every=50",
        "model.batch_size=8",
    ]


def checkpoints(folder: Path) -> Callable[[], object]:
    return lambda: sorted(path.parent.name for path in folder.glob("checkpoint-*/DONE"))


@pytest.mark.slow
def test_a_run_survives_twenty_kills(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 30)
    assert begin(*training(tmp_path, "whole", 240), log=tmp_path / "whole.log").wait(timeout=400) == 0
    state, log = checkpoints(tmp_path / "killed"), tmp_path / "killed.log"
    killed = survive(begin, lambda: training(tmp_path, "killed", 240), log, 20, state, start_up=1.5, window=0.3)
    assert killed >= 12
    kept = ("FINAL/*.safetensors", "FINAL/config.json")
    assert files_of(tmp_path / "whole", *kept) == files_of(tmp_path / "killed", *kept)
    rows = without_timing(tmp_path / "killed" / "metrics.jsonl")
    assert rows == without_timing(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss/train" in row] == list(range(1, 241))
    left = {path.name for path in (tmp_path / "killed").iterdir()} - {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert not left  # no torn checkpoint stays


@pytest.mark.distributed
def test_two_processes_survive_kills(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 30)

    def two(*argv: str, log: Path) -> Ranks:
        return Ranks(*argv, folder=log.parent)

    def command(name: str) -> list[str]:
        return training(tmp_path, name, 60)

    state, log = checkpoints(tmp_path / "killed"), tmp_path / "killed.log"
    killed = survive(two, lambda: command("killed"), log, 5, state, start_up=2.0, window=0.3)
    assert killed >= 3
    assert two(*command("whole"), log=log).wait(timeout=400) == 0
    assert files_of(tmp_path / "whole", "FINAL/*.safetensors") == files_of(tmp_path / "killed", "FINAL/*.safetensors")
    assert without_timing(tmp_path / "killed" / "metrics.jsonl") == without_timing(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.slow
def test_a_teacher_cache_survives_twenty_kills(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 1500)

    def command(name: str) -> list[str]:
        data = [
            "model=tiny",
            "datasets=[local]",
            f"datasets.local.train={tmp_path}/pairs.jsonl",
            f"cache_dir={tmp_path}",
        ]
        often = "cache.flush_seconds=0.05"  # a start lives for a fifth of a second
        return ["task=cache", *data, f"exp_name={name}", "cache.top_k=8", "cache.batch_size=2", often]

    assert begin(*command("whole"), log=tmp_path / "whole.log").wait(timeout=400) == 0
    index, log = tmp_path / "killed" / "CACHE" / "shard-00000" / "index.bin", tmp_path / "killed.log"
    size = lambda: index.stat().st_size if index.is_file() else 0  # noqa: E731
    assert survive(begin, lambda: command("killed"), log, 20, size, start_up=1.5, window=0.2) >= 12
    # the order of sequences is fixed, so the arrays are equal byte by byte; meta.json holds the command with its
    # exp_name
    assert files_of(tmp_path / "whole", "CACHE/shard-*/*") == files_of(tmp_path / "killed", "CACHE/shard-*/*")
    names = [sorted(path.name for path in (tmp_path / name / "CACHE").iterdir()) for name in ("whole", "killed")]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("quantity, kills", [("logprob", 5), ("advantage", 20)])
def test_a_cache_of_served_teachers_survives_kills(tmp_path: Path, quantity: str, kills: int) -> None:
    """Answers of 8 requests at once come in any order; what is on disk comes in one."""
    write_pairs(tmp_path / "pairs.jsonl", 500)
    config = typed(composed("model=tiny")["model"], ModelConfig)
    tokenizer = models.load_tokenizer(config)
    seeds = {"teacher": 5, "start": 6}
    served = [
        ScoringServer(models.load_model(replace(config, build_seed=seed), trainable=False), tokenizer, name)
        for name, seed in seeds.items()
    ]

    def command(name: str) -> list[str]:
        data = [
            "model=tiny",
            "datasets=[local]",
            f"datasets.local.train={tmp_path}/pairs.jsonl",
            f"cache_dir={tmp_path}",
        ]
        urls = [f"cache.base_url={served[0].url}"]
        if quantity == "advantage":
            urls.append(f"cache.reference_base_url={served[1].url}")
        size = ["cache.top_k=8", "cache.batch_size=2"]
        return ["task=cache", *data, f"exp_name={name}", *size, "cache.backend=server", *urls]

    assert begin(*command("whole"), log=tmp_path / "whole.log").wait(timeout=400) == 0
    index, log = tmp_path / "killed" / "CACHE" / "shard-00000" / "index.bin", tmp_path / "killed.log"
    size = lambda: index.stat().st_size if index.is_file() else 0  # noqa: E731
    before = len(served[0].requests)
    killed = survive(begin, lambda: command("killed"), log, kills, size, start_up=1.5, window=0.2)
    for server in served:
        server.shutdown()
        server.server_close()
    assert killed >= 0.6 * kills
    assert files_of(tmp_path / "whole", "CACHE/shard-*/*") == files_of(tmp_path / "killed", "CACHE/shard-*/*")
    names = [sorted(path.name for path in (tmp_path / name / "CACHE").iterdir()) for name in ("whole", "killed")]
    assert names[0] == names[1] and "served.json" in names[0]
    # a kill costs a probe and at most what was under way: 32 sequences, and 2 of a batch
    assert len(served[0].requests) - before <= before + kills * (1 + 32 + 2)


@pytest.mark.slow
def test_a_pipeline_survives_twenty_kills(tmp_path: Path) -> None:
    """Teacher SFT -> teacher DPO -> cache on the small world: whichever stage is at work, and whatever it is doing."""
    kept = ("world", "teacher_sft", "teacher_dpo", "cache_logprobs")
    stages = yaml.safe_load((ROOT / "config/pipeline/quickstart.yaml").read_text())["stages"]
    off = [f"pipeline.stages.{name}=null" for name in stages if name not in kept]
    short = [
        "pipeline.stages.teacher_sft.set.n_steps=40",
        "pipeline.stages.teacher_dpo.set.n_steps=20",
        "n_examples=300",
        "++save_every=5",
    ]

    def command(base: str) -> list[str]:
        return ["pipeline=quickstart", *off, *short, f"cache_dir={tmp_path / base}"]

    folder = tmp_path / "killed" / "stages"

    def state() -> object:
        return sorted(str(path) for pattern in ("*/DONE", "*/checkpoint-*/DONE") for path in folder.glob(pattern))

    whole = begin(*command("whole"), log=tmp_path / "whole.log")
    # most kills come at any moment: stages take seconds to start, and there are four of them
    survive(begin, lambda: command("killed"), tmp_path / "killed.log", 20, state, start_up=6.0, window=1.0)
    assert whole.wait(timeout=400) == 0
    results = [
        files_of(tmp_path / base / "stages", "*/FINAL/*.safetensors", "*/CACHE/shard-*/*")
        for base in ("whole", "killed")
    ]
    assert results[0] == results[1] and {name.split("-")[0] for name in results[0]} == set(kept) - {"world"}
