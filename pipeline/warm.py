"""A warm start: one process imports torch and the rest once, and forks a `launch.py` for each command.

Importing takes as long as a short stage does. The process computes nothing itself, so it has no thread when it forks.
On a machine with a GPU each command starts afresh instead: CUDA does not survive a fork.

Protocol, on a Unix socket: a request is one JSON line {"argv", "environment", "folder"} with the open files that the
child keeps. The answers are lines too: {"pid"} at once, {"pid", "code"} when that child has ended.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from settings.paths import ROOT
from settings.tasks import TASKS

LIBRARIES = ("torch.distributed.checkpoint", "datasets", "peft", "trainers.basic")
CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast")  # read lazily
MAX_FILES = 16  # open files of a request


class Process:
    """A command that was forked; what the runner needs of subprocess.Popen."""

    def __init__(self, server: "WarmStart", pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, minus the signal that ended it, or None while it runs."""
        if self.returncode is None:
            self.server.listen(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code; subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.server.listen(0.2)
        return self.returncode


class WarmStart:
    """The side that asks: starts the process, and commands by it. `environment` counts while libraries are imported."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "pipeline.warm", str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the commands, each in a session of its own
            )
        self.socket, self.rest = ours, b""
        self.children: dict[int, Process] = {}
        self.started: list[int] = []

    def start(
        self, argv: Sequence[str], environment: dict[str, str], output: int, error: int, keep: Sequence[int] = ()
    ) -> Process:
        """Fork `launch.py ARGV` with these open files as its output and error, and `keep` open besides."""
        request = {"argv": list(argv), "environment": environment, "folder": os.getcwd()}
        line = json.dumps(request).encode()
        try:
            socket.send_fds(self.socket, [len(line).to_bytes(4, "big")], [output, error, *keep])
            self.socket.sendall(line)
            while not self.started:
                if not self.listen(1.0):
                    raise BrokenPipeError
        except (BrokenPipeError, ConnectionResetError):
            raise RuntimeError(f"the warm start ended with code {self.server.wait()}") from None
        pid = self.started.pop()
        self.children[pid] = Process(self, pid)
        return self.children[pid]

    def listen(self, seconds: float) -> bool:
        """Read what the other side has to say; if it is gone, end the commands, whose codes nobody can tell."""
        if not select.select([self.socket], [], [], seconds)[0]:
            return True
        read = self.socket.recv(1 << 16)
        if not read:
            for pid, child in self.children.items():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                child.returncode = -signal.SIGKILL
            self.children.clear()
            return False
        *lines, self.rest = (self.rest + read).split(b"\n")
        for answer in map(json.loads, lines):
            if "code" in answer:
                self.children.pop(answer["pid"]).returncode = answer["code"]
            else:
                self.started.append(answer["pid"])
        return True

    def close(self) -> None:
        """End the process; commands that still run go on."""
        self.socket.close()
        self.server.wait(timeout=30)


# ---- the other side


def serve(connection: socket.socket) -> None:
    """Fork commands until the side that asks is gone."""
    children: set[int] = set()
    while True:
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.remove(pid)
                _answer(connection, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})
        if not select.select([connection], [], [], 0.02 if children else None)[0]:
            continue
        head, files, _, _ = socket.recv_fds(connection, 4, MAX_FILES)
        if not head:
            return
        request = json.loads(_read(connection, int.from_bytes(head, "big")))
        pid = os.fork()
        if pid == 0:
            connection.close()
            return become(request["argv"], request["environment"], request["folder"], files)
        for file in files:
            os.close(file)
        children.add(pid)
        _answer(connection, {"pid": pid})


def _answer(connection: socket.socket, answer: dict[str, int]) -> None:
    try:
        connection.sendall(json.dumps(answer).encode() + b"\n")
    except BrokenPipeError:  # the side that asked is gone; the next read says so
        pass


def _read(connection: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        parts += connection.recv(size - len(parts))
    return parts


def become(argv: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    """Be `launch.py ARGV` from here on, in a session of its own; whoever calls has nothing left to do."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files[:2]]):
        os.dup2(file, stream)
    sys.argv = [str(ROOT / "launch.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Import everything, then serve the socket whose number is the argument."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    importlib.import_module("launch")  # first: it sets what torch reads when it is imported
    for name in (*LIBRARIES, *(f"tasks.{task}" for task in TASKS)):
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in CLASSES:
        getattr(transformers, name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(connection)


if __name__ == "__main__":
    main()
