"""A grid of cells in a pipeline: how many stages, what cells share, what is refused; the knobs of the small world."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.grid import Cell, cells_of, turned
from pipeline.plan import Stage
from settings.typed import typed
from settings.world_sections import SHOP_PAIRS, WorldConfig
from tests.test_pipeline import NOWHERE, planned, run
from worlds import shop

SMALL = ("pipeline=map", "pipeline.seeds=[1]")


def plan_of(*overrides: str) -> dict[str, Stage]:
    """Return the plan of a small map."""
    return planned(NOWHERE, *SMALL, *overrides)


def counted(plan: dict[str, Stage]) -> dict[str, int]:
    """Return how many stages of each name there are."""
    names = [stage.name for stage in plan.values()]
    return {name: names.count(name) for name in names}


# ---- the grid


def test_a_cell_says_its_values_and_a_knob_alone_keeps_its_type() -> None:
    section = {"grid": {"a": [1, 2], "b": ["x", "y"]}, "stages": {"s": {}}, "set": {"k": "{a}", "l": "s_{b}"}}
    cells = cells_of(section)
    assert [cell.knobs for cell in cells] == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]
    assert [cell.name for cell in cells] == ["cell_1", "cell_2", "cell_3", "cell_4"]
    assert turned({"k": "{a}", "l": ["{s_{b}}/{seed}"]}, {"a": 0.4, "b": "x"}) == {"k": 0.4, "l": ["{s_x}/{seed}"]}
    assert cells_of({"stages": {}}) == [Cell("", {})]


def test_cells_share_what_no_knob_of_theirs_reaches() -> None:
    off = [f"pipeline.stages.{name}=null" for name in ("dckd_start", "generate", "cache_advantages", "adpa")]
    plan = plan_of("pipeline.grid.pairs=[100,200]", "pipeline.grid.flipped=[0.0]", "pipeline.seeds=[1,2]", *off)
    assert len(plan) == len({stage.folder for stage in plan.values()})  # no label twice, no folder twice
    shared = ("world", "teacher_sft", "student_sft")
    assert {name: 2 if name in shared else 1 if name == "map" else 4 for name in counted(plan)} == counted(plan)
    assert not {"generate_own", "label_own", "pairs_own", "more"} & set(counted(plan))  # nobody needs them
    longer = plan_of("pipeline.grid.pairs=[100]", "pipeline.grid.flipped=[0.0]", "pipeline.grid.extra_prompts=[0,50]")
    counts = counted(longer)  # more prompts: other replies of the same teacher
    assert (counts["teacher_dpo"], counts["dckd"], counts["dpo_nll"], counts["seq_kd"], counts["adpa"]) == (
        1,
        1,
        1,
        2,
        2,
    )
    starts = {plan[f"dpo_nll pairs={pairs} seed 2"].config["model"]["load_from"] for pairs in (100, 200)}
    assert starts == {f"{plan['student_sft seed 2'].folder}/FINAL"}
    assert [plan[f"pairs_foreign pairs={n} seed 1"].config["world"]["pairs"] for n in (100, 200)] == [100, 200]
    last = list(plan.values())[-1]
    assert last.name == "map" and len(last.needs) == 4
    cells = last.config["map"]
    assert {name: knobs["pairs"] for name, knobs in cells["knobs"].items()} == {"cell_1": 100, "cell_2": 200}
    assert cells["evaluations"]["cell_2"]["seed_1"] == str(plan["evaluate pairs=200 seed 1"].folder)


def test_own_pairs_a_shared_teacher_and_another_student_reach_what_they_should() -> None:
    own = plan_of("pipeline.grid.pairs=[100]", "pipeline.grid.flipped=[0.0]", "pipeline.grid.policy=[own]")
    assert own["pairs_own"].config["world"]["own_pairs"] == f"{own['label_own'].folder}/LABEL/labeled.jsonl"
    assert own["generate_own"].config["model"]["load_from"] == f"{own['student_sft'].folder}/FINAL"
    one_share = "pipeline.grid.flipped=[0.0]"
    students = "pipeline.grid.student=[quickstart_student,shop_teacher]"
    every = plan_of("pipeline.grid.teacher_pairs=[all]", students, one_share)
    counts = counted(every)
    assert (counts["teacher_dpo"], counts["student_sft"], counts["cache_logprobs"], counts["dpo_nll"]) == (1, 2, 2, 4)
    wide = every["student_sft student=shop_teacher"].config["model"]["build"]
    assert wide["num_hidden_layers"] == 2 and wide["hidden_size"] == 64
    one = every["teacher_dpo"].config
    assert one["datasets"]["local"]["train"] == f"{every['world'].folder}/WORLD/pairs_train.jsonl"


def test_the_same_cell_of_another_grid_is_the_same_stage() -> None:
    one = plan_of("pipeline.grid.pairs=[100]", "pipeline.grid.flipped=[0.4]")
    wide = plan_of("pipeline.grid.pairs=[4000,100]", "pipeline.grid.flipped=[0.0,0.4]")
    assert one["evaluate"].folder == wide["evaluate pairs=100 flipped=0.4"].folder
    assert one["map"].folder != wide["map"].folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++pipeline.grid.pair=[1]"], "nothing in this pipeline says {pair}.*Did you mean 'pairs'"),
        (["++pipeline.grid.seed=[1]"], "a knob is a word, and none of seed, cell, knobs"),
        (["++pipeline.grid.world=[1]"], "a stage has this name"),
        (["pipeline.grid.pairs=100"], r"must be a list of values, e\.g\. \[100\]"),
        (["pipeline.grid.pairs=[]"], "has no value"),
        (["pipeline.grid.pairs=[100,100]"], "stands there twice"),
        (["pipeline.grid.policy=['a b']"], "'a b' must be a number, true, false or a word"),
        (["pipeline.grid.pairs=[{a: 1}]"], "must be a number"),
        (
            ["pipeline.grid.policy=[on]", "pipeline.grid.pairs=[100]"],
            "needs stage 'pairs_on'.*Did you mean 'pairs_own'",
        ),
        (["pipeline.grid.pairs=[5000]"], "world.pairs=5000 must be from 1 to 4000"),
        (["pipeline.grid.flipped=[0.33]"], "world.flipped=0.33 must be a share"),
        (["pipeline.grid.teacher_pairs=[none]"], "teacher_none"),
        (["~pipeline.grid.pairs"], "'pairs'"),
        (["pipeline.stages.map=null"], "once: true"),
        (["++pipeline.stages.cell={task: world}"], "means something else"),
        # "{lr-3}" was no placeholder, and reached the stage as it stood.
        (["++pipeline.stages.lr-3={task: world}"], "letters, digits and _"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(*overrides)


def test_a_dry_run_shows_the_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *SMALL, "pipeline.grid.pairs=[100,200]", "pipeline.grid.flipped=[0.4]", "dry_run=true") == 0
    printed = capsys.readouterr().out
    assert "cell_2  pairs=200 flipped=0.4 policy=foreign extra_prompts=2000" in printed
    assert "adpa pairs=100  " in printed and "30 stages, 0 done, 30 to run" in printed


# ---- the knobs of the world


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, Any]]]:
    return shop.generate(1)


def pairs_of(data: dict[str, list[dict[str, Any]]], **knobs: Any) -> list[dict[str, Any]]:
    return shop.turned_knobs(data, 1, shop.Knobs(**knobs))["pairs_train.jsonl"]


def test_the_default_knobs_leave_every_byte(data: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    config = typed({"name": "shop"}, WorldConfig)
    assert (config.pairs, config.flipped, config.extra_prompts, config.own_pairs) == shop.Knobs()
    assert shop.turned_knobs(data, 1, shop.AS_IT_IS) == data and SHOP_PAIRS == shop.PAIRS_TRAIN
    shop.write(tmp_path, 1)
    for name, rows in data.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == "".join(json.dumps(row) + "\n" for row in rows)


def test_fewer_pairs_are_a_prefix_and_flips_a_fixed_subset(data: dict[str, list[dict[str, Any]]]) -> None:
    plain = data["pairs_train.jsonl"]
    assert pairs_of(data, pairs=100) == plain[:100]
    sets = {}
    for flipped in (0.2, 0.4):
        rows = pairs_of(data, flipped=flipped)
        sets[flipped] = {i for i, (row, was) in enumerate(zip(rows, plain, strict=True)) if row != was}
        assert len(sets[flipped]) == flipped * 4000
        assert sum(i < 50 for i in sets[flipped]) == flipped * 50  # also of few pairs
        assert pairs_of(data, pairs=250, flipped=flipped) == rows[:250]
        for i in sets[flipped]:
            assert (rows[i]["chosen"], rows[i]["rejected"]) == (plain[i]["rejected"], plain[i]["chosen"])
    assert sets[0.2] < sets[0.4]
    assert sets[0.4] != {i for i, on in enumerate(shop.is_flipped(2, 4000, 0.4)) if on}  # another seed, others


def test_extra_prompts_are_new_and_begin_alike(data: dict[str, list[dict[str, Any]]]) -> None:
    files = {n: shop.turned_knobs(data, 1, shop.Knobs(pairs=50, extra_prompts=n)) for n in (0, 30, 60)}
    said = {n: [row["messages"][0]["content"] for row in found["prompts_train.jsonl"]] for n, found in files.items()}
    assert said[0] == [row["chosen"][0]["content"] for row in data["pairs_train.jsonl"][:50]]
    assert said[60][:80] == said[30] and said[30][:50] == said[0] and len(set(said[60])) == 110
    every = {(row.get("messages") or row["chosen"])[0]["content"] for rows in data.values() for row in rows}
    assert not every & set(said[60][50:])
    assert all(shop.parse_prompt(prompt) for prompt in said[60])
    assert {name: files[30][name] for name in data if name != "pairs_train.jsonl"} == {
        name: rows for name, rows in data.items() if name != "pairs_train.jsonl"
    }


def test_pairs_of_ones_own_are_cut_and_flipped_with_their_ids(data: dict[str, list[dict[str, Any]]]) -> None:
    prompt = data["pairs_train.jsonl"][0]["chosen"][:1]
    own = [
        {"prompt": prompt, "chosen": f"a{i}", "chosen_ids": [i], "rejected": "b", "rejected_ids": []} for i in range(60)
    ]
    rows = pairs_of(data, pairs=50, flipped=0.4, own_pairs=own)
    flipped = [row for row in rows if row["chosen"] == "b"]
    assert len(rows) == 50 and len(flipped) == 20
    assert all(row["rejected"] == f"a{row['rejected_ids'][0]}" and row["chosen_ids"] == [] for row in flipped)
    with pytest.raises(ValueError, match="world.pairs=61: there are 60 pairs"):
        pairs_of(data, pairs=61, own_pairs=own)


def test_the_checker_that_orders_pairs_counts_the_checks() -> None:
    prompt = shop.prompt_text(shop.EXAMPLE)
    good = "dear ida , 9 figs and 5 kiwis makes 14 , and 8 apples makes 22 . thank you !"
    assert shop.share(prompt, good) == 1.0
    assert shop.share(prompt, good.replace("makes 14", "makes 13").replace("ida", "ben")) == pytest.approx(4 / 6)
    assert shop.share(prompt, "") == 0.0


def test_another_world_has_no_knobs() -> None:
    with pytest.raises(ValueError, match="world.name=arithmetic has no knobs"):
        typed({"name": "arithmetic", "pairs": 100}, WorldConfig)
