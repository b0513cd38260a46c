"""What torch holds in the steps of a run, as its profiler counts it."""

import numpy as np
import pytest
from torch.profiler import ProfilerActivity, profile

from trainers.basic import BasicTrainer


def peaks_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Profile every optimizer step from now on; return the list that gets the most bytes that each allocated."""
    peaks: list[int] = []
    plain_step = BasicTrainer._step

    def profiled_step(self: BasicTrainer, step: int) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            result = plain_step(self, step)
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
        peaks.append(int(held.max()))
        return result

    monkeypatch.setattr(BasicTrainer, "_step", profiled_step)
    return peaks
