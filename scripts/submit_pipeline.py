"""Submit a pipeline to Slurm: a job for each stage, with its own resources, that starts when what it reads is done.

    python scripts/submit_pipeline.py [--resources FILE] [--dry-run] pipeline=NAME OVERRIDES...

Plan, digests and folders are those of `launch.py pipeline=NAME`: a finished stage gets no job, a stage that is in the
queue already is waited for instead of submitted again. A last job runs launch.py itself, which finds every stage done
and writes the results into the pipeline's folder.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.plan import Stage, build_plan
from pipeline.runner import describe, run_folder
from settings.tasks import STAGES
from settings.typed import nearest

LOGS = "slurm"  # folder beside the stages
SCRIPT = ROOT / "scripts" / "slurm_multi_node.sh"
# Sourced first: sbatch reads SBATCH_ACCOUNT and others from the environment.
WITH_CLUSTER = 'set -a; file="${CLUSTER_ENV:-$0}"; if [ -e "$file" ]; then . "$file"; fi; exec "$@"'


def task_of(stage: Stage) -> str:
    """Return the task of a stage."""
    return next(word.removeprefix("task=") for word in stage.command if word.startswith("task="))


def resources_of(stage: Stage, resources: dict[str, Any]) -> dict[str, Any]:
    """Return sbatch's options for a stage: default, then the task's, then the stage's own."""
    layers = [resources.get(key) or {} for key in ("default", task_of(stage), stage.name)]
    return {key: value for layer in layers for key, value in layer.items() if value is not None}


def check_resources(resources: dict[str, Any], stages: list[Stage]) -> None:
    """Refuse a key that names neither a task nor a stage."""
    known = ["default", *STAGES, *dict.fromkeys(s.name for s in stages)]
    for key, options in resources.items():
        if key not in known:
            raise ValueError(f"the resources name {key!r}, no task and no stage of this pipeline.{nearest(key, known)}")
        if not isinstance(options, dict | None):
            raise ValueError(
                f"the resources of {key!r} are {options!r}: write sbatch options, e.g. {{nodes: 2, time: '4:00:00'}}"
            )


def batch_line(name: str, options: dict[str, Any], after: list[str], log: Path, overrides: list[str]) -> list[str]:
    """Return the sbatch command of one job; it starts once the jobs `after` have ended well, and goes with them if
    not.
    """
    line = ["sbatch", "--parsable", f"--job-name={name}", f"--output={log}"]
    line += [f"--{key}={value}" for key, value in options.items()]
    if after:
        line += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    return [*line, str(SCRIPT), *overrides]


def launch_words(stage: Stage) -> tuple[list[str], str | None]:
    """Return a stage's overrides and its accelerate config, which the ranks read from ACCELERATE_CONFIG."""
    words, script = stage.command, str(ROOT / "launch.py")
    config = words[words.index("--config_file") + 1] if "--config_file" in words else None
    return words[words.index(script) + 1 :], config


def in_cluster(command: list[str], **env: str) -> str:
    """Run one of Slurm's commands with what cluster.env sets; return what it prints."""
    shell = ["bash", "-c", WITH_CLUSTER, str(ROOT / "scripts" / "cluster.env"), *command]
    try:
        done = subprocess.run(
            shell, capture_output=True, text=True, env={**os.environ, **env}, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is not here: submit from a machine with Slurm's commands") from error
    if done.returncode:
        raise ValueError(f"{shlex.join(command[:1])} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout.strip()


def queued() -> dict[str, str]:
    """Return the user's jobs that wait or run: {name: id}."""
    lines = in_cluster(["squeue", "--me", "--noheader", "--format=%i %j"]).splitlines()
    return {name: job for job, _, name in (line.partition(" ") for line in lines)}


def submit(
    stages: list[Stage],
    resources: dict[str, Any],
    waiting: dict[str, str],
    last: tuple[str, list[str]],
    send: Callable[[list[str], str | None], str],
) -> list[str]:
    """Send a job for every stage that is neither done nor queued, then the last job (name, overrides); return all
    ids.
    """
    jobs: dict[Path, str] = {}
    logs = stages[0].folder.parent.parent / LOGS
    for stage in stages:
        if stage.done:
            continue
        name = stage.folder.name
        if name not in waiting:
            after = [jobs[folder] for folder in stage.needs if folder in jobs]
            overrides, config = launch_words(stage)
            line = batch_line(name, resources_of(stage, resources), after, logs / f"{name}-%j.out", overrides)
            waiting[name] = send(line, config)
            print(f"{waiting[name]}  {stage.label}" + (f"  after {', '.join(after)}" if after else ""))
        else:
            print(f"{waiting[name]}  {stage.label}  in the queue already")
        jobs[stage.folder] = waiting[name]
    name, overrides = last
    if name not in waiting:
        line = batch_line(name, resources.get("default") or {}, list(jobs.values()), logs / f"{name}-%j.out", overrides)
        waiting[name] = send(line, None)
        print(f"{waiting[name]}  results" + (f"  after {', '.join(jobs.values())}" if jobs else ""))
    return [*jobs.values(), waiting[name]]


def main(arguments: list[str]) -> None:
    """Plan, then submit."""
    parser = argparse.ArgumentParser(description="Submit a pipeline to Slurm, a job a stage.")
    parser.add_argument(
        "--resources",
        type=Path,
        default=ROOT / "scripts" / "pipeline_resources.yaml",
        help="sbatch options by task and stage",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch commands and submit nothing")
    options, overrides = parser.parse_known_args(arguments)
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True)
    assert isinstance(config, dict)
    plain: dict[str, Any] = {str(key): value for key, value in config.items()}
    plain["datasets"] = plain.get("datasets") or {}
    if not plain.get("pipeline"):
        raise ValueError("no pipeline: add pipeline=NAME (a file of config/pipeline)")
    stages = build_plan(plain, overrides)
    resources = yaml.safe_load(options.resources.read_text(encoding="utf-8")) or {}
    check_resources(resources, stages)
    run_dir = run_folder(plain, overrides)
    last = (f"results-{run_dir.name}", overrides)
    if options.dry_run or plain["dry_run"]:
        submit(stages, resources, {}, last, _printed)
        return
    (stages[0].folder.parent.parent / LOGS).mkdir(parents=True, exist_ok=True)
    describe(stages, run_dir, overrides)
    submit(stages, resources, queued(), last, _sent)


def _sent(line: list[str], accelerate_config: str | None) -> str:
    return in_cluster(line, **({"ACCELERATE_CONFIG": accelerate_config} if accelerate_config else {})).split(";")[0]


def _printed(line: list[str], accelerate_config: str | None) -> str:
    name = next(word for word in line if word.startswith("--job-name=")).removeprefix("--job-name=")
    print((f"ACCELERATE_CONFIG={accelerate_config} " if accelerate_config else "") + shlex.join(line))
    return f"<{name}>"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
