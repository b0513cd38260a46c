"""What tests share: composing a config in process, running the command line, small data files."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
WORDS = "ant bee cat dog elk fox gnu hen ibis jay kite lynx mole newt owl pig".split()


def composed(*overrides: str) -> dict[str, Any]:
    """Compose config/ with overrides, as launch.py does."""
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        raw = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    raw.pop("pipeline", None)
    raw["datasets"] = raw.get("datasets") or {}
    return raw


def launch(
    *args: str, env: dict[str, str] | None = None, timeout: float = 180, cwd: Path = ROOT, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run launch.py as a user would."""
    return subprocess.run(
        [python, str(ROOT / "launch.py"), *args],
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
