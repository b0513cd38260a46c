"""What other tools said of an evaluation's models, found in its folder, beside our own results.

alpaca_eval/tool.json     scripts/run_alpaca_eval.py
model_judgment/**.jsonl   Arena-Hard's or MT-bench's judging of model_answer/NAME.jsonl
lm_eval/NAME.json         the results of lm-evaluation-harness's own command, where evaluation.lm_eval was not used
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.harness import metrics_of
from evaluation.judgments import judgments_in
from evaluation.standing import TWO_SIDED
from settings.artifacts import read_json

WORDS = {"arena": "Arena-Hard", "pair": "MT-bench, pairs", "score": "MT-bench, 1 to 10"}


def of_alpaca_eval(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Read what scripts/run_alpaca_eval.py wrote: {model: [plain win rate, the length-controlled one]}.

    The second has no interval: the tool's error is that of its fitted predictions, which are all equal without the
    instructions' difficulties.
    """
    said = read_json(file)
    found: dict[str, list[dict[str, Any]]] = {}
    for model, row in said.get("models", {}).items():
        value, half = row["win_rate"] / 100, TWO_SIDED * row["standard_error"] / 100
        ends = [max(0.0, value - half), min(1.0, value + half)]
        over = f"over {said['opponent']}"
        found[model] = [{"label": f"AlpacaEval {over}", "value": value, "ci95": ends, "n": row["n_total"]}]
        controlled = row.get("length_controlled_winrate")
        if controlled is not None:
            label = f"AlpacaEval, length-controlled {over}"
            found[model].append({"label": label, "value": controlled / 100, "ci95": None, "n": row["n_total"]})
    return found


def of_judgments(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read model_judgment/: {model: [entry, ...]}."""
    if not folder.is_dir():
        return {}
    found = {}
    for model, entries in judgments_in(folder).items():
        for entry in entries:
            over = f" over {entry['opponent']}" if entry["opponent"] else ""
            entry["label"] = f"{WORDS[entry['kind']]}{over}, by {entry['by']}"
        found[model] = entries
    return found


def of_harness(folder: Path, model: str) -> dict[str, Any]:
    """Read lm_eval/MODEL.json, as lm-evaluation-harness's command writes results; empty where it is missing."""
    said = read_json(folder / f"{model}.json")
    counts = {name: row.get("effective") for name, row in (said.get("n-samples") or {}).items()}
    better = said.get("higher_is_better") or {}
    return {
        name: {"n": counts.get(name), "metrics": metrics_of(row, better.get(name))}
        for name, row in said.get("results", {}).items()
    }


def with_outside(run_dir: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results with what other tools said of each model; those of unknown models are an error.

    ValueError names the model and the file's folder: a misspelt name would be a figure that is never seen.
    """
    found = of_alpaca_eval(run_dir / "alpaca_eval" / "tool.json")
    for model, entries in of_judgments(run_dir / "model_judgment").items():
        found.setdefault(model, []).extend(entries)
    for model in found:
        if model not in results["models"]:
            raise ValueError(
                f"{run_dir} holds judgments of {model!r}, and evaluated {', '.join(results['models'])}: rename the "
                "model there, or take the file away"
            )
    models = {}
    for name, row in results["models"].items():
        benchmarks = {**of_harness(run_dir / "lm_eval", name), **(row.get("lm_eval") or {})}
        more = {"outside": found[name]} if name in found else {}
        models[name] = {**row, **more, **({"lm_eval": benchmarks} if benchmarks else {})}
    return {**results, "models": models}
