"""Where the rows of metrics.jsonl go, too: wandb, TensorBoard, trackio (tracker=[...]), over resumes each row once.

wandb drops (live) or moves (on sync) a row whose step is not above the last one: so every row has a place of its own.
A second offline file of the same id replaces the first when it is synced: so every offline file holds the whole
history, and only the newest one counts. TensorBoard and trackio run through accelerate's trackers: TensorBoard is told
to forget what lies behind the step that a run resumes from; a resumed run is a trackio run of its own with the whole
history, named after the step.
"""

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

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
    return 2 * row["step"] + ("loss/train" not in row)


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


class Sink(Protocol):
    """What takes rows."""

    def log(self, row: dict[str, Any]) -> None:
        """Take a row."""

    def finish(self) -> None:
        """Flush and close."""


class Through:
    """A tracker of accelerate's, which takes the numbers of a row at its optimizer step."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker
        tracker.start()

    def log(self, row: dict[str, Any]) -> None:
        """Send a row."""
        self.tracker.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def finish(self) -> None:
        """Flush and close."""
        self.tracker.finish()


def trackers(settings: Settings, resume_step: int) -> list[Sink]:
    """Start what is asked for, after metrics.jsonl was cut to resume_step."""
    names = asked(settings.run.tracker, settings.wandb["enabled"])
    for name in names:
        check_installed(name)
    start: dict[str, Callable[[Settings, int], Sink]] = {
        "wandb": wandb_tracker,
        "tensorboard": tensorboard_tracker,
        "trackio": trackio_tracker,
    }
    return [start[name](settings, resume_step) for name in names]


def asked(named: list[str], wandb_enabled: bool) -> list[str]:
    """Return the trackers of `tracker`, and wandb where wandb.enabled says so, each once."""
    return list(dict.fromkeys([*named, *(["wandb"] if wandb_enabled else [])]))


def check_installed(name: str) -> None:
    """Refuse a tracker whose package is not here."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"tracker={name} needs the package {name}, which is not installed: ./install.sh --trackers installs "
            "TensorBoard and trackio. Or leave it out of tracker=[...]"
        )


def name_of(settings: Settings) -> str:
    """Return a run's name among its neighbors, e.g. outputs/first."""
    run_dir = settings.run.run_dir
    return str(run_dir.relative_to(run_dir.parents[1]))


def tensorboard_tracker(settings: Settings, resume_step: int) -> Through:
    """Start TensorBoard below run_dir/tensorboard; rows after the step that a run resumes from are purged."""
    from accelerate.tracking import TensorBoardTracker

    purge = resume_step + 1 if resume_step else None
    return Through(TensorBoardTracker(".", settings.run.run_dir / "tensorboard", purge_step=purge))


def trackio_tracker(settings: Settings, resume_step: int) -> Through:
    """Start trackio: project wandb.project, its database on this machine (TRACKIO_DIR), nothing sent anywhere."""
    from accelerate.tracking import TrackioTracker

    name = name_of(settings) + (f" from step {resume_step}" if resume_step else "")
    started = Through(
        TrackioTracker(
            settings.wandb["project"], name=f"{name} {time.time_ns() // 10**9:x}", config=settings.raw, embed=False
        )
    )
    for row in rows_so_far(settings):
        started.log(row)
    return started


def rows_so_far(settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, which was cut to the step that a run resumes from."""
    lines = (settings.run.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wandb_tracker(settings: Settings, resume_step: int) -> Tracker:
    """Start wandb; it never waits for a login."""
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
        name=name_of(settings),
        mode=mode,
        dir=str(run_dir),
        config=settings.raw,
        # An offline file is whole and is to replace what was synced of earlier ones; "allow" would append it.
        id=run_id(run_dir, resume_step),
        resume="allow" if mode == "online" else None,
    )
    started = Tracker(run)
    for row in rows_so_far(settings):
        started.log(row)
    return started
