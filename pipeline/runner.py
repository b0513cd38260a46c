"""A pipeline: skip finished stages, run the others as subprocesses of `launch.py`, several at a time if asked.

Each stage has log.txt in its folder and a lock that its process inherits: two pipelines that share a stage never run
it twice at the same time. Ctrl-C stops the children; the same command goes on from their checkpoints.
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.grid import Cell, cells_of
from pipeline.plan import OWN_KEYS, Stage, build_plan, key_of
from pipeline.warm import Process, WarmStart
from settings.artifacts import is_done, write_bytes, write_json, write_text
from settings.paths import ROOT
from settings.tasks import unread
from settings.terminal import clean
from settings.typed import check_name

TAIL_LINES = 20  # of a failed stage's log
GRACE_SECONDS = 10.0  # between SIGINT and SIGKILL
RESULTS = ("results.json", "results.md", "report.html")  # of the last stage: shown and copied into the run's folder


class Running(NamedTuple):
    """A stage at work."""

    stage: Stage
    process: subprocess.Popen[bytes] | Process
    log: Path
    lock: BinaryIO
    started: float


# Shows what stages take: (stages, the estimate section, the finished run's folder or None for a plan).
Costs = Callable[[list[Stage], dict[str, Any], Path | None], None]


def run_pipeline(config: dict[str, Any], overrides: list[str], costs: Costs | None = None, fork: bool = True) -> int:
    """Run every stage that is not done and return the exit code; with dry_run only print the plan.

    fork=False starts each stage afresh, as pipeline.warm_start=false does.
    """
    stages = build_plan(config, overrides)
    idle = unread([stage.config for stage in stages], [o for o in overrides if key_of(o).split(".")[0] not in OWN_KEYS])
    if idle:
        print(f"warning: no stage of this pipeline reads {', '.join(idle)}", flush=True)
    if config["dry_run"]:
        print_plan(stages, cells_of(config["pipeline"]))
        if costs is not None:
            costs(stages, config["estimate"], None)
        return 0
    run_dir = run_folder(config, overrides)
    try:
        stages[0].folder.parent.mkdir(parents=True, exist_ok=True)
        describe(stages, run_dir, overrides)
    except OSError as error:
        raise ValueError(
            f"cannot write into cache_dir={config['cache_dir']}: {error.strerror}: {error.filename}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    warm = fork and bool(config["pipeline"].get("warm_start", True))
    code = Runner(stages, int(config["pipeline"].get("parallel", 1)), warm).run()
    if code == 0:
        publish(stages[-1], run_dir)
        if costs is not None:
            costs(stages, config["estimate"], run_dir)
    return code


def run_folder(config: dict[str, Any], overrides: list[str]) -> Path:
    """Return the folder of the pipeline's own run; without a name of its own it is called like the pipeline."""
    named = any(o.lstrip("+").startswith("exp_name=") for o in overrides)
    name, count = config["exp_name"] if named else config["pipeline"]["name"], config.get("run_count")
    for key, value in (("exp_name", name), ("run_count", count)):
        if value:
            check_name(key, str(value), levels=True)
    run_dir = Path(config["cache_dir"]).expanduser() / name
    return run_dir / count if count else run_dir


def print_plan(stages: list[Stage], cells: list[Cell]) -> None:
    """Print what is done, what would run, the command of each stage, and the cells of a grid."""
    for stage in stages:
        seconds = _seconds(stage)
        state = f"done{f' in {seconds:.0f} s' if seconds else ''}" if stage.done else "run"
        print(f"{stage.label}  {stage.digest[:12]}  {state}\n    {shlex.join(stage.command)}")
    for cell in cells:
        if cell.knobs:
            print(f"{cell.name}  {' '.join(f'{knob}={value}' for knob, value in cell.knobs.items())}")
    done = sum(stage.done for stage in stages)
    print(f"{len(stages)} stages, {done} done, {len(stages) - done} to run in {stages[0].folder.parent}")


def _seconds(stage: Stage) -> float | None:
    file = stage.folder / "stage.json"
    return json.loads(file.read_text(encoding="utf-8")).get("seconds") if file.is_file() else None


def describe(stages: list[Stage], run_dir: Path, overrides: list[str]) -> None:
    """Write into the run's folder which stages it is made of: a link to each, and the plan with the commands."""
    run_dir.mkdir(parents=True, exist_ok=True)
    several = len({stage.seed for stage in stages}) > 1
    for stage in stages:
        cell = run_dir / stage.cell.replace(" ", "_") if stage.cell else run_dir
        link = (cell / f"seed_{stage.seed}" if several else cell) / stage.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        if not link.exists():
            link.symlink_to(os.path.relpath(stage.folder, link.parent.resolve()))
    rows = [
        {"stage": s.label, "digest": s.digest, "folder": str(s.folder), "command": shlex.join(s.command)}
        for s in stages
    ]
    write_json(run_dir / "plan.json", rows)
    write_text(run_dir / "command.txt", shlex.join(["launch.py", *overrides]) + "\n")


def publish(last: Stage, run_dir: Path) -> None:
    """Copy the last stage's results into the run's folder and print the table."""
    for name in RESULTS:
        if (last.folder / name).is_file():
            write_bytes(run_dir / name, (last.folder / name).read_bytes())
    if (last.folder / "results.md").is_file():
        print("\n" + (last.folder / "results.md").read_text(encoding="utf-8"))
    print(f"results: {run_dir}", flush=True)


def is_plain(stage: Stage) -> bool:
    """Tell whether a stage is one process that this Python starts, without a launcher."""
    return stage.command[:2] == [sys.executable, str(ROOT / "launch.py")]


class Runner:
    """Start stages whose inputs are ready, at most `parallel` at a time, until all are done or one failed."""

    def __init__(self, stages: list[Stage], parallel: int, warm: bool) -> None:
        self.stages, self.parallel = stages, parallel
        threads = max(1, (os.cpu_count() or 1) // parallel)
        quiet = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.environment = {**quiet, **os.environ, "PYTHONUNBUFFERED": "1"}
        self.running: list[Running] = []
        self.waiting = [stage for stage in stages if not stage.done]
        self.failed: list[Stage] = []
        self.held: list[Stage] = []
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        alike = sum(is_plain(stage) for stage in self.waiting)
        self.warm = WarmStart(self.environment) if warm and alike > 1 else None

    def run(self) -> int:
        """Run to the end; return 0, 1 after a failure or 130 after Ctrl-C."""
        self._say(f"{len(self.stages)} stages, {len(self.stages) - len(self.waiting)} done already")
        try:
            while self.running or (self.waiting and not self.failed):
                self._start_ready()
                time.sleep(0.2)
                for running in [r for r in self.running if r.process.poll() is not None]:
                    self._finish(running)
                self._show_progress()
        except KeyboardInterrupt:
            self._stop()
            self._say("interrupted; the same command goes on where this one stopped")
            return 130
        except BaseException:
            self._stop()
            raise
        finally:
            if self.warm:
                self.warm.close()
        if self.failed and self.waiting:
            self._say(f"not started: {', '.join(stage.label for stage in self.waiting)}")
        return 1 if self.failed else 0

    def _start_ready(self) -> None:
        for stage in list(self.waiting):
            if self.failed or len(self.running) >= self.parallel:
                return
            if all(is_done(folder) for folder in stage.needs):
                self._start(stage)

    def _start(self, stage: Stage) -> None:
        stage.folder.mkdir(parents=True, exist_ok=True)
        lock = (stage.folder / "lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # look again at the next turn
            lock.close()
            if stage not in self.held:
                self.held.append(stage)
                self._say(f"{stage.label}: another pipeline is running it; waiting for that one")
            return
        self.waiting.remove(stage)
        if stage.done:
            lock.close()
            return
        log = stage.folder / "log.txt"
        with log.open("ab") as output:
            output.write(f"\n$ {shlex.join(stage.command)}\n".encode())
            output.flush()
            process = self._begin(stage, output, lock)
        self.running.append(Running(stage, process, log, lock, time.monotonic()))
        self._say(f"{stage.label}: started ({stage.folder.name})")

    def _begin(self, stage: Stage, output: BinaryIO, lock: BinaryIO) -> subprocess.Popen[bytes] | Process:
        """Start a stage's command in a session of its own, with its lock open."""
        if self.warm and is_plain(stage):
            number = output.fileno()
            return self.warm.start(stage.command[1:], self.environment, number, number, (lock.fileno(),))
        return subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )

    def _finish(self, running: Running) -> None:
        stage, seconds = running.stage, time.monotonic() - running.started
        self.running.remove(running)
        running.lock.close()
        if running.process.returncode == 0 and stage.done:
            facts = {
                "digest": stage.digest,
                "seconds": round(seconds, 1),
                "needs": [str(folder) for folder in stage.needs],
            }
            write_json(stage.folder / "stage.json", facts)
            finished = len(self.stages) - len(self.waiting) - len(self.running) - len(self.failed)
            self._say(f"{stage.label}: done in {seconds:.0f} s ({finished}/{len(self.stages)})")
            return
        self.failed.append(stage)
        lines = running.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        shown = "\n".join(f"    {clean(line)}" for line in lines[-TAIL_LINES:])
        why = f"exit code {running.process.returncode}" if running.process.returncode else "it ended without DONE"
        self._say(f"{stage.label}: failed ({why}); the end of {running.log}:\n{shown}")
        others = ", ".join(r.stage.label for r in self.running)
        if others:
            self._say(f"still running, will be kept: {others}")

    def _stop(self) -> None:
        """End the children: SIGINT to each one's process group, SIGKILL to what is left after a while."""
        for number, grace in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, 2.0)):
            for running in [r for r in self.running if r.process.poll() is None]:
                try:
                    os.killpg(running.process.pid, number)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + grace
            while any(r.process.poll() is None for r in self.running) and time.monotonic() < deadline:
                time.sleep(0.1)

    def _show_progress(self) -> None:
        """Rewrite one line with the last words of every running stage; a log file gets starts and ends only."""
        if not self.terminal:
            return
        width = shutil.get_terminal_size().columns - 1
        room = max(20, width // max(1, len(self.running)))
        parts = [f"{r.stage.label}: {last_words(r.log)}"[: room - 3].ljust(room - 3) for r in self.running]
        print(f"\r\033[K{' | '.join(parts)[:width]}", end="", flush=True)

    def _say(self, text: str) -> None:
        clear = "\r\033[K" if self.terminal else ""
        elapsed = int(time.monotonic() - self.started)
        print(f"{clear}[{elapsed // 60:02d}:{elapsed % 60:02d}] {text}", flush=True)


def last_words(log: Path) -> str:
    """Return the last line that a log shows, carriage returns (progress bars) counted as lines."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 1000))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return clean(lines[-1]) if lines else "starting"
