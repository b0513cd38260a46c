"""A warm start: one process imports torch and the rest once, and forks a Python program for each command.

Importing takes as long as a short stage does. The process computes nothing itself, so it has no thread when it forks.
On a machine with a GPU each command starts afresh instead: CUDA does not survive a fork. A command that was itself
forked, and now runs a pipeline, forks the process for its stages instead of importing again.

Protocol, on a Unix socket: a request is one JSON line {"argv", "environment", "folder"} with the open files that the
child keeps. The answers are lines too: {"pid"} at once, {"pid", "code"} when that child has ended.
"""

import atexit
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra

from settings.paths import ROOT
from settings.source import closure
from settings.tasks import TASKS

LIBRARIES = ("torch.distributed.checkpoint", "datasets", "peft", "trainers.basic")
OPTIONAL = ("deepspeed",)  # where it is installed, accelerate imports it to save any model: two seconds
CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "PreTrainedTokenizerFast")  # read lazily
MAX_FILES = 16  # open files of a request
PATIENCE = 10.0  # seconds for the process to end by itself
is_warm = False  # this process has imported everything and computed nothing


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
        self.pid = os.fork() if is_warm else 0
        if is_warm and self.pid == 0:
            ours.close()
            os.setsid()
            end_with(lambda: serve(theirs))
        with theirs:
            self.server = None if is_warm else _import_and_serve(theirs, environment)
        self.socket, self.rest = ours, b""
        self.children: dict[int, Process] = {}
        self.started: list[int] = []

    def start(
        self, argv: Sequence[str], environment: dict[str, str], output: int, error: int, keep: Sequence[int] = ()
    ) -> Process:
        """Fork `python ARGV` with these open files as its output and error, and `keep` open besides."""
        request = {"argv": list(argv), "environment": environment, "folder": os.getcwd()}
        line = json.dumps(request).encode()
        try:
            socket.send_fds(self.socket, [len(line).to_bytes(4, "big")], [output, error, *keep])
            self.socket.sendall(line)
            while not self.started:
                if not self.listen(1.0):
                    raise BrokenPipeError
        except (BrokenPipeError, ConnectionResetError):
            raise RuntimeError(f"the warm start ended with code {self._ended()}") from None
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
        try:
            self._ended()
        except subprocess.TimeoutExpired:  # it still imports, which takes a minute on a busy machine
            assert self.server is not None
            self.server.kill()
            self.server.wait()

    def _ended(self) -> int:
        if self.server is not None:
            return self.server.wait(PATIENCE)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _import_and_serve(connection: socket.socket, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.warm", str(connection.fileno())],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=(connection.fileno(),),
        start_new_session=True,  # Ctrl-C is for the commands, each in a session of its own
    )


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
            become(request["argv"], request["environment"], request["folder"], files)
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


def become(argv: list[str], environment: dict[str, str], folder: str, files: list[int]) -> NoReturn:
    """Be `python ARGV` from here on, in a session of its own."""
    sys.modules["pipeline.warm"].is_warm = True  # type: ignore[attr-defined]  # here it may be __main__
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files[:2]]):
        os.dup2(file, stream)
    for kept in files[2:]:
        os.set_inheritable(kept, True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    GlobalHydra.instance().clear()  # a pipeline's process has composed its own
    sys.argv = argv
    end_with(lambda: runpy.run_path(argv[0], run_name="__main__"))


def end_with(work: Callable[[], Any]) -> NoReturn:
    """Do the work and end the process as the interpreter does, without unwinding what stood here before the fork."""
    code: Any = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing's children do
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def import_everything() -> None:
    """Import what commands use, and make what each of them would make anew in its first seconds."""
    importlib.import_module("launch")  # first: it sets what torch reads when it is imported
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for no GPU, nor warns; a command has its own environment
    found = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    for name in (*LIBRARIES, *found, *(f"tasks.{task}" for task in TASKS)):
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in CLASSES:
        getattr(transformers, name)
    for task in TASKS:
        closure(f"tasks.{task}")  # the repository's modules, read and parsed, for the digests of runs
    # Names of weights in checkpoints: 1,000 regular expressions, compiled when a model is first loaded or saved.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")


def main() -> None:
    """Import everything; then, where a socket's number is the argument, serve it."""
    import_everything()
    gc.collect()
    gc.freeze()  # a command's collections pass over what lives as long as it does, and leave its memory shared
    if len(sys.argv) > 1:
        connection = socket.socket(fileno=int(sys.argv[1]))
        importlib.import_module("pipeline.warm")  # this file once more, under the name that commands know
        serve(connection)


if __name__ == "__main__":
    main()
