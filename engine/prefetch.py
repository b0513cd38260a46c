"""One step ahead: what the next step needs is made in a thread while this step computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Give `make(step)` for one step after the other, the next one already begun; at most one waits.

    `make` must be a function of the step alone: then what comes out is what it would be without a thread. Its error is
    raised where its step is asked for.
    """

    def __init__(self, make: Callable[[int], T], last: int) -> None:
        self.make, self.last = make, last
        self.thread = ThreadPoolExecutor(1, "prefetch")
        self.begun: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """Return what a step needs, and begin with the next one."""
        begun, self.begun = self.begun, None
        found = begun[1].result() if begun is not None and begun[0] == step else self.make(step)
        if step < self.last:
            self.begun = step + 1, self.thread.submit(self.make, step + 1)
        return found

    def close(self) -> None:
        """End the thread; what it has begun is not waited for longer than it takes."""
        self.thread.shutdown(cancel_futures=True)
