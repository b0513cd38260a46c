"""Time, peak memory and computed tokens of a work, measured inside its process. Needs torch alone: rivals use it, too.

Peak memory is the largest resident set of the process (VmHWM of /proc/self/status) since the work's first step began,
weights, optimizer and libraries included; on a GPU it is what torch allocated there at most.
"""

import time
from pathlib import Path
from typing import Any

import torch


def wait() -> None:
    """Let the GPU finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> None:
    """Start the peak anew from what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def held_bytes() -> int:
    """Return the memory held now: of the GPU if there is one, else resident."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak_bytes() -> int:
    """Return the peak memory since forget_peak. Not getrusage: a child there begins with its parent's peak."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


class Clock:
    """Times one stretch of work after the other; the peak is of all of them since the clock was made."""

    def __init__(self) -> None:
        forget_peak()
        self.begin()

    def begin(self) -> None:
        """Start a stretch."""
        wait()
        self.started, self.processor = time.perf_counter(), time.process_time()

    def end(self) -> dict[str, float]:
        """Return the stretch's seconds by the clock and by the processor (of all threads), and the peak so far."""
        wait()
        return {
            "seconds": time.perf_counter() - self.started,
            "processor_seconds": time.process_time() - self.processor,
            "peak_bytes": peak_bytes(),
        }


class ComputedTokens:
    """Counts the positions that go through a model's input embedding, padding included."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.get_input_embeddings().register_forward_pre_hook(self._add)

    def _add(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.count += inputs[0].numel()

    def taken(self) -> int:
        """Return the count and start anew."""
        found, self.count = self.count, 0
        return found
