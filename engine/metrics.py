"""Metrics as sums and counts: one division at the end, one all-reduce on logging steps."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from settings.artifacts import append_row, whole_rows, write_jsonl


class Mean(NamedTuple):
    """A total over a number of units; the mean is taken once, over the whole window and all ranks."""

    total: Tensor | float
    count: Tensor | float  # type: ignore[assignment]  # the word is right; tuple.count is not used here


class Window:
    """Sums and counts by name since the last row was written; they stay on their device until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.waiting: dict[str, list[Tensor]] = {}  # name -> total and count, float64 tensors of one element

    def add(self, metrics: dict[str, Mean]) -> None:
        """Add to the totals and counts; nothing is read from a device."""
        for name, mean in metrics.items():
            sums = self.sums.setdefault(name, [0.0, 0.0])
            for place, value in enumerate(mean):
                if isinstance(value, Tensor):
                    self._wait(name, place, value)
                else:
                    sums[place] += value

    def _wait(self, name: str, place: int, value: Tensor) -> None:
        one = value.detach().double()
        if name not in self.waiting:
            self.waiting[name] = [torch.zeros_like(one), torch.zeros_like(one)]
        self.waiting[name][place] += one

    def read(self) -> dict[str, list[float]]:
        """Return the sums of this process: one read from the device."""
        if self.waiting:
            found = torch.stack([value for pair in self.waiting.values() for value in pair]).tolist()
            for i, name in enumerate(self.waiting):
                for place in (0, 1):
                    self.sums[name][place] += found[2 * i + place]
            self.waiting = {}
        return self.sums

    def reduced(self, reduce: Any) -> dict[str, list[float]]:
        """Return the sums over all ranks; `reduce` sums a tensor over ranks."""
        sums = self.read()
        names = sorted(set(gather_object(list(sums))))  # a rank that had only fillers knows fewer names
        if not names:
            return {}
        table = torch.tensor([sums.get(name, [0.0, 0.0]) for name in names], dtype=torch.float64)
        return {name: row for name, row in zip(names, reduce(table).tolist(), strict=True)}


def means(sums: dict[str, list[float]]) -> dict[str, float]:
    """Divide; a name that counted nothing is left out."""
    return {name: total / count for name, (total, count) in sums.items() if count > 0}


class MetricsFile:
    """metrics.jsonl: one object a row, cut back to the checkpoint's step on resume so that no step stands twice."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [row for row, _ in whole_rows(path) if row["step"] <= resume_step] if resume_step > 0 else []
        write_jsonl(path, kept)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.path.open("a", encoding="utf-8") as out:
            append_row(out, row)


def named(values: dict[str, float], split: str, is_whole: bool = True) -> dict[str, float]:
    """Give every name its split, and sum the terms to loss/SPLIT if they are the whole loss."""
    row = {f"loss/{split}": sum(v for k, v in values.items() if k.startswith("term/"))} if is_whole else {}
    for name, value in values.items():
        head, _, tail = name.partition("/")
        row[name if name == "grad_norm" else (f"{head}_{split}/{tail}" if tail else f"{name}/{split}")] = value
    return row
