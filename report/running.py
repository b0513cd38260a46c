"""Runs that are still training, and what their policies said on the way: sections of task=report's page.

All text is a model's or a file's: it reaches the page through `text` only.
"""

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from engine.logbook import NOTES, PROGRESS
from engine.progress import clock, figure
from engine.samples import FILE
from pipeline.run_folder import ERROR, TOLD
from report.markup import section, text
from report.page import samples_section
from settings.artifacts import is_done, whole_rows

# What a launch leaves before its task begins, and what says that it is over.
OPENED = {"config.yaml", "command.txt", "versions.json", "digest.txt", TOLD, ERROR, "DONE"}
STOPPED = (
    "One that wrote nothing for long has stopped or failed: the same command goes on from its checkpoint, without one "
    "it begins anew, and shows why it failed."
)
LOG = "log.txt"  # of a pipeline's stage: what it printed
ENDS = re.compile(r"(error: |[\w.]*(Error|Exception|Interrupt|OutOfMemory)\b|Killed\b|slurmstepd: ).*")


class State(NamedTuple):
    """What a run's folder says of a run that is not finished."""

    name: str
    task: str
    step: int  # of the last row
    total: int  # steps of the run, 0 if not known
    silent: float  # seconds since the last row, before the first one since the last file was written
    last: dict[str, Any]  # the last training row
    checkpoint: int  # step of the newest whole checkpoint, 0 without one
    warning: str
    reached: str = ""  # of a run without a row, how far it came
    why: str = ""  # the error that ended it


def reached(folder: Path, task: str, total: int, log_every: int) -> str:
    """Say how far a run without a row came, by what it left."""
    if task != "train":
        left = sorted({one.name for one in folder.iterdir()} - OPENED - {LOG, "lock"})
        return f"left {', '.join(left)}" if left else "nothing but its settings"
    if total:
        return f"began its {total} steps; " + (
            f"a row comes every {log_every}" if log_every else "log_every=0: no rows"
        )
    if (folder / "objective.txt").is_file():
        return "read its rows, and began no step"
    return "came as far as reading and checking its rows"


def last_error(folder: Path) -> str:
    """Return what ended a run: what it kept, else the last line of its log that names an error; empty without."""
    kept, log = folder / ERROR, folder / LOG
    if kept.is_file():
        return f"{ERROR}: {kept.read_text(encoding='utf-8').strip()}"
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    return next((f"{LOG}: {line.strip()}" for line in reversed(lines) if ENDS.match(line.strip())), "")


def last_write(folder: Path) -> float:
    """Return when a run last wrote a file of its folder."""
    return max((one.stat().st_mtime for one in folder.iterdir()), default=folder.stat().st_mtime)


def state_of(folder: Path, name: str, config: dict[str, Any], now: float) -> State:
    """Read the state of a run from its folder; rows that are half written are left out."""
    file, known = folder / "metrics.jsonl", folder / PROGRESS
    rows = [row for row, _ in whole_rows(file)] if file.is_file() else []
    trained = [row for row in rows if "loss/train" in row]
    total = int(json.loads(known.read_text(encoding="utf-8"))["total_steps"]) if known.is_file() else 0
    kept = [int(one.name.rpartition("-")[2]) for one in folder.glob("checkpoint-*") if is_done(one)]
    noted, task = folder / NOTES, str(config.get("task", ""))
    return State(
        name,
        task,
        rows[-1]["step"] if rows else 0,
        total,
        now - (file.stat().st_mtime if rows else last_write(folder)),
        trained[-1] if trained else {},
        max(kept, default=0),
        noted.read_text(encoding="utf-8").strip() if noted.is_file() else "",
        "" if rows else reached(folder, task, total, int(config.get("log_every", 0))),
        last_error(folder),
    )


def line_of(state: State) -> str:
    """Say in a line where a run stands."""
    why = f". {state.why}" if state.why else ""
    if state.reached:
        return (
            f"{state.name}: task={state.task}, no row; {state.reached}; last write "
            f"{clock(max(0.0, state.silent))} ago{why}"
        )
    step = f"step {state.step}" + (f" of {state.total}" if state.total else "")
    parts = [step]
    if state.last:
        found = figure(state.last)
        parts.append(f"loss {state.last['loss/train']:.4g}")
        parts += [f"{found[0]} {found[1]:.4g}"] if found else []
    parts.append(f"last row {clock(max(0.0, state.silent))} ago")
    parts.append(f"goes on from step {state.checkpoint}" if state.checkpoint else "no checkpoint")
    return f"{state.name}: {', '.join(parts)}" + (f". {state.warning}" if state.warning else "") + why


def running_section(states: list[State]) -> str:
    """List the unfinished runs; nothing where there is none."""
    if not states:
        return ""
    items = "".join(f"<li>{text(line_of(state))}</li>" for state in states)
    note = f'<p class="note">{STOPPED}</p>'
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
