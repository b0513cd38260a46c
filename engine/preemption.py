"""A scheduler's warning (SIGUSR1, SIGTERM): checkpoint at the next step boundary, leave with a code that requeues.

Before the first step and after the last one there is nothing to save: without `watched` a signal ends the process as
ever, and a run that is past its last step finishes.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor

REQUEUE = 85  # exit code: all is in a checkpoint, start the same command again (scripts/slurm_common.sh does)
WARNINGS = (signal.SIGUSR1, signal.SIGTERM)

_received: list[int] = []  # warnings of this process; they outlive a run, so that a sweep stops at its next one


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)


@contextmanager
def watched() -> Iterator[None]:
    """Remember warnings instead of dying of them; only a main thread may set handlers, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _remember) for number in WARNINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_agreed(reduce: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether any rank was warned; `reduce` sums over ranks, so all get the same answer at the same step."""
    return bool(reduce(torch.tensor([float(len(_received))], dtype=torch.float64))[0] > 0)


def leave(step: int) -> NoReturn:
    """End the process with REQUEUE after the checkpoint of `step`; all ranks call it."""
    if os.environ.get("RANK", "0") == "0":
        said = f"stopped by a signal after step {step}; the same command goes on from here"
        print(f"\n{said}", file=sys.stderr, flush=True)  # below the progress bar
        note = os.environ.get("PREFDISTILL_REQUEUE_NOTE")  # a batch script asks for it: srun can hide the code
        if note:
            Path(note).touch()
    raise SystemExit(REQUEUE)
