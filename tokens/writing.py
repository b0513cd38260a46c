"""Making a token store: by one process for all who want it, with several at work (store.py has the files)."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from settings.artifacts import is_done, remove_parts, whole_folder, write_json
from settings.paths import ROOT
from tokens.store import FILES, NotStorable, Record, Rows, Table, digest_of, open_store, pack, seal, write_tables

CHUNK = 512  # rows that are packed at once
ROWS_A_WORKER = 4096  # a process more for so many rows, where the number of processes is not given


def store(
    base: Path, identity: Mapping[str, Any], numbers: Sequence[int], encode: "Encode", num_proc: int | None
) -> Rows:
    """Return the store of this identity below `base`, written now if it is not there; a broken one is made anew.

    `numbers` are the rows it holds, in order. Raises what `encode` raises, and NotStorable.
    """
    folder = base / digest_of(identity)
    if not is_done(folder):
        with _alone(folder) as locked:
            if not is_done(folder):
                if locked:
                    remove_parts(base, folder.name)
                write_store(folder, identity, numbers, encode, num_proc)
    try:
        return open_store(folder, identity)
    except ValueError as error:
        print(f"{folder}: the stored tokens are not as they were written ({error}): made anew", flush=True)
    with _alone(folder):
        try:
            return open_store(folder, identity)  # another process has done it
        except ValueError:
            write_store(folder, identity, numbers, encode, num_proc)
    return open_store(folder, identity)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the lock of a store; False where the disk has none: then each process writes, and the last one's stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


Encode = Callable[[Sequence[int]], Iterator[Record]]  # row numbers of the source, ascending: their records


def write_store(
    folder: Path, identity: Mapping[str, Any], numbers: Sequence[int], encode: Encode, num_proc: int | None
) -> None:
    """Encode the rows into a folder that takes its name when it is whole; processes take stretches of them."""
    cores = len(os.sched_getaffinity(0))
    workers = num_proc or min(cores, 1 + len(numbers) // ROWS_A_WORKER)
    workers = max(1, min(workers, len(numbers)))
    with whole_folder(folder) as part:
        if workers == 1:
            write_tables(part, _packed(encode(numbers)))
        else:
            bounds = [len(numbers) * i // workers for i in range(workers + 1)]
            stretches = [numbers[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            _join(part, _in_processes(part, stretches, encode))
        seal(part, identity)


def _packed(records: Iterable[Record]) -> Iterator[Table]:
    """Pack records into tables of CHUNK rows."""
    waiting: list[Record] = []
    for record in records:
        waiting.append(record)
        if len(waiting) == CHUNK:
            yield pack(waiting, True)
            waiting = []
    if waiting:
        yield pack(waiting, True)


def _in_processes(part: Path, stretches: list[Sequence[int]], encode: Encode) -> list[Path]:
    """Let a process each write the tables of a stretch; the first stretch's error is raised."""
    folders = [part / f"stretch-{i}" for i in range(len(stretches))]
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library warns of a fork after it has used threads
    try:
        # forked: a new interpreter would import torch for 15 s; the children touch neither it nor a device
        context = get_context("fork")
        children = [
            context.Process(target=_work, args=(folder, numbers, encode, os.getpid()))
            for folder, numbers in zip(folders, stretches, strict=True)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM")
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    for folder, child in zip(folders, children, strict=True):
        if (folder / "error.json").is_file():
            kind, text = json.loads((folder / "error.json").read_text(encoding="utf-8"))
            raise NotStorable(text) if kind == "NotStorable" else ValueError(text)
        if child.exitcode:
            raise RuntimeError(f"a process that tokenizes ended with {child.exitcode}; its error stands above")
    return folders


def _work(folder: Path, numbers: Sequence[int], encode: Encode, parent: int) -> None:
    """Write a stretch, or what is wrong with it; a parent that was killed ends this process, too."""

    def while_wanted() -> Iterator[Table]:
        for table in _packed(encode(numbers)):
            if os.getppid() != parent:
                os._exit(1)
            yield table

    folder.mkdir()
    try:
        write_tables(folder, while_wanted())
    except (ValueError, NotStorable) as error:
        write_json(folder / "error.json", [type(error).__name__, str(error)])


def _join(part: Path, folders: list[Path]) -> None:
    """Put the files of the stretches one after the other."""
    for name in FILES:
        end = 0
        with (part / f"{name}.bin").open("wb") as out:
            for folder in folders:
                if name == "ends":
                    ends = np.fromfile(folder / "ends.bin", np.int64)
                    out.write((ends + end).tobytes())
                    end += int(ends[-1]) if len(ends) else 0
                else:
                    with (folder / f"{name}.bin").open("rb") as file:
                        shutil.copyfileobj(file, out, 1 << 20)
    for folder in folders:
        shutil.rmtree(folder)


@cache
def code_digest() -> str:
    """Hash the code that turns rows into tokens, and the versions of the libraries that it calls."""
    files = [*(ROOT / f"{name}.py" for name in ("conversations", "dataloader", "templates")), *ROOT.glob("tokens/*.py")]
    parts = [file.read_bytes() for file in sorted(files)]
    parts += [version(library).encode() for library in ("tokenizers", "transformers")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
