"""Whether regularized ADPA+ collapses: the runs that scripts/stability.py plans, what counts as one, its page."""

import json

from pipeline.plan import build_plan
from scripts import stability
from tests.support.helpers import ROOT
from tests.test_pipeline import NOWHERE, root_config


def test_each_rate_is_a_run_from_the_same_start_beside_one_that_is_known_to_collapse() -> None:
    config = root_config(["pipeline=quickstart"])
    pipeline = stability.with_rates(config["pipeline"]) | {"seeds": [201]}
    plan = {stage.name: stage for stage in build_plan({**config, "pipeline": pipeline, "cache_dir": str(NOWHERE)}, [])}
    assert set(plan) == {*stability.BASE, *stability.NAMES, "evaluate"}
    runs = [plan[name].config for name in stability.NAMES]
    assert {run["model"]["load_from"] for run in runs} == {f"{plan['dckd'].folder}/FINAL"}
    assert [run["lr"] for run in runs[:-1]] == list(stability.RATES) and len({run["seed"] for run in runs}) == 1
    assert {run["loss"]["objective"] for run in runs[:-1]} == {"regularized"}
    assert runs[-1]["loss"]["objective"] == "expected" and runs[-1]["loss"]["sft_weight"] == 0


def test_less_than_half_of_the_starts_diversity_is_a_collapse() -> None:
    def seed(share: float) -> dict[str, dict[str, float]]:
        found = {name: {"success": 0.5, "diversity": 3.0} for name in (stability.START, *stability.NAMES)}
        return found | {stability.NAMES[0]: {"success": 0.4, "diversity": 3.0 * share}}

    results = {"seeds": {"1": seed(0.49), "2": seed(0.51)}}
    assert [stability.collapsed(found, stability.NAMES[0]) for found in results["seeds"].values()] == [True, False]
    assert stability.row_of(results, stability.NAMES[0]) == "| lr 0.003 | 0.400 | 0.400 | 1.50 | 0.49 | 1 |"


def test_the_page_is_that_of_the_file_which_runs_wrote() -> None:
    results = json.loads((ROOT / "docs/measured/stability.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/stability.md").read_text(encoding="utf-8") == stability.page(results)
    seeds = results["seeds"].values()
    assert not any(stability.collapsed(found, name) for found in seeds for name in stability.NAMES[:-1])
    fell = sum(stability.collapsed(found, stability.UNANCHORED) for found in seeds)
    assert fell > len(seeds) / 2, "the check can fail: the run that is known to collapse does, on most seeds"
