"""Commands that checks start: launch.py to its end, and vLLM's own server for a while."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_here(words: list[str]) -> None:
    """Run launch.py; ValueError with the end of what it said."""
    done = subprocess.run([sys.executable, "launch.py", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{shlex.join(words[:2])}: {done.stderr.strip()[-300:]}")


class VllmServer:
    """vLLM's own server with all that scoring needs, in float32, given ids included; ended with the block."""

    def __init__(self, folder: Path, name: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.root, self.log = f"http://127.0.0.1:{port}", folder.parent / f"{name}.log"
        flags = [f"--model={folder}", f"--served-model-name={name}", f"--port={port}", "--host=127.0.0.1"]
        flags += ["--dtype=float32", "--enable-scale-out", "--max-logprobs=50", "--max-model-len=1100"]
        flags += ["--enforce-eager", "--gpu-memory-utilization=0.4"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"},
        )

    def __enter__(self) -> "VllmServer":
        """Wait until it is healthy."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.root}/health", timeout=5)
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise ValueError(f"vLLM's server did not come up: {self.log.read_text()[-300:]}")

    def __exit__(self, *_: object) -> None:
        """End it with all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
