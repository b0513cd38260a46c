"""What is shown while training: one live line, or a table of the rows (logging=table).

Everything shown stands in the row that was just written: no number is read from a device for it.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from engine import meter

# The figure of a method, the first that a row has.
FIGURES = (
    "rewards_train/accuracies",
    "reward/train",
    "weighted_reward/train",
    "advantage/train",
    "kl/train",
    "kl_train/student",
    "kl_train/chosen",
    "kl_chosen/train",
    "nll_train/chosen",
    "entropy/train",
)
EVERY = 20  # rows of a table between two of its heads


def figure(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the method's own figure of a row, under its name without the split."""
    for name in FIGURES:
        if name in row:
            return name.replace("_train/", "/").removesuffix("/train"), row[name]
    return None


def clock(seconds: float) -> str:
    """Write a time as 0:59, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory_gb() -> float:
    """Return this process's peak memory in GB: allocated by torch on a GPU, else resident; asks no device."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else meter.peak_resident_bytes()
    return peak / 1e9


def live_line(row: Mapping[str, Any], memory: float) -> str:
    """Return what stands behind the bar: loss, the method's figure, speed and memory."""
    parts = [f"loss {row['loss/train']:.4g}"] if "loss/train" in row else []
    found = figure(row)
    parts += [f"{found[0]} {found[1]:.3g}"] if found else []
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    return ", ".join([*parts, f"{memory:.1f} GB"])


HEAD = f"{'step':>12} {'loss':>10} {'figure':>28} {'lr':>9} {'tokens/s':>10} {'left':>8} {'GB':>6}"


def table_row(row: Mapping[str, Any], total: int, left: str, memory: float) -> str:
    """Return a row of the table; an evaluation shows its loss, marked."""
    step = f"{row['step']}/{total}"
    if "loss/train" not in row:
        loss = f"{row['loss/eval']:.4g}" if "loss/eval" in row else "-"
        nll = f"nll/chosen {row['nll_eval/chosen']:.4g}, " if loss == "-" and "nll_eval/chosen" in row else ""
        return f"{step:>12} {loss:>10} {nll + 'held out':>28}"
    found = figure(row)
    said = f"{found[0]} {found[1]:.4g}" if found else "-"
    speed = row.get("tokens_per_second", 0.0)
    return (
        f"{step:>12} {row['loss/train']:>10.4g} {said:>28} {row['lr']:>9.2e} {speed:>10,.0f} {left:>8} {memory:>6.1f}"
    )


class Live:
    """The line or the table of a run on one machine's first process; others show nothing."""

    def __init__(self, name: str, step: int, total: int, style: str, shown: bool) -> None:
        self.table, self.shown, self.rows = style == "table", shown, 0
        self.first, self.step, self.total, self.started = step, step, total, time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=step,
            desc=name,
            mininterval=1,
            disable=self.table or not shown,
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| step {n_fmt}/{total_fmt}, {remaining} left{postfix}",
        )

    def advance(self) -> None:
        """Count a step."""
        self.step += 1
        self.bar.update()

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics.jsonl."""
        if not self.table:
            if "loss/train" in row:
                self.bar.set_postfix_str(live_line(row, memory_gb()), refresh=False)
        elif self.shown:
            if self.rows % EVERY == 0:
                print(HEAD)
            self.rows += 1
            print(table_row(row, self.total, self.left(), memory_gb()), flush=True)

    def left(self) -> str:
        """Return the time left at the speed so far."""
        done = self.step - self.first
        passed = time.monotonic() - self.started
        return clock(passed / done * (self.total - self.step)) if done else "?"

    def say(self, line: str) -> None:
        """Print a line that the bar does not overwrite."""
        tqdm.write(line) if not self.bar.disable else print(line, flush=True)

    def close(self) -> None:
        """Leave the line as it is."""
        self.bar.refresh()
        self.bar.close()
