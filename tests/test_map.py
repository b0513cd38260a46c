"""The map: a method is marked only beyond the interval over seeds, and page, table and file say the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.cells import best_of, cell_results
from evaluation.intervals import seed_interval
from report.map_page import html, table, verdict
from settings.schema import MapConfig
from settings.typed import typed
from tasks.map import mapped
from tests.support.helpers import launch

APART = {"a": [0.80, 0.82, 0.81], "b": [0.60, 0.61, 0.62], "c": [0.1, 0.2, 0.1]}
LEVEL = {"a": [0.95, 0.60, 0.75], "b": [0.70, 0.75, 0.80], "c": [0.1, 0.2, 0.1]}  # a is ahead on average alone
# wide each, narrow as a pair
CLOSE_BUT_PAIRED = {
    "a": [0.51, 0.71, 0.912],
    "b": [0.50, 0.70, 0.90],
    "c": [0.4, 0.6, 0.8],
}


def test_a_best_method_is_apart_only_beyond_the_interval_of_the_paired_difference() -> None:
    assert best_of(APART)["apart"] and best_of(APART)["first"] == "a" and best_of(APART)["second"] == "b"
    level = best_of(LEVEL)
    assert level["first"] == "a" and level["difference"] > 0 and not level["apart"] and level["ci95_over_seeds"][0] < 0
    paired = best_of(CLOSE_BUT_PAIRED)
    assert paired["apart"] and paired["ci95_over_seeds"] == pytest.approx(
        seed_interval([0.01, 0.01, 0.012], (-1.0, 1.0))
    )
    assert not best_of({name: scores[:1] for name, scores in APART.items()})["apart"]  # one seed says nothing
    with pytest.raises(ValueError, match="at least two"):
        best_of({"a": [0.5, 0.6]})


def test_what_does_not_compete_is_never_the_best() -> None:
    found = cell_results({**APART, "teacher": [0.99, 0.99, 0.98]}, ["a", "b", "c"], [["teacher", "a"]])
    assert found["best"]["first"] == "a" and found["models"]["teacher"]["score"] > 0.98
    assert found["comparisons"][0]["difference"] == pytest.approx(0.1766, abs=1e-3)


def write_evaluation(folder: Path, seed: int, shares: dict[str, float], names: tuple[str, ...] = ()) -> str:
    """Write what task=map reads of an evaluation: 100 prompts, so many right; greedily ten more."""
    folder.mkdir(parents=True)
    right = {name: round(100 * share) for name, share in shares.items()}
    scores = {
        "1": {name: [1.0] * n + [0.0] * (100 - n) for name, n in right.items()},
        "0": {name: [1.0] * (n + 1) + [0.0] * (99 - n) for name, n in right.items()},
    }
    models = {name: {"folder": str(folder)} for name in names or shares}
    (folder / "results.json").write_text(json.dumps({"seed": seed, "models": models}), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    (folder / "DONE").touch()
    return str(folder)


def written(tmp_path: Path, **more: Any) -> MapConfig:
    """Return the section of a map of two cells and three seeds: in the first one a is apart, in the second level."""
    evaluations: dict[str, dict[str, str]] = {"cell_1": {}, "cell_2": {}}
    for cell, by_name in (("cell_1", APART), ("cell_2", LEVEL)):
        for i, seed in enumerate((21, 22, 23)):
            shares = {name: values[i] for name, values in by_name.items()}
            evaluations[cell][f"seed_{seed}"] = write_evaluation(tmp_path / cell / str(seed), seed, shares)
    knobs = {"cell_1": {"pairs": 100, "student": "x"}, "cell_2": {"pairs": 4000, "student": "x"}}
    section = {"evaluations": evaluations, "knobs": knobs, "methods": ["a", "b"], "comparisons": [["a", "c"]]}
    return typed({**section, **more}, MapConfig, "map.")


def test_table_and_page_mark_the_cell_that_is_apart_and_no_other(tmp_path: Path) -> None:
    results = mapped(written(tmp_path))
    assert (results["columns"], results["rows"], results["seeds"]) == ("pairs", None, [21, 22, 23])
    assert [cell["decoded"]["1"]["best"]["apart"] for cell in results["cells"]] == [True, False]
    assert verdict(results).endswith("in 1 of 2 cells: a in 1.")
    text, page = table(results), html(results)
    assert text.count("▲") == 2  # at temperature 1 and greedily
    assert "In all cells: student x." in text and "| pairs 4000 | a − c |" in text
    for part in ("best-1", "best-greedy"):
        section = re.search(rf'<section id="{part}">.*?</section>', page, re.S)
        assert section and section[0].count('<td class="apart"') == 1 and section[0].count('<td class="level"') == 1
        assert section[0].count("▲ apart from") == 1 and section[0].count("not told from") == 1
    assert re.search(r'href="#best-1"', page) and "http://" not in page and "https://" not in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methods": ["a", "d"]}, "map.methods holds 'd', which is no evaluated model"),
        ({"comparisons": [["a", "bb"]]}, "map.comparisons holds 'bb'"),
        ({"rows": "pair"}, "map.rows='pair' is no knob of this grid. Did you mean 'pairs'"),
    ],
)
def test_what_the_evaluations_do_not_hold_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapped(written(tmp_path, **more))


def test_cells_of_other_models_or_seeds_are_no_map(tmp_path: Path) -> None:
    config = written(tmp_path)
    other = write_evaluation(tmp_path / "other", 23, {"a": 0.5, "b": 0.5})
    config.evaluations["cell_2"]["seed_23"] = other
    with pytest.raises(ValueError, match="holds other models"):
        mapped(config)
    del config.evaluations["cell_2"]["seed_23"]
    with pytest.raises(ValueError, match="has seeds"):
        mapped(config)
    config.evaluations["cell_2"]["seed_23"] = config.evaluations["cell_2"]["seed_22"]
    with pytest.raises(ValueError, match="holds a seed twice"):
        mapped(config)


@pytest.mark.slow
def test_a_map_of_own_pairs_runs_through(tmp_path: Path) -> None:
    """pipeline=map with few steps: the student's own pairs, flipped; every method; the page at the end."""
    names = ("teacher_sft", "student_sft", "teacher_dpo", "dpo_nll", "dckd", "dckd_start", "seq_kd", "adpa")
    grid = {"pairs": 10, "flipped": 0.2, "policy": "own", "extra_prompts": 5, "teacher_steps": 2}
    run = launch(
        "pipeline=map",
        f"cache_dir={tmp_path}",
        "pipeline.seeds=[1]",
        *(f"pipeline.grid.{knob}=[{value}]" for knob, value in grid.items()),
        *(f"pipeline.stages.{name}.set.n_steps=2" for name in names if name != "teacher_dpo"),
        "++pipeline.stages.student_sft.set.n_steps=200",  # so that replies differ in what they get right
        "n_examples=200",
        "n_eval_examples=20",
        timeout=400,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads((tmp_path / "map/results.json").read_text(encoding="utf-8"))
    assert results["cells"][0]["knobs"]["policy"] == "own" and results["prompts"] == 20
    assert set(results["methods"]) < set(results["cells"][0]["decoded"]["1"]["models"])
    pairs = (tmp_path / "map/pairs_own/WORLD/pairs_train.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [(row["chosen_reward"], row["rejected_reward"]) for row in map(json.loads, pairs)]
    assert len(pairs) == 10 and 0 < sum(chosen < rejected for chosen, rejected in rewards) < 10
    assert (tmp_path / "map/report.html").is_file()
