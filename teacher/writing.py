"""The loop that writes what teachers say into a cache: who scores goes on while a thread packs and writes.

What is on disk comes in the order of the batches. It is made safe every few seconds, so a kill costs those seconds at
most: the same command asks for what is missing.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType

from tqdm import tqdm

from dataloader import Tokens
from teacher.cache import Arrays, Writer

FLUSH_SECONDS = 5.0  # between two fsyncs of each file, which take as long as scoring a small batch
WAITING = 4  # batches scored and not yet written, at most: a slow disk holds the device back, memory does not grow

Scored = list[Arrays] | Callable[[], list[Arrays]]  # the arrays of each row of a batch, or what waits for them


class Background:
    """Write batches in a thread, in the order of `add`; an error there is raised by the next `add`, or at the end.

    On the way out what was added is written and safe, whatever ended the scoring.
    """

    def __init__(self, writer: Writer, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.writer, self.flush_seconds = writer, flush_seconds
        self.error: BaseException | None = None
        self.queue: queue.Queue[tuple[list[Tokens], Scored] | None] = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, name="cache writer", daemon=True)

    def __enter__(self) -> "Background":
        self.thread.start()
        return self

    def add(self, rows: list[Tokens], scored: Scored) -> None:
        """Hand over a batch; wait while too many are not written."""
        if self.error is not None:
            raise self.error
        self.queue.put((rows, scored))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.queue.put(None)
        self.thread.join()
        if self.error is None:
            self.writer.flush()
            return
        with suppress(OSError):  # what is whole is kept where the disk takes it
            self.writer.flush()
        if error is None:
            raise self.error

    def _work(self) -> None:
        flushed = -math.inf  # the first batch at once: a disk that takes nothing shows before hours of work
        while (item := self.queue.get()) is not None:
            if self.error is not None:
                continue  # whoever adds must never wait for a thread that has ended
            try:
                rows, scored = item
                for row, arrays in zip(rows, scored() if callable(scored) else scored, strict=True):
                    self.writer.add(row.ids, row.response, arrays)
                if time.monotonic() - flushed >= self.flush_seconds:
                    self.writer.flush()
                    flushed = time.monotonic()
            except BaseException as error:  # whatever it is, it is the main thread's to raise
                self.error = error


def score_all(
    todo: list[list[Tokens]],
    writer: Writer,
    scorer: Callable[[list[Tokens]], Scored],
    what: str,
    show: bool,
    flush_seconds: float = FLUSH_SECONDS,
) -> None:
    """Score batches and write each as soon as it is known, while the next one is scored."""
    write_all(todo, map(scorer, todo), writer, what, show, flush_seconds)


def write_all(
    todo: list[list[Tokens]],
    scored: Iterable[Scored],
    writer: Writer,
    what: str,
    show: bool,
    flush_seconds: float = FLUSH_SECONDS,
) -> None:
    """Write batches as their arrays come, in the order of `todo`; the bar counts response tokens, and so time left."""
    batches = 0
    with (
        tqdm(
            total=sum(row.num_supervised for batch in todo for row in batch),
            desc=what,
            mininterval=1,
            disable=not show,
            unit=" tokens",
            unit_scale=True,
        ) as bar,
        Background(writer, flush_seconds) as background,
    ):
        for batch, found in zip(todo, scored, strict=True):
            background.add(batch, found)
            batches += 1
            bar.set_postfix_str(f"batch {batches} of {len(todo)}", refresh=False)
            bar.update(sum(row.num_supervised for row in batch))
