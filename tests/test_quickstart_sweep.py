"""The sweep of the quickstart: what its plan tries and shares, what it chooses, what its page shows."""

import json
from pathlib import Path

from pipeline.plan import build_plan
from scripts import quickstart_sweep
from tests.test_pipeline import NOWHERE, root_config


def test_every_try_is_a_stage_of_its_own_and_all_share_teacher_start_and_caches() -> None:
    config = root_config(["pipeline=quickstart"])
    methods = ["adpa_plus_regularized", "seq_kd"]
    pipeline = quickstart_sweep.with_tries(config["pipeline"], methods) | {"seeds": [101]}
    plan = {stage.name: stage for stage in build_plan({**config, "pipeline": pipeline, "cache_dir": str(NOWHERE)}, [])}
    tries = [f"{method}_{n}" for method in methods for n in range(len(quickstart_sweep.tries_of(method)))]
    assert set(plan) == {*quickstart_sweep.BASE, *tries, "evaluate_starts", *(f"evaluate_{name}" for name in methods)}
    for name in tries:
        method, number = name.rsplit("_", 1)
        setting, _ = quickstart_sweep.tries_of(method)[int(number)]
        found = plan[name].config
        assert found["lr"] == setting["lr"] and found["seed"] == 101
        assert {key: found["loss"][key] for key in setting.get("loss", {})} == setting.get("loss", {})
    starts = {plan[f"adpa_plus_regularized_{n}"].config["model"]["load_from"] for n in range(4)}
    assert starts == {f"{plan['dckd'].folder}/FINAL"}
    assert len({plan[name].folder for name in tries}) == len(tries)
    judged = plan["evaluate_seq_kd"].config["evaluation"]
    assert judged["models"] == {f"try_{n}": f"{plan[f'seq_kd_{n}'].folder}/FINAL" for n in range(3)}
    assert judged["temperatures"] == [1.0, 0.3, 0.0]


def test_the_best_mean_over_the_ways_to_decode_is_chosen_and_what_is_recorded_is_not(tmp_path: Path) -> None:
    success = [(0.9, 0.5, 0.5), (0.7, 0.8, 0.8), (0.6, 0.6, 0.6), (1.0, 1.0, 1.0)]  # the last is RECORDED
    rows = {
        f"try_{n}": {"score": a, "other_temperatures": {"0.3": {"score": b}}, "greedy": {"score": c}}
        for n, (a, b, c) in enumerate(success)
    }
    folder = tmp_path / "evaluate_adpa_plus_regularized"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"models": rows}), encoding="utf-8")
    results = quickstart_sweep.results_of(tmp_path, 101)
    found = results["methods"]["adpa_plus_regularized"]
    assert [row["chosen"] for row in found] == [False, True, False, False]
    assert list(results["methods"]) == ["adpa_plus_regularized"] and not results["starts"]
    page = quickstart_sweep.table(results)
    assert (
        "| adpa_plus_regularized | lr 0.006, kl_reference start, kl_weight 2.0 | 0.700 | 0.800 | 0.800 | 0.767 |"
        in page
    )
    assert page.count("**chosen**") == 1 and page.count("| recorded |") == 1 and "world 101" in page
