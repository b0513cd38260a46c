"""pipeline.refresh: rounds of generate, score, train as ordinary stages; a round is a slice of one longer run."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.optimizer import learning_rate_scale, scheduled_steps
from launch import run_task, settings_of
from pipeline.digests import digest_of
from pipeline.plan import Stage, build_plan
from tests.support.helpers import composed, launch, rows_of, write_pairs
from tests.test_pipeline import MAIN, NOWHERE, only, planned, root_config

ROUNDS = ("pipeline.refresh_every=150", "++pipeline.stages.adpa_plus.set.n_steps=400")  # 150, 150, 100
ENDS = {"evaluate", "summarize"}


def value(stage: Stage, key: str) -> Any:
    found: Any = stage.config
    for part in key.split("."):
        found = found[part]
    return found


@pytest.fixture(scope="module")
def off() -> dict[str, Stage]:
    return planned(NOWHERE, *MAIN)


@pytest.fixture(scope="module")
def on() -> dict[str, Stage]:
    return planned(NOWHERE, *MAIN, *ROUNDS)


def test_without_rounds_the_plan_is_what_it_was(off: dict[str, Stage]) -> None:
    raw = root_config(["pipeline=quickstart", *only("world", "student_sft")])
    del raw["pipeline"]["refresh"], raw["pipeline"]["refresh_every"]  # as a pipeline of one's own that knows neither
    for stage in build_plan({**raw, "cache_dir": str(NOWHERE)}, []):
        assert (
            stage.folder.name == off[stage.label].folder.name and stage.command[2:-1] == off[stage.label].command[2:-1]
        )
    for stage in off.values():
        before = {k: v for k, v in stage.config.items() if k not in ("first_step", "schedule_steps")}
        assert digest_of(before, NOWHERE / "stages") == stage.digest  # the new keys count only where they say something


def test_a_stage_becomes_rounds_and_the_last_one_stands_in_for_it(off: dict[str, Stage], on: dict[str, Stage]) -> None:
    rounds = [f"adpa_plus_r{n}" for n in (1, 2, 3)]
    made = [f"adpa_plus_r{n}_{what}" for n in (2, 3) for what in ("generate", "cache_advantages")]
    assert set(on) == {*off, *rounds, *made} - {"adpa_plus"}
    folder = {name: str(stage.folder) for name, stage in on.items()}
    starts = {name: value(on[name], "model.load_from") for name in (*rounds, *made)}
    assert starts == {
        "adpa_plus_r1": folder["dckd"] + "/FINAL",
        "adpa_plus_r2_generate": folder["adpa_plus_r1"] + "/FINAL",
        "adpa_plus_r2_cache_advantages": folder["teacher_dpo"] + "/FINAL",
        "adpa_plus_r2": folder["adpa_plus_r1"] + "/FINAL",
        "adpa_plus_r3_generate": folder["adpa_plus_r2"] + "/FINAL",
        "adpa_plus_r3_cache_advantages": folder["teacher_dpo"] + "/FINAL",
        "adpa_plus_r3": folder["adpa_plus_r2"] + "/FINAL",
    }
    for number, prefix in ((1, ""), (2, "adpa_plus_r2_"), (3, "adpa_plus_r3_")):
        said = f"{folder[prefix + 'generate']}/generations.jsonl"
        assert value(on[f"adpa_plus_r{number}"], "loss.generations") == said
        assert value(on[prefix + "cache_advantages"], "cache.generations") == said
        assert value(on[f"adpa_plus_r{number}"], "loss.advantages") == f"{folder[prefix + 'cache_advantages']}/CACHE"
        assert value(on[prefix + "cache_advantages"], "cache.reference") == folder["teacher_sft"] + "/FINAL"
    slices = [[value(on[name], key) for key in ("n_steps", "first_step", "schedule_steps")] for name in rounds]
    assert slices == [[150, 0, 400], [150, 150, 400], [100, 300, 400]]
    assert value(on["evaluate"], "evaluation.models")["adpa_plus"] == folder["adpa_plus_r3"] + "/FINAL"
    assert on["adpa_plus_r3"].folder in on["evaluate"].needs
    # what comes before the first round is shared with the plan that has none
    assert all(on[name].folder == stage.folder for name, stage in off.items() if name not in {"adpa_plus", *ENDS})


def test_another_length_of_a_round_runs_again_only_what_is_downstream(on: dict[str, Stage]) -> None:
    other = planned(NOWHERE, *MAIN, "pipeline.refresh_every=200", *ROUNDS[1:])
    kept = {name for name in on if name in other and on[name].digest == other[name].digest}
    assert kept == set(on) - ENDS - {name for name in on if name.startswith("adpa_plus_r")}
    later = planned(NOWHERE, *MAIN, ROUNDS[0], "++pipeline.stages.adpa_plus.set.n_steps=401")
    assert later["adpa_plus_r1"].digest != on["adpa_plus_r1"].digest  # the schedule of all rounds is another one
    cooler = planned(NOWHERE, *MAIN, *ROUNDS, "++pipeline.stages.cache_advantages.set.cache.top_k=6")
    assert cooler["adpa_plus_r2_cache_advantages"].digest != on["adpa_plus_r2_cache_advantages"].digest


def test_one_round_is_the_stage_as_it_is(off: dict[str, Stage]) -> None:
    one = planned(NOWHERE, *MAIN, "pipeline.refresh_every=400")
    assert {name: stage.folder for name, stage in one.items()} == {name: stage.folder for name, stage in off.items()}


def test_every_seed_has_its_rounds_and_labels_travel_as_caches_do() -> None:
    line = ("pipeline=online_dpo", "++pipeline.refresh=[dpo_2]", "++pipeline.refresh_every=100", "pipeline.seeds=[1,2]")
    plan = planned(NOWHERE, *line)
    second, label = plan["dpo_2_r2 seed 2"], plan["dpo_2_r2_label_2 seed 2"]
    assert value(second, "datasets.local.train") == f"{label.folder}/LABEL/labeled.jsonl"
    assert value(label, "label.responses").startswith(str(plan["dpo_2_r2_generate_2 seed 2"].folder))
    assert value(plan["dpo_2_r2_generate_2 seed 2"], "model.load_from") == f"{plan['dpo_2_r1 seed 2'].folder}/FINAL"
    assert value(second, "model.load_from") == f"{plan['dpo_2_r1 seed 2'].folder}/FINAL"
    assert plan["dpo_2_r1 seed 1"].folder != plan["dpo_2_r1 seed 2"].folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline.refresh=[dckd]"], r"reads no responses of the model that it starts from \(start: student_sft"),
        (["pipeline.refresh=[student_sft]"], "Add a stage with task: generate"),
        (["pipeline.refresh=[evaluate]"], "nothing to make anew"),
        (["pipeline.refresh=[adpa_pluss]"], "no such stage. Did you mean 'adpa_plus'"),
        (["pipeline.refresh=[]"], r"needs pipeline.refresh=\[STAGE\].*: adpa_plus"),
        (["n_steps=100"], r"n_steps=100: with pipeline.refresh_every=50 .*set.n_steps"),
        (["pipeline.stages.adpa_plus.set.n_steps=null"], r"set \+\+pipeline.stages.adpa_plus.set.n_steps"),
        (["pipeline.refresh_every=0"], "must be at least 1 step"),
        (["pipeline.refresh_every=1", "pipeline.stages.adpa_plus.set.n_steps=2000"], "more than 1000 rounds"),
    ],
)
def test_what_cannot_be_made_anew_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(NOWHERE, *MAIN, "pipeline.refresh_every=50", *overrides)


# ---- a round in the trainer


def test_the_schedule_of_a_round_is_a_slice_of_the_whole() -> None:
    line = ("loss=sft", "model=tiny", "datasets=[local]", "datasets.local.train=tests/test_refresh.py")

    def run(*overrides: str) -> Any:
        return settings_of(composed(*line, *overrides)).run

    assert scheduled_steps(run(), 7) == 7 and scheduled_steps(run("first_step=3"), 7) == 10
    assert scheduled_steps(run("first_step=3", "schedule_steps=20"), 7) == 20
    with pytest.raises(ValueError, match="reach beyond schedule_steps=9"):
        scheduled_steps(run("first_step=3", "schedule_steps=9"), 7)
    with pytest.raises(ValueError, match="no multiple of 2"):
        scheduled_steps(run("first_step=3"), 8, 2)
    with pytest.raises(ValueError, match="first_step=-1"):
        run("first_step=-1")
    assert learning_rate_scale(3, 20, 2, "cosine") < learning_rate_scale(2, 20, 2, "cosine")


def test_a_round_counts_the_examples_of_its_own_steps(tmp_path: Path) -> None:
    """10 rows in batches of 4: the whole run's steps have 4, 4, 2, 4 rows, and this round begins with the second."""
    data = write_pairs(tmp_path / "pairs.jsonl", 10)
    line = ["loss=dpo", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", "model.batch_size=4"]
    run_task(composed(*line, f"cache_dir={tmp_path}", "log_every=1", "n_steps=3", "first_step=1"))
    assert [row["examples"] for row in rows_of(tmp_path / "run" / "metrics.jsonl")] == [4, 6, 10]


@pytest.mark.slow
def test_a_round_goes_on_with_the_order_and_the_rate_of_the_whole_run(tmp_path: Path) -> None:
    """Plain SGD has no state, so two rounds are the one run to the last bit; with Adam only its moments are new."""
    write_pairs(tmp_path / "pairs.jsonl", 20)
    line = ["loss=sft", "model=tiny", "datasets=[local]", f"datasets.local.train={tmp_path}/pairs.jsonl"]
    line += [f"cache_dir={tmp_path}", "optimizer=SGD", "lr=0.05", "log_every=1", "loss.train_on=chosen", "warmup=2"]

    def losses(name: str, *overrides: str) -> list[tuple[float, float]]:
        done = launch(*line, f"exp_name={name}", *overrides)
        assert done.returncode == 0, done.stderr
        return [(row["loss/train"], row["lr"]) for row in rows_of(tmp_path / name / "metrics.jsonl")]

    whole = losses("whole", "n_steps=6")
    rounds = losses("r1", "n_steps=4", "schedule_steps=6")
    rounds += losses("r2", "n_steps=2", "first_step=4", "schedule_steps=6", f"model.load_from={tmp_path}/r1/FINAL")
    assert rounds == whole


@pytest.mark.slow
def test_two_rounds_run_through_and_the_second_hears_the_first_ones_model(tmp_path: Path) -> None:
    chain = ("world", "teacher_sft", "teacher_dpo", "student_sft", "dckd", "cache_logprobs")
    steps = [f"pipeline.stages.{n}.set.n_steps=20" for n in ("teacher_sft", "teacher_dpo", "student_sft", "dckd")]
    line = ["pipeline=quickstart", *only(*chain, "generate", "cache_advantages", "adpa_plus", "evaluate", "summarize")]
    line += [*steps, "pipeline.stages.adpa_plus.set.n_steps=8", "n_examples=200", "n_eval_examples=20"]
    line += [f"cache_dir={tmp_path}", "pipeline.refresh_every=4"]
    done = launch(*line, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run_dir = tmp_path / "quickstart"
    first, second = (rows_of(run_dir / name / "generations.jsonl") for name in ("generate", "adpa_plus_r2_generate"))
    assert [row["prompt_ids"] for row in first] == [row["prompt_ids"] for row in second]
    assert [row["response_ids"] for row in first] != [row["response_ids"] for row in second]
    assert "adpa_plus" in json.loads((run_dir / "results.json").read_text())["models"]
    again = launch(*line, "dry_run=true")
    assert "14 stages, 14 done, 0 to run" in again.stdout
    longer = launch(*line, "pipeline.stages.adpa_plus.set.lr=1.0e-3", "dry_run=true")
    assert "14 stages, 8 done, 6 to run" in longer.stdout  # two rounds, what lies between them, the ends
