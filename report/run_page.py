"""Sections of task=report's page for one training run: what was trained from what, its last values.

Facts are those of the model card (report/run_facts.py); a run that has not ended has fewer. Everything passes `text`.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from report.charts import read_curves
from report.markup import section, text
from report.parents import config_of, inputs_of
from report.run_facts import known_facts
from report.tables import html_table
from settings.paths import found


def typed_words(command: str) -> list[str]:
    """Return the words of a stored command that follow launch.py."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command of ours
        return []
    place = next((i for i, word in enumerate(words) if word.endswith("launch.py")), len(words))
    return words[place + 1 :]


def no_held_out(config: Mapping[str, Any]) -> str:
    """Say how a run gets held-out rows; empty where one of its data sets has some."""
    datasets = config.get("datasets") or {}
    if not datasets or any(entry.get("test") for entry in datasets.values()):
        return ""
    return f"no held-out rows: datasets.{next(iter(datasets))}.test= gives them"


def made_from(place: str) -> str:
    """Say what an input of a run was itself made from, by the configuration beside it; empty where nothing tells."""
    folder = found(place)
    before = inputs_of(config_of(folder)) if folder is not None and folder.is_dir() else []
    return ", ".join(f"{key} {value}" for key, value in before if not key.startswith("datasets."))


def data_said(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Say how many rows a run has, and from where."""
    counted, lacking = "", no_held_out(config)
    if "num_train" in facts:
        counted = f"{facts['num_train']:,} training rows"
        counted += "" if lacking else f", {facts['num_test']:,} held-out rows"
    places = [f"{key} {value}" for key, value in inputs_of(dict(config)) if key.startswith("datasets.")]
    return "; ".join(filter(None, [counted, lacking, *places]))


def facts_section(folder: Path, config: Mapping[str, Any]) -> str:
    """Say what a run minimizes, from which model, teacher and rows, by which command and with which settings."""
    facts = known_facts(folder)
    inputs = [(key, value) for key, value in inputs_of(dict(config)) if not key.startswith("datasets.")]
    start = [value for key, value in inputs if key.startswith("model.")]
    command = facts.get("command") or ""
    typed = " ".join(f"<code>{text(word)}</code>" for word in typed_words(command))
    said = {
        "loss": text((config.get("loss") or {}).get("name", "")),
        "minimized": text(facts.get("objective", "")),
        "started from": text(start[0] if start else "new weights (model.build)"),
    }
    for key, value in inputs:
        if key.startswith("loss."):
            behind = made_from(value)
            said[text(key)] = text(value + (f", made from {behind}" if behind else ""))
    said |= {"data": text(data_said(config, facts)), "typed": typed, "seed": text(config.get("seed", ""))}
    if facts.get("steps") is not None:
        said["optimizer steps"] = text(facts["steps"])
    said["command"] = f"<code>{text(command.strip())}</code>" if command else "not stored"
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in said.items() if value)
    body = f'<dl class="words">{lines}</dl>'
    if facts.get("settings"):
        shown = yaml.safe_dump(facts["settings"], sort_keys=False, allow_unicode=True)
        body += f"<details><summary>All settings</summary><pre>{text(shown)}</pre></details>"
    return section("facts", "What was run", body)


def last_section(folder: Path) -> str:
    """List the last value of every metric of a run; empty without a row."""
    points = read_curves(folder / "metrics.jsonl").points
    rows = [[text(name), f"{line[-1][1]:.4g}", f"{line[-1][0]:g}"] for name, line in sorted(points.items())]
    table = html_table("Last values", ["metric", "last value", "step"], rows)
    note = '<p class="note">A training value is the mean since the row before; a held-out one is of all rows.</p>'
    return section("results", "Last values", table + note) if rows else ""
