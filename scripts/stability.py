"""Ask whether regularized ADPA+ collapses: many seeds of the quickstart's world, three learning rates each.

    python scripts/stability.py [--seeds 201 202 203] [--parallel 2] [--to docs]

A seed has its own world, teachers and students. A run collapses where the entropy of its right responses at
temperature 1 (benchmarks/diversity.py, nats, at most 3.58) falls below half of that of the student it starts from.
`unanchored` is the paper's objective without its NLL term, which is known to collapse: the check can fail. Writes
measured/stability.json and stability.md of the seeds that are there.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.diversity import diversity
from pipeline.composing import merged
from scripts.quickstart_sweep import ALONE, add_common, run_changed, write

NAME = "stability"
PROMPTS = 500
RATES = (3.0e-3, 6.0e-3, 1.0e-2)
METHOD, START = "adpa_plus_regularized", "dckd"
UNANCHORED = "unanchored"
BASE = ("world", "teacher_sft", "teacher_dpo", "cache_logprobs", "student_sft", "dckd", "generate", "cache_advantages")
LEAST_KEPT = 0.5  # of the start's diversity: a run with less has collapsed


def tried(rate: float) -> str:
    """Return the name of the run with a learning rate."""
    return f"rate_{round(1000 * rate)}"


WORDS = {tried(rate): f"lr {rate:g}" for rate in RATES}
NAMES = (*(tried(rate) for rate in RATES), UNANCHORED)


def with_rates(pipeline: dict[str, Any]) -> dict[str, Any]:
    """Return the quickstart with a run for each rate, the one that is known to collapse, and one table a seed."""
    stages = {name: stage for name, stage in pipeline["stages"].items() if name in BASE}
    for rate in RATES:
        method = copy.deepcopy(pipeline["stages"][METHOD])
        stages[tried(rate)] = {**method, "set": merged(method["set"], {"lr": rate})}
    linear = copy.deepcopy(pipeline["stages"]["adpa_plus"])
    stages[UNANCHORED] = {**linear, "set": merged(linear["set"], {"loss": {"sft_weight": 0.0}})}
    template = pipeline["stages"]["evaluate"]
    models = {name: f"{{{name}}}/FINAL" for name in (START, *NAMES)}
    asked = {**template["set"]["evaluation"], "temperatures": [1.0], "models": models, **ALONE}
    stages["evaluate"] = {**template, "set": {"evaluation": asked}}
    return {**pipeline, "stages": stages}


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Return success and diversity of the models of one seed's evaluation."""
    scores = json.loads((folder / "results.json").read_text(encoding="utf-8"))["models"]
    found = {}
    for name in (START, *NAMES):
        rows = json.loads((folder / "alpaca_eval" / f"{name}.json").read_text(encoding="utf-8"))
        spread = diversity([(row["instruction"], row["output"]) for row in rows])
        found[name] = {"success": scores[name]["score"], "diversity": spread}
    return found


def results_of(cache_dir: Path, seeds: list[int]) -> dict[str, Any]:
    """Return what is there of the seeds."""
    folders = {seed: cache_dir / f"{NAME}_{seed}" / "evaluate" for seed in seeds}
    there = {seed: folder for seed, folder in folders.items() if (folder / "results.json").is_file()}
    return {"prompts": PROMPTS, "seeds": {str(seed): measured(folder) for seed, folder in there.items()}}


def collapsed(found: dict[str, dict[str, float]], name: str) -> bool:
    """Say whether a run kept less than half of its start's diversity."""
    return found[name]["diversity"] < LEAST_KEPT * found[START]["diversity"]


def row_of(results: dict[str, Any], name: str) -> str:
    """Return the line of one kind of run over all seeds."""
    seeds = list(results["seeds"].values())
    kept = [found[name]["diversity"] / found[START]["diversity"] for found in seeds]
    success = [found[name]["success"] for found in seeds]
    cells = [WORDS.get(name, name), f"{statistics.fmean(success):.3f}", f"{min(success):.3f}"]
    cells += [f"{statistics.fmean(found[name]['diversity'] for found in seeds):.2f}", f"{min(kept):.2f}"]
    return f"| {' | '.join([*cells, str(sum(collapsed(found, name) for found in seeds))])} |"


def page(results: dict[str, Any]) -> str:
    """Return the page: one line for the start, each rate and the run that collapses."""
    head = f"""# Does regularized ADPA+ collapse?

Written by `python scripts/stability.py`: {len(results["seeds"])} seeds of the quickstart's world, each with its own
teachers and students, and {results["prompts"]} held-out prompts at temperature 1. Diversity is the entropy in nats of
what a right response may vary in, at most 3.58. A run has collapsed where less than half of its start's is left. The
start is `dckd`; `unanchored` is the paper's objective without its NLL term.

| run | success | lowest | diversity | lowest share of the start's | collapsed |
| --- | --- | --- | --- | --- | --- |
"""
    return head + "\n".join(row_of(results, name) for name in (START, *NAMES)) + "\n"


def run_seed(seed: int, cache_dir: Path, parallel: int) -> int:
    """Run what is missing of one seed; return the pipeline's exit status."""
    knobs = {"seeds": [seed], "parallel": parallel, "name": f"{NAME}_{seed}"}
    return run_changed(lambda pipeline: with_rates(pipeline) | knobs, cache_dir, PROMPTS)


def main(arguments: list[str]) -> int:
    """Run what is missing and write both files."""
    parser = argparse.ArgumentParser(prog="python scripts/stability.py", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(201, 221)))
    add_common(parser)
    options = parser.parse_args(arguments)
    cache_dir = Path(options.cache_dir).expanduser()
    code = 0
    if not options.only_write:
        for seed in options.seeds:  # one after the other: what is stopped has the seeds so far
            code = code or run_seed(seed, cache_dir, options.parallel)
    results = results_of(cache_dir, options.seeds)
    if not results["seeds"]:
        return code or 1
    write(options.to, NAME, results, page(results))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
