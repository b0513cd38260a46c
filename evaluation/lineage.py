"""How many tokens were sampled, and how many responses checked, so that a model could learn: the price of a score.

Read from the run folders: what the policy wrote and had scored while it trained (metrics.jsonl), the generations and
labels that it learned from (summary.json of task=generate and task=label), and the same of the models it was trained
from, each file once. What a teacher was trained on does not count.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from settings.artifacts import read_jsonl

GENERATED, SCORED = "generated_tokens", "scored_responses"
ENDS = ("generate",)  # who wrote a response that is learned from is no ancestor, unless training started from it
HIGHEST = 4  # folders between a file and the run that wrote it


def run_of(path: Any) -> Path | None:
    """Return the run folder that a file or folder lies in; None for anything else (a hub's name, a data file)."""
    if not isinstance(path, str) or not Path(path).expanduser().exists():
        return None
    place = Path(path).expanduser().resolve()
    return next((up for up in [place, *place.parents][:HIGHEST] if (up / "config.yaml").is_file()), None)


def inputs_of(config: dict[str, Any]) -> list[Any]:
    """Return what a run's model and responses came from: its start, its generations, its training rows."""
    data = [source.get("train") for source in (config.get("datasets") or {}).values() if isinstance(source, dict)]
    sections = {"model": "load_from", "loss": "generations", "label": "responses", "select": "generations"}
    return [(config.get(section) or {}).get(key) for section, key in sections.items()] + data


def runs_behind(folder: str, ends: Collection[str] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the run that wrote a model and those it came from, each once, with their stored configs.

    ends: tasks behind which nobody looks.
    """
    todo: list[Path | None] = [run_of(folder)]
    seen: set[Path] = set()
    while todo:
        run = todo.pop()
        if run is None or run in seen:
            continue
        seen.add(run)
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
        yield run, config
        if config.get("task") not in ends:
            todo += [run_of(path) for path in inputs_of(config)]


def generated_tokens(folder: str) -> int | None:
    """Return the tokens sampled for a model's training; None where there are none, or nobody knows."""
    return _sum_of(folder, GENERATED, "generate", "summary.json", "tokens")


def scored_responses(folder: str) -> int | None:
    """Return how many responses a checker scored for a model's training; None where there are none, or nobody knows."""
    return _sum_of(folder, SCORED, "label", "LABEL/summary.json", "scored")


def _sum_of(folder: str, column: str, task: str, file: str, key: str) -> int | None:
    """Add up the last value of a column of each training behind a model, and what the runs of a task told."""
    total = 0
    for run, config in runs_behind(folder, ends=ENDS):
        if config.get("task") == task:
            total += _number(run / file, key)
        elif (run / "metrics.jsonl").is_file():
            total += max((int(row.get(column, 0)) for row in read_jsonl(run / "metrics.jsonl")), default=0)
    return total or None


def _number(file: Path, key: str) -> int:
    return int(json.loads(file.read_text(encoding="utf-8")).get(key, 0)) if file.is_file() else 0
