"""A process that has imported everything and forks a `launch.py` on request: a start costs a second, not eight.

`python -m tests.support.zygote` reads {"argv": [...], "log": path} or {"wait": pid} a line and answers with a pid or an
exit code. It computes nothing itself, so no thread exists when it forks; a child is killed as any process is.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from tests.support.helpers import ROOT


class Zygote:
    """The test's side: start commands, wait for them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )

    def ask(self, request: dict) -> int:
        """Send a request and return the number that answers it."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, argv: list[str], log: Path) -> int:
        """Fork `launch.py ARGV`, whose output goes to a file; return its pid."""
        return self.ask({"argv": argv, "log": str(log)})

    def wait(self, pid: int) -> int:
        """Return the exit code of a child that has ended or will: minus the signal that killed it."""
        return self.ask({"wait": pid})

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=10)


def child(argv: list[str], log: str) -> None:
    """Become `launch.py ARGV`; does not return."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(ROOT / "launch.py"), *argv]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve requests until the input ends."""
    import accelerate  # noqa: F401
    import hydra  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import trainers.dpo  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(request["argv"], request["log"])
        print(pid, flush=True)


if __name__ == "__main__":
    main()
