"""Processes that do a piece of work when they are asked, so that works can take turns: JSON lines over pipes.

The standard library alone: the rivals' environment imports it, too. A message is {"do": WHAT, ...}, and each gets one
answer; {"do": "quit"} ends the process at once, whatever it has begun.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Message = dict[str, Any]


class Served:
    """The worker's side. What others print goes to standard error: standard output speaks the protocol alone."""

    def __init__(self) -> None:
        self.out: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def wait(self) -> Message:
        """Return the next message; the process ends when it is to quit, or when nobody asks any more."""
        line = sys.stdin.readline()
        message: Message = json.loads(line) if line else {"do": "quit"}
        if message["do"] == "quit":
            os._exit(0)  # what a trainer would still save is not wanted
        return message

    def answer(self, **found: Any) -> None:
        """Answer the last message."""
        self.out.write(json.dumps(found) + "\n")
        self.out.flush()


class Worker:
    """The asking side of one process; its standard error goes to a file, whose end a failure shows."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path) -> None:
        self.name, self.log = name, log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=dict(env), cwd=cwd, text=True
            )

    def send(self, do: str, **more: Any) -> None:
        """Send a message without waiting for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.failed() from None

    def receive(self) -> Message:
        """Wait for an answer; RuntimeError shows the end of the log of a process that gave none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self.failed()
        found: Message = json.loads(line)
        return found

    def ask(self, do: str, **more: Any) -> Message:
        """Send a message and wait for its answer."""
        self.send(do, **more)
        return self.receive()

    def failed(self) -> RuntimeError:
        """Return what to raise when the process has ended before its time."""
        code = self.process.wait()
        return RuntimeError(f"{self.name} ended with status {code}:\n{self.log.read_text(errors='replace')[-3000:]}")

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
