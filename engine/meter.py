"""What a run really took: peak memory of every device, seconds, tokens a second. Written into the run's folder."""

import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from settings.artifacts import write_json


class Used(NamedTuple):
    """What one process used since its meter was started."""

    peak_bytes: int
    baseline_bytes: int  # held before the models were loaded: interpreter and libraries (0 on a GPU)


def _status(key: str) -> int | None:
    file = Path("/proc/self/status")
    if not file.is_file():
        return None
    line = next((row for row in file.read_text().splitlines() if row.startswith(f"{key}:")), None)
    return int(line.split()[1]) * 1024 if line else None


def resident_bytes() -> int:
    """Return the memory that this process holds now; 0 where the system does not say."""
    return _status("VmRSS") or 0


def peak_resident_bytes() -> int:
    """Return the most that this process ever held.

    On Linux not from getrusage: a child there begins with its parent's peak.
    """
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (used if sys.platform == "darwin" else used * 1024)


def restart_peak() -> bool:
    """Let peak memory (of the GPU, or of the process on Linux) count from now on; False where it cannot."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


class Meter:
    """Started before the models are loaded, read after the last step."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        self.baseline = 0 if self.gpu else resident_bytes()
        self.started = time.perf_counter()

    def restart(self) -> None:
        """Count seconds from now on: models and data are loaded."""
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds since the (re)start."""
        return time.perf_counter() - self.started

    def used(self) -> Used:
        """Return this process's peak: allocated by torch on a GPU, resident on a CPU."""
        return Used(torch.cuda.max_memory_allocated() if self.gpu else peak_resident_bytes(), self.baseline)


def write(run_dir: Path, used: list[Used], seconds: float, tokens: float, device: str, strategy: str) -> dict[str, Any]:
    """Write resources.json, one entry of bytes a device, and return what it says."""
    found = {
        "device": device,
        "strategy": strategy,
        "devices": len(used),
        "peak_bytes": [u.peak_bytes for u in used],
        "baseline_bytes": [u.baseline_bytes for u in used],
        "seconds": round(seconds, 3),
        "tokens": round(tokens),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }
    write_json(run_dir / "resources.json", found)
    return found


def sentence(found: dict[str, Any], run_dir: Path) -> str:
    """Say in a line what was used, and how to lay it beside the prediction."""
    peak, base = max(found["peak_bytes"]) / 1e9, max(found["baseline_bytes"]) / 1e9
    above = f" ({base:.2f} GB of it before the model was loaded)" if base else ""
    return (
        f"peak memory of a {found['device']} process {peak:.2f} GB{above}, {found['tokens_per_second']:,.0f} tokens/s; "
        f"beside the prediction: launch.py task=estimate estimate.run={run_dir}"
    )
