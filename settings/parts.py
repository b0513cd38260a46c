"""Rows that the processes of a run make together: each appends to a file of its own, and the first one merges.

Rank 0 writes NAME.jsonl itself, as one process does; rank r NAME.rank-0000r.jsonl beside it. They share these files and
nothing else: no collective, so a slow process meets no limit of a process group. A kill tears the last row of a file
only, and whoever goes on, with whatever number of processes, reads the rows of all files and makes what is missing.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from settings.artifacts import Row, append_row, whole_rows

POLL_SECONDS = 0.5
T = TypeVar("T")


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what another process writes. No collective: whoever is slow runs into no timeout of a process group."""
    while True:
        started = time.monotonic()
        if condition():
            return
        time.sleep(max(POLL_SECONDS, 5 * (time.monotonic() - started)))


def share_of(pieces: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return the pieces of work of one of several processes: by their number alone, so that nobody has to be asked."""
    return pieces[rank::world_size]


class Parts:
    """The files of rows of one kind; `path` is the one that is left at the end."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.own = path if rank == 0 else path.with_name(f"{path.stem}.rank-{rank:05d}{path.suffix}")
        self.own.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        for _, size in whole_rows(self.own):  # noqa: B007  the last size counts
            pass
        if self.own.is_file():
            os.truncate(self.own, size)  # of others' files a torn row is one that is being written

    def others(self) -> list[Path]:
        """Return the files beside `path`, also those of processes that there are no more."""
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank-*{self.path.suffix}"))

    def rows(self) -> Iterator[tuple[Path, Row]]:
        """Yield every whole row with its file. The others come first: what is merged meanwhile is then found twice."""
        for file in [*self.others(), self.path]:
            with suppress(FileNotFoundError):  # rank 0 has merged it
                yield from ((file, row) for row, _ in whole_rows(file))

    def append(self, row: Row) -> None:
        """Append a row to this process's file; it is there for others at once."""
        with self.own.open("a", encoding="utf-8") as out:
            append_row(out, row)

    def remove_others(self) -> None:
        """Remove the files of the other processes; rank 0 calls this once their rows stand in `path`."""
        for file in self.others():
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove all files, where none is left at the end."""
        self.remove_others()
        self.path.unlink(missing_ok=True)
