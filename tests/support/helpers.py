"""What tests share: composing a config in process, running the command line, small data files."""

import atexit
import copy
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.composing import Line, laid_over
from pipeline.warm import Process, WarmStart
from settings.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
GROUPS = ("loss", "model", "datasets")  # chosen, not set
WORDS = "ant bee cat dog elk fox gnu hen ibis jay kite lynx mole newt owl pig".split()


def composed(*overrides: str, config_name: str = "config") -> dict[str, Any]:
    """Compose config/ with overrides, as launch.py does; Hydra is asked once for each choice of groups."""
    named = [word.partition("=")[0] for word in overrides]
    task = [word.partition("=")[2] for word in overrides if word.startswith("task=")]
    choices = tuple(word for word, key in zip(overrides, named, strict=True) if key in GROUPS)
    values = tuple(word for word, key in zip(overrides, named, strict=True) if key not in (*GROUPS, "task"))
    raw = None
    if config_name == "config" and task in ([], ["train"], *([name] for name in TASKS)):
        raw = laid_over(_chosen(choices), Line(task[0] if task else "train", choices, (), values))
    if raw is None:  # what only Hydra can do
        raw = _by_hydra(overrides, config_name)
    raw = copy.deepcopy(raw)
    raw.pop("pipeline", None)
    raw["datasets"] = raw.get("datasets") or {}
    return raw


def _by_hydra(overrides: tuple[str, ...], config_name: str = "config") -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        return OmegaConf.to_container(compose(config_name, list(overrides)), resolve=True)


@functools.cache
def _chosen(choices: tuple[str, ...]) -> dict[str, Any]:
    return _by_hydra(choices)


@functools.cache
def warm_start() -> WarmStart:
    """Return this process's warm start: torch is imported once for all the commands of its tests."""
    server = WarmStart({**os.environ, **ALONE})
    atexit.register(server.close)
    return server


def begin(
    *args: str, log: Path, error: Path | None = None, env: dict[str, str] | None = None, program: str = "launch.py"
) -> Process:
    """Start `launch.py ARGS`, forked from the warm start; its output is appended to `log`, its errors to `error`."""
    argv, environment = [str(ROOT / program), *args], {**os.environ, **ALONE, **(env or {})}
    with log.open("ab") as out, (error or log).open("ab") as err:
        return warm_start().start(argv, environment, out.fileno(), err.fileno())


def launch(
    *args: str, env: dict[str, str] | None = None, timeout: float = 180, cwd: Path = ROOT, python: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run launch.py as a user would; with `env`, `cwd` or `python` it starts afresh."""
    if not (env or python or cwd != ROOT):
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            process = begin(*args, log=out, error=err)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            return subprocess.CompletedProcess(args, code, out.read_text("utf-8"), err.read_text("utf-8"))
    return subprocess.run(
        [python or sys.executable, str(ROOT / "launch.py"), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def write_pairs(path: Path, count: int, start: int = 0) -> Path:
    """Write pairs in messages format with responses of ragged lengths."""
    with path.open("w", encoding="utf-8") as out:
        for i in range(start, start + count):
            prompt = {"role": "user", "content": f"say {WORDS[i % 16]} {i}"}
            good = " ".join(WORDS[(i + j) % 16] for j in range(1 + i % 5))
            bad = " ".join(WORDS[(i * 3 + j) % 16] for j in range(1 + (i * 7) % 4))
            row = {
                "chosen": [prompt, {"role": "assistant", "content": good + "!"}],
                "rejected": [prompt, {"role": "assistant", "content": bad + "?"}],
            }
            out.write(json.dumps(row) + "\n")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def free_port() -> str:
    """Return a port that nobody has now, below those that the system gives to clients: it stays free for a while."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port)
    raise RuntimeError("no free port between 20000 and 30000")
