"""What the evaluated models cost: hours of devices, tokens, calls of a checker, from the folders of their runs.

A model's runs are its own and those it came from: its start, the generations, labels and selections that it learned
from (evaluation/lineage.py). Its teachers' training is not in it. What a folder does not say is not guessed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.lineage import ENDS, runs_behind, scored_responses
from evaluation.records import Evaluated
from settings.artifacts import read_json, read_jsonl

COST = "cost.json"  # of an evaluation itself, in its folder


class Cost(NamedTuple):
    """Sums over a model's runs; hours by kind of device, and how many of the runs that compute left no record."""

    hours: dict[str, float]
    trained: int  # tokens, a pass over a row counts each time
    sampled: int  # tokens that task=generate wrote
    checked: int  # responses that a verifier, reward model or judge scored, for task=label or while it trained
    runs: int
    unknown: int


def cost_of(folder: str) -> Cost | None:
    """Return what a model cost; None where it is in no run's folder."""
    hours: dict[str, float] = {}
    runs = trained = sampled = unknown = 0
    for run, config in runs_behind(folder, ends=ENDS):
        runs += 1
        found, task = read_json(run / "resources.json"), config.get("task", "train")
        if found:
            kind = str(found["device"])
            hours[kind] = hours.get(kind, 0.0) + found["seconds"] * found["devices"] / 3600
            trained += int(found["tokens"])
        else:
            unknown += task in ("train", "generate")
        sampled += int(read_json(run / "summary.json").get("tokens", 0)) if task == "generate" else 0
    return Cost(hours, trained, sampled, scored_responses(folder) or 0, runs, unknown) if runs else None


def hours_text(hours: Mapping[str, float]) -> str:
    """Write hours by kind of device: 0.52 GPU hours, or minutes where they are few."""
    words = []
    for kind, value in hours.items():
        name = "GPU" if kind.startswith("cuda") else "processor"
        words.append(f"{value:.2f} {name} hours" if value >= 0.1 else f"{60 * value:.1f} {name} minutes")
    return " + ".join(words) or "-"


def cost_cells(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return each model's cost as rows of cells, the heads first; empty where no model lies in a run's folder."""
    rows = []
    for name, entry in models.items():
        cost = cost_of(entry["folder"])
        if cost is None:
            continue
        generated = entry.get("generated_tokens") or cost.sampled
        without = f", {cost.unknown} untimed" if cost.unknown else ""
        rows.append(
            [name, hours_text(cost.hours), f"{cost.trained:,}", f"{generated:,}", f"{cost.checked:,}"]
            + [f"{cost.runs}{without}"]
        )
    head = ["model", "training", "tokens trained on", "tokens sampled for it", "responses checked for it", "runs"]
    return [head, *rows] if rows else []


def entry_of(
    found: Mapping[str, Evaluated], run_dir: Path, seconds: float, devices: int, device: str
) -> dict[str, Any]:
    """Return what an evaluation took: seconds of this start (a killed run began before), responses, tokens, calls."""
    every = [responses for one in found.values() for t in one.responses for responses in one.samples(t)]
    store = run_dir / "judged.jsonl"
    return {
        "device": device,
        "devices": devices,
        "seconds": round(seconds, 3),
        "responses": sum(len(responses.texts) for responses in every),
        "tokens": sum(sum(responses.num_tokens) for responses in every),
        "verifier_calls": sum(len(responses.scores) for responses in every),
        "judge_questions": sum(1 for _ in read_jsonl(store)) if store.is_file() else 0,
    }


def own_cost(run_dir: Path) -> list[str]:
    """Say what the evaluation itself took; empty without its record."""
    found = read_json(run_dir / COST)
    if not found:
        return []
    hours = hours_text({found["device"]: found["seconds"] * found["devices"] / 3600})
    calls = f"{found['verifier_calls']:,} calls of the verifier, {found['judge_questions']:,} questions to the judge"
    return [f"This evaluation: {hours}, {found['responses']:,} responses of {found['tokens']:,} tokens, {calls}."]
