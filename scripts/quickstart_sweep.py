"""Tune the methods of pipeline=quickstart with the same budget, on a world that the final table does not use.

    python scripts/quickstart_sweep.py [--seed 101] [--methods dckd_long seq_kd] [--parallel 2] [--to docs]

Each method has three tries (TRIES), all of as many steps from the SFT student. Teacher, DCKD start, responses and
caches are shared. Every try is judged on 500 held-out prompts of its world; chosen is the best mean success over
temperature 1, temperature 0.3 and greedy. RECORDED is tried, too, and cannot be chosen. Writes
measured/quickstart_sweep.json and quickstart_sweep.md with every tried setting; config/pipeline/quickstart.yaml holds
the chosen ones.
"""

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.composing import merged
from pipeline.runner import run_pipeline
from settings.artifacts import write_json, write_text

PROMPTS = 500  # of the held-out ones, for validation
TEMPERATURES = [1.0, 0.3, 0.0]
NAME = "quickstart_sweep"
ALONE = {"opponent": None, "match_entropy": None}  # a table that compares its models with none of the quickstart's


# What is laid over the `set` of the method's stage in config/pipeline/quickstart.yaml.
TRIES: dict[str, list[dict[str, Any]]] = {
    "dckd_long": [
        {"lr": 3.0e-3, "loss": {"teacher_temperature": 0.3}},
        {"lr": 6.0e-3, "loss": {"teacher_temperature": 0.3}},
        {"lr": 1.0e-2, "loss": {"teacher_temperature": 0.3}},
    ],
    "adpa_plus_regularized": [
        {"lr": 3.0e-3, "loss": {"kl_reference": "start", "kl_weight": 2.0}},
        {"lr": 6.0e-3, "loss": {"kl_reference": "start", "kl_weight": 2.0}},
        {"lr": 3.0e-3, "loss": {"kl_reference": "reference_teacher", "kl_weight": 1.0}},
    ],
    "no_teacher": [
        {"lr": 3.0e-3, "loss": {"target_temperature": 0.3}},
        {"lr": 6.0e-3, "loss": {"target_temperature": 0.3}},
        {"lr": 3.0e-3, "loss": {"target_temperature": 0.15}},
    ],
    "adpa_plus": [
        {"lr": 3.0e-3, "loss": {"gamma": 1.0, "sft_weight": 1.0}},
        {"lr": 6.0e-3, "loss": {"gamma": 1.0, "sft_weight": 1.0}},
        {"lr": 3.0e-3, "loss": {"gamma": 1.0, "sft_weight": 0.3}},
    ],
    "student_dpo_nll": [
        {"lr": 6.0e-3, "loss": {"nll_weight": 0.3}},
        {"lr": 1.0e-2, "loss": {"nll_weight": 0.3}},
        {"lr": 6.0e-3, "loss": {"nll_weight": 1.0}},
    ],
    "seq_kd": [{"lr": 3.0e-3}, {"lr": 6.0e-3}, {"lr": 1.0e-2}],
    "dckd_nll": [
        {"lr": 6.0e-3, "loss": {"sft_weight": 1.0, "teacher_temperature": 1.0}},
        {"lr": 6.0e-3, "loss": {"sft_weight": 1.0, "teacher_temperature": 0.3}},
        {"lr": 6.0e-3, "loss": {"sft_weight": 0.3, "teacher_temperature": 0.3}},
    ],
    "reverse_kl": [
        {"lr": 1.0e-3, "loss": {"teacher_temperature": 0.3}},
        {"lr": 3.0e-3, "loss": {"teacher_temperature": 0.3}},
        {"lr": 6.0e-3, "loss": {"teacher_temperature": 0.3}},
    ],
    "online_adpa": [
        {"lr": 3.0e-3, "loss": {"kl_reference": "reference_teacher", "kl_weight": 1.0}},
        {"lr": 6.0e-3, "loss": {"kl_reference": "reference_teacher", "kl_weight": 1.0}},
        {"lr": 6.0e-3, "loss": {"kl_reference": "start", "kl_weight": 2.0}},
    ],
}
# What the regularized objective did by default before: the rest of the reference teacher's mass was asked for.
RECORDED: dict[str, list[dict[str, Any]]] = {
    "adpa_plus_regularized": [
        {"lr": 3.0e-3, "loss": {"kl_reference": "reference_teacher", "kl_weight": 1.0, "rest_advantage": "zero"}},
    ]
}
BASE = ("world", "teacher_sft", "teacher_dpo", "cache_logprobs", "student_sft", "generate_teacher", "dckd", "generate")
BASE += ("cache_advantages",)
STARTS = ("teacher_dpo", "student_sft", "dckd")  # judged, too


def tries_of(method: str) -> list[tuple[dict[str, Any], bool]]:
    """Return the settings of a method, each with whether it may be chosen."""
    return [(one, True) for one in TRIES[method]] + [(one, False) for one in RECORDED.get(method, [])]


def with_tries(pipeline: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Return the quickstart with a stage for each try of the methods in the place of theirs, and one table a method."""
    stages = {name: stage for name, stage in pipeline["stages"].items() if name in BASE}
    template = pipeline["stages"]["evaluate"]
    table = {**template["set"]["evaluation"], "temperatures": TEMPERATURES, **ALONE}
    judged = {"starts": {name: f"{{{name}}}/FINAL" for name in STARTS}}
    # Each table as soon as its models are there, so that a run that is stopped has the methods so far.
    stages["evaluate_starts"] = {**template, "set": {"evaluation": {**table, "models": judged["starts"]}}}
    for method in methods:
        original = pipeline["stages"][method]
        for number, (one, _) in enumerate(tries_of(method)):
            stages[f"{method}_{number}"] = {**copy.deepcopy(original), "set": merged(original["set"], one)}
        judged[method] = {f"try_{n}": f"{{{method}_{n}}}/FINAL" for n in range(len(tries_of(method)))}
        stages[f"evaluate_{method}"] = {**template, "set": {"evaluation": {**table, "models": judged[method]}}}
    return {**pipeline, "name": NAME, "stages": stages}


def scores(run_dir: Path, method: str) -> dict[str, dict[str, float]]:
    """Return the success of every model of a method's table, by the words of its decoding, and their mean."""
    file = run_dir / f"evaluate_{method}" / "results.json"
    if not file.is_file():
        return {}
    found = {}
    for name, row in json.loads(file.read_text(encoding="utf-8"))["models"].items():
        parts = {"1": row["score"], "0.3": row["other_temperatures"]["0.3"]["score"], "greedy": row["greedy"]["score"]}
        found[name] = parts | {"mean": sum(parts.values()) / len(parts)}
    return found


def results_of(run_dir: Path, seed: int) -> dict[str, Any]:
    """Return every tried setting with its success, and which one is chosen."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for method in TRIES:
        by_try = scores(run_dir, method)
        rows = [
            {"setting": one, "eligible": eligible, "success": by_try[f"try_{number}"]}
            for number, (one, eligible) in enumerate(tries_of(method))
            if f"try_{number}" in by_try
        ]
        best = max((row["success"]["mean"] for row in rows if row["eligible"]), default=None)
        if rows:
            methods[method] = [{**row, "chosen": row["eligible"] and row["success"]["mean"] == best} for row in rows]
    return {"world_seed": seed, "prompts": PROMPTS, "starts": scores(run_dir, "starts"), "methods": methods}


def worded(setting: dict[str, Any]) -> str:
    """Return a setting as one would type it."""
    return ", ".join([f"lr {setting['lr']:g}", *(f"{key} {value}" for key, value in setting.get("loss", {}).items())])


def table(results: dict[str, Any]) -> str:
    """Return the page with every tried setting."""
    head = f"""# Every setting that was tried for the quickstart

Written by `python scripts/quickstart_sweep.py --seed {results["world_seed"]}`: success on {results["prompts"]} held-out
prompts of world {results["world_seed"]}, one run each, the same number of steps and of tries for each method. Chosen is
the best mean over the three ways to decode; what stands as "recorded" could not be chosen.

| method | setting | temperature 1 | 0.3 | greedy | mean | |
| --- | --- | --- | --- | --- | --- | --- |
"""
    lines = [_line(name, "", found, "start") for name, found in results["starts"].items()]
    for method, rows in results["methods"].items():
        for row in rows:
            word = "**chosen**" if row["chosen"] else "" if row["eligible"] else "recorded"
            lines.append(_line(method, worded(row["setting"]), row["success"], word))
    return head + "\n".join(lines) + "\n"


def _line(name: str, setting: str, found: dict[str, float], word: str) -> str:
    values = [f"{found[key]:.3f}" for key in ("1", "0.3", "greedy", "mean")]
    return f"| {' | '.join([name, setting, *values, word])} |"


def run_changed(change: Callable[[dict[str, Any]], dict[str, Any]], cache_dir: Path, prompts: int) -> int:
    """Run what `change` makes of the quickstart's pipeline group; return the pipeline's exit status."""
    typed = ["pipeline=quickstart", f"cache_dir={shlex.quote(str(cache_dir))}", f"n_eval_examples={prompts}"]
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", typed), resolve=True)
    config["datasets"] = config.get("datasets") or {}
    config["pipeline"] = change(config["pipeline"])
    return run_pipeline(config, typed)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every script that changes the quickstart."""
    parser.add_argument("--parallel", type=int, default=2, help="stages at the same time")
    parser.add_argument("--cache-dir", default="outputs")
    parser.add_argument("--to", type=Path, default=ROOT / "docs")
    parser.add_argument("--only-write", action="store_true", help="run nothing: write what is there")


def write(folder: Path, name: str, results: dict[str, Any], page: str) -> None:
    """Write measured/NAME.json and NAME.md, and print the page."""
    (folder / "measured").mkdir(parents=True, exist_ok=True)
    write_json(folder / "measured" / f"{name}.json", results)
    write_text(folder / f"{name}.md", page)
    print(page)


def main(arguments: list[str]) -> int:
    """Run what is missing and write both files."""
    parser = argparse.ArgumentParser(prog="python scripts/quickstart_sweep.py", description=__doc__)
    parser.add_argument("--seed", type=int, default=101, help="the world, and every other seed")
    parser.add_argument("--methods", nargs="+", default=list(TRIES), choices=list(TRIES))
    add_common(parser)
    options = parser.parse_args(arguments)
    knobs = {"seeds": [options.seed], "parallel": options.parallel}
    change = lambda pipeline: with_tries(pipeline, options.methods) | knobs  # noqa: E731
    code = 0 if options.only_write else run_changed(change, Path(options.cache_dir), PROMPTS)
    results = results_of(Path(options.cache_dir).expanduser() / NAME, options.seed)
    write(options.to, NAME, results, table(results))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
