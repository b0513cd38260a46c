"""Runs that are still training, and what their policies said on the way: sections of task=report's page.

All text is a model's or a file's: it reaches the page through `text` only.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from engine.logbook import NOTES, PROGRESS
from engine.progress import clock, figure
from engine.samples import FILE
from report.markup import section, text
from report.page import samples_section
from settings.artifacts import is_done, whole_rows


class State(NamedTuple):
    """What a run's folder says of a run that is not finished."""

    name: str
    task: str
    step: int  # of the last row
    total: int  # steps of the run, 0 if not known
    silent: float | None  # seconds since the last row, None before the first
    last: dict[str, Any]  # the last training row
    checkpoint: int  # step of the newest whole checkpoint, 0 without one
    warning: str


def state_of(folder: Path, name: str, config: dict[str, Any], now: float) -> State:
    """Read the state of a run from its folder; rows that are half written are left out."""
    file, known = folder / "metrics.jsonl", folder / PROGRESS
    rows = [row for row, _ in whole_rows(file)] if file.is_file() else []
    trained = [row for row in rows if "loss/train" in row]
    total = int(json.loads(known.read_text(encoding="utf-8"))["total_steps"]) if known.is_file() else 0
    kept = [int(one.name.rpartition("-")[2]) for one in folder.glob("checkpoint-*") if is_done(one)]
    noted = folder / NOTES
    return State(
        name,
        str(config.get("task", "")),
        rows[-1]["step"] if rows else 0,
        total,
        now - file.stat().st_mtime if rows else None,
        trained[-1] if trained else {},
        max(kept, default=0),
        noted.read_text(encoding="utf-8").strip() if noted.is_file() else "",
    )


def line_of(state: State) -> str:
    """Say in a line where a run stands."""
    if state.silent is None:
        return f"{state.name}: task={state.task}, no row yet"
    step = f"step {state.step}" + (f" of {state.total}" if state.total else "")
    parts = [step]
    if state.last:
        found = figure(state.last)
        parts.append(f"loss {state.last['loss/train']:.4g}")
        parts += [f"{found[0]} {found[1]:.4g}"] if found else []
    parts.append(f"last row {clock(max(0.0, state.silent))} ago")
    parts.append(f"goes on from step {state.checkpoint}" if state.checkpoint else "no checkpoint")
    return f"{state.name}: {', '.join(parts)}" + (f". {state.warning}" if state.warning else "")


def running_section(states: list[State]) -> str:
    """List the unfinished runs; nothing where there is none."""
    if not states:
        return ""
    items = "".join(f"<li>{text(line_of(state))}</li>" for state in states)
    note = '<p class="note">A run whose last row is old has stopped: the same command goes on from its checkpoint.</p>'
    return section("running", "Not finished", f"<ul>{items}</ul>{note}")


def samples_of_runs(folders: dict[str, Path]) -> str:
    """Lay the samples of the policies side by side: a column for each run and step; nothing where there are none."""
    found = []
    for name, folder in folders.items():
        file = folder / FILE
        for row, _ in whole_rows(file) if file.is_file() else ():
            model = f"{name}, step {row['step']}" if len(folders) > 1 else f"step {row['step']}"
            found.append({"prompt": row["prompt"], "model": model, "response": row["response"]})
    return samples_section(found) if found else ""


def now() -> float:
    """Return the time that files are compared with."""
    return time.time()
