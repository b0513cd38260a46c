"""Gather the facts of a training run and write its model card, FINAL/README.md."""

import json
import subprocess
from pathlib import Path
from typing import Any

from models import config_digest, model_source
from pipeline.digests import content_digest
from report.charts import read_curves
from report.model_card import Facts, Source, card
from settings.artifacts import write_json, write_text
from settings.paths import ROOT, found
from settings.schema import Settings

FACTS = "facts.json"  # the facts of the card, in the run's folder: task=report shows them
# Of the run section, what a reader wants to see; loss and model stand beside it.
RUN_SETTINGS = (
    "seed",
    "lr",
    "n_epochs",
    "n_steps",
    "scheduler",
    "warmup",
    "optimizer",
    "betas",
    "weight_decay",
    "sync_reference",
    "sync_reference_rate",
)
MODEL_SETTINGS = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_prompt_length",
    "max_grad_norm",
    "policy_dtype",
    "master_dtype",
    "use_peft",
    "peft",
    "num_layers",
)


def commit_of(folder: Path) -> str | None:
    """Return the commit of a checkout, with a word where files differ from it; None where there is none."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


def source_of(name: str, train: str | None, test: str | None) -> Source:
    """Describe one data set, with digests of what lies on this machine."""
    digests = {}
    for split, place in (("train", train), ("test", test)):
        path = found(place) if place else None
        if path is not None:
            digests[split] = content_digest(path)
    return Source(name, train, test, digests)


def facts_of(settings: Settings, objective: str, head: str, num_train: int, num_test: int) -> Facts:
    """Read the rest from the run's folder; head: what the model ends in, "lm" or "reward"."""
    run, model, run_dir = settings.run, settings.model, settings.run.run_dir
    curves = read_curves(run_dir / "metrics.jsonl").points
    last = {name: points[-1][1] for name, points in curves.items() if points}
    steps = max((int(points[-1][0]) for points in curves.values() if points), default=None)
    command, versions = run_dir / "command.txt", run_dir / "versions.json"
    source = model_source(model)
    loss: dict[str, Any] = settings.raw["loss"]
    shown = {key: getattr(run, key) for key in RUN_SETTINGS}
    if run.first_step or run.schedule_steps:  # a round of a longer run
        shown |= {"first_step": run.first_step, "schedule_steps": run.schedule_steps}
    shown |= {"loss": {key: value for key, value in loss.items() if key not in ("name", "trainer")}}
    shown |= {"model": {key: getattr(model, key) for key in MODEL_SETTINGS if key != "peft" or model.use_peft}}
    return Facts(
        name=run_dir.name,
        loss=loss["name"],
        objective=objective,
        base=model.from_checkpoint or model.load_from or model.name_or_path,
        base_is_folder=source is not None and Path(source).is_dir(),
        base_digest=config_digest(model),
        head=head,
        sources=[source_of(name, one.train, one.test) for name, one in settings.datasets.items()],
        num_train=num_train,
        num_test=num_test,
        steps=steps,
        settings=shown,
        metrics=last,
        command=command.read_text(encoding="utf-8") if command.is_file() else None,
        versions=json.loads(versions.read_text(encoding="utf-8")) if versions.is_file() else {},
        commit=commit_of(ROOT),
    )


def write_card(folder: Path, facts: Facts) -> None:
    """Write the folder's README.md, and the same facts beside the folder, each whole or not at all."""
    write_text(folder / "README.md", card(facts))
    write_json(folder.parent / FACTS, facts._asdict() | {"sources": [source._asdict() for source in facts.sources]})


def known_facts(run_dir: Path) -> dict[str, Any]:
    """Return a run's facts, by the names of Facts; of one that has not ended those that lie there from its start."""
    file = run_dir / FACTS
    if file.is_file():
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return facts
    parts = {"objective": run_dir / "objective.txt", "command": run_dir / "command.txt"}
    facts = {name: part.read_text(encoding="utf-8") for name, part in parts.items() if part.is_file()}
    if "objective" in facts:  # "loss=NAME: L = ..."
        facts["objective"] = facts["objective"].partition(": ")[2].strip()
    return facts
