"""wandb over resumes: one wandb run a run folder, each row once.

wandb drops (live) or moves (on sync) a row whose step is not above the last one: so every row has a place of its own.
A second offline file of the same id replaces the first when it is synced: so every offline file holds the whole
history, and only the newest one counts.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from settings.artifacts import write_text
from settings.schema import Settings


class Tracker:
    """A wandb run that knows which rows it has."""

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")  # charts show optimizer steps, not places

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of metrics.jsonl, unless the run already has it."""
        if place(row) >= self.run.step:  # above 0 only online, where the server says what it has
            self.run.log(row, step=place(row))

    def finish(self) -> None:
        """Flush and close."""
        self.run.finish()


def place(row: dict[str, Any]) -> int:
    """Return wandb's own step of a row.

    A training row and the evaluation after it are two, and one of them may be missing.
    """
    return 2 * row["step"] + ("loss/eval" in row)


def run_id(run_dir: Path, resume_step: int) -> str:
    """Return the run's wandb id, kept in run_dir/wandb_id.txt; a run that starts again from nothing is another one.

    The time is part of it: another machine may have a folder of the same name.
    """
    file = run_dir / "wandb_id.txt"
    if resume_step > 0 and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    found = hashlib.sha256(f"{run_dir.resolve()} {time.time_ns()}".encode()).hexdigest()[:16]
    write_text(file, found + "\n")
    return found


def tracker(settings: Settings, resume_step: int) -> Tracker | None:
    """Start wandb if it is enabled, after metrics.jsonl was cut to resume_step; it never waits for a login."""
    if not settings.wandb["enabled"]:
        return None
    import wandb

    mode = settings.wandb["mode"]
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise ValueError("wandb.mode=online needs WANDB_API_KEY in the environment; or use wandb.mode=offline")
    run_dir = settings.run.run_dir
    for old in (run_dir / "wandb").glob("offline-run-*"):
        old.rename(old.with_name(f"superseded-{old.name}"))  # kept, but `wandb sync` does not find it
    run = wandb.init(
        project=settings.wandb["project"],
        entity=settings.wandb["entity"],
        group=settings.wandb["group"],
        name=str(run_dir.relative_to(run_dir.parents[1])),
        mode=mode,
        dir=str(run_dir),
        config=settings.raw,
        # An offline file is whole and is to replace what was synced of earlier ones; "allow" would append it.
        id=run_id(run_dir, resume_step),
        resume="allow" if mode == "online" else None,
    )
    started = Tracker(run)
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        started.log(json.loads(line))
    return started
