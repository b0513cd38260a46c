"""The logbook of a training run: each row goes to metrics.jsonl, to the trackers and to the terminal."""

from typing import Any

from engine.learning_rate import Rate, ready, unmoved
from engine.metrics import MetricsFile
from engine.processes import Processes
from engine.progress import Live
from engine.tracking import trackers
from settings.artifacts import read_jsonl, write_json, write_text
from settings.schema import Settings

NOTES = "warnings.txt"  # what was said once of the run as a whole
PROGRESS = "progress.json"  # what a report of an unfinished run cannot know from rows


class Logbook:
    """Opened after the step to resume from is known; only rank 0 writes."""

    def __init__(self, settings: Settings, processes: Processes, step: int, total_steps: int, fits: Rate) -> None:
        run = settings.run
        self.folder, self.lr, self.total_steps, self.fits = run.run_dir, float(run.lr), total_steps, fits
        self.file = MetricsFile(run.run_dir / "metrics.jsonl", step) if processes.is_main else None
        self.trackers = trackers(settings, step) if processes.is_main else []
        self.live = Live(run.exp_name, step, total_steps, run.logging, processes.is_local_main)
        self.seen: list[dict[str, Any]] = []  # rows until the loss was looked at
        self.looked = self.file is None
        if self.file is not None:
            write_json(run.run_dir / PROGRESS, {"total_steps": total_steps, "lr": self.lr})
            if step:
                self.seen = list(read_jsonl(run.run_dir / "metrics.jsonl"))
                self.looked = (run.run_dir / NOTES).is_file() or step > total_steps // 2
            else:
                (run.run_dir / NOTES).unlink(missing_ok=True)

    def advance(self) -> None:
        """Count a step."""
        self.live.advance()

    def write(self, row: dict[str, Any]) -> None:
        """Write a row everywhere; all ranks call it."""
        if self.file is None:
            return
        self.file.write(row)
        for one in self.trackers:
            one.log(row)
        self.live.row(row)
        if not self.looked:
            self._look(row)

    def _look(self, row: dict[str, Any]) -> None:
        """Warn once if the loss stands still."""
        self.seen.append(row)
        trained = [seen for seen in self.seen if "loss/train" in seen]
        warning = unmoved(trained, self.total_steps, self.lr, self.fits.kind, self.fits.lr)
        if warning:
            self.live.say(warning)
            write_text(self.folder / NOTES, warning + "\n")
        if ready(trained, self.total_steps):
            self.looked, self.seen = True, []

    def close(self) -> None:
        """Flush and close."""
        self.live.close()
        for one in self.trackers:
            one.finish()
