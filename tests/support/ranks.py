"""Several ranks of one program on this machine, forked from the warm start: what torchrun does, without its imports."""

import os
import signal
import time
from pathlib import Path

from tests.support.helpers import begin, free_port


class Ranks:
    """Two processes of launch.py, or of another program; each rank's output is in a file of its own."""

    def __init__(
        self, *args: str, folder: Path, program: str = "launch.py", env: dict[str, str] | None = None, count: int = 2
    ) -> None:
        together = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        together |= {"MASTER_PORT": free_port(), **(env or {})}
        number = len(list(folder.glob("ranks_*_0.txt")))
        self.logs = [folder / f"ranks_{number}_{rank}.txt" for rank in range(count)]
        self.processes = [
            begin(*args, log=log, env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}, program=program)
            for rank, log in enumerate(self.logs)
        ]

    def poll(self) -> int | None:
        """Return the exit code once all have ended, or of the first that failed; None while they run."""
        codes = [process.poll() for process in self.processes]
        failed = [code for code in codes if code]
        return failed[0] if failed else (0 if None not in codes else None)

    def wait(self, timeout: float) -> int:
        """Wait until all have ended, or one failed and the others are ended, and return the exit code."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        code = self.poll()
        self.kill()  # one that failed leaves the other waiting
        return -signal.SIGKILL if code is None else code

    def kill(self) -> None:
        """End them all with SIGKILL."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)

    def output(self, timeout: float = 300) -> str:
        """Wait until all have ended well and return what they printed, rank 0 first; AssertionError shows a failure."""
        code = self.wait(timeout)
        assert code == 0, f"{code}\n" + "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs)
        return "".join(log.read_text() for log in self.logs)
