"""What a run leaves on disk: whole files and folders, DONE, rows of JSONL, and going on behind what a kill left.

A file or a folder is written beside its place, under a name of this process, and then renamed. Whoever reads it finds
the old one or the new one, never a part. What a kill leaves under such a name goes when the run is started again.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

DONE = "DONE"  # written last into a folder: without it nothing there is trusted
Row = dict[str, Any]
_PART = re.compile(r".+\.(\d+)\.tmp")


def part_of(path: Path) -> Path:
    """Return the name beside `path` under which this process writes it."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def remove_parts(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left half written in a folder and one level below; the folder's owner calls this."""
    for part in [*folder.glob(f"{name}.*.tmp"), *folder.glob(f"*/{name}.*.tmp")]:
        found = _PART.fullmatch(part.name)
        own = part.parent == folder or not (part.parent / "config.yaml").is_file()  # else it is another run's
        if not own or not found or _works(int(found[1])):
            continue
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _works(pid: int) -> bool:
    """Tell whether another process of this machine has that number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


# ---- files


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; OSError names the file, and what stood there before still does."""
    part = part_of(path)
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write a JSONL file whole or not at all."""
    write_text(path, "".join(_line(row) for row in rows))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


# ---- folders


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder of this process; it takes the place of `folder` where the block ends without an error."""
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, folder: Path) -> None:
    """Rename `part` to `folder`, whatever stands there; another process may be doing the same."""
    old = part_of(folder.with_name(f"{folder.name}.old"))
    while True:
        try:
            os.rename(part, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(folder, old)  # at once: a folder that is half removed never stands under its name
        except FileNotFoundError:
            continue
        shutil.rmtree(old, ignore_errors=True)


def mark_done(folder: Path) -> None:
    """Say that everything in the folder is written."""
    (folder / DONE).touch()


def is_done(folder: Path) -> bool:
    """Tell whether everything in the folder is written."""
    return (folder / DONE).is_file()


def remove_folder(folder: Path) -> None:
    """Remove a folder; its DONE goes first, should a kill leave the rest."""
    (folder / DONE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


# ---- rows


def read_json(path: Path) -> Row:
    """Return the object of a JSON file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL file; a broken line is a ValueError with file and line number."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parsed_row(line, path, number)


def parsed_row(line: str | bytes, path: Path, number: int) -> Row:
    """Return the object on a line; ValueError names file and line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        what = getattr(error, "msg", str(error))
        raise ValueError(f"{path}, line {number}: not valid JSON ({what}): {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: a row must be an object, this is {type(row).__name__}")
    return row


def append_row(out: TextIO, row: Row) -> None:
    """Append a row at once; it is whole when its line break is written."""
    out.write(_line(row))
    out.flush()


def whole_rows(path: Path) -> Iterator[tuple[Row, int]]:
    """Yield each whole row of a file that a killed run was writing, and the bytes up to its end; none without a file.

    A kill tears the last line only: any other broken one is a ValueError.
    """
    size = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return
        size += len(line)
        yield parsed_row(line, path, number), size


def resumed_rows(path: Path) -> list[Row]:
    """Return the whole rows of a file that a killed run was writing, and cut a torn last one off."""
    rows, size = [], 0
    for row, size in whole_rows(path):  # noqa: B007  the last size counts
        rows.append(row)
    if path.is_file():
        os.truncate(path, size)
    return rows
