"""Sweeps: the folders of the jobs, the launchers, one teacher cache for all, and the table of task=report."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import yaml

import launch as launcher
from evaluation.metrics import interval_over_seeds
from pipeline.sweeps import as_sweep, fixed_keys, folder_name
from report.running import line_of, state_of
from tasks.report import best_rows, html, read_jobs, rows_of, table
from tests.support.helpers import composed, launch, write_pairs


@pytest.mark.parametrize(
    ("line", "fixed"),
    [
        (["-m", "loss=dpo,adpa", "++lr=1e-7,5e-7", "exp_name=x"], ["exp_name"]),
        (["-m", "seed=range(1,4)", "model=tiny"], ["model"]),
        (["-m", "datasets=[a,b]", "lr=1,2"], ["datasets"]),  # a list is one value
        (["-m", "lr=1,2", "exp_name='b${lr}'"], None),  # the user names the folders
        (["-m", "lr=1,2", "run_count=a,b"], None),
    ],
)
def test_what_varies_is_read_off_the_command_line(line, fixed):
    assert fixed_keys(line) == fixed


def test_only_a_sweep_gets_names(monkeypatch):
    assert as_sweep(["lr=1"]) == ["lr=1"]
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    line = as_sweep(["-m", "lr=1,2", "--config-dir", "more"])
    assert line[1].startswith("hydra.job.config.override_dirname.exclude_keys=[") and line[2:] == [
        "lr=1,2",
        "--config-dir",
        "more",
    ]


def test_folder_names_are_single_short_and_distinct():
    assert folder_name(["++lr=1e-07", "loss=dpo"]) == "loss=dpo,lr=1e-07"
    assert "/" not in folder_name(["model.load_from=/a/b/FINAL"])
    long = [folder_name([f"model.load_from={'x' * 300}{i}"]) for i in range(2)]
    assert long[0] != long[1] and max(map(len, long)) < 200


def overrides(tmp_path: Path) -> list[str]:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    return [
        f"cache_dir={tmp_path}/runs",
        "exp_name=sweep",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"datasets.local.test={data}",
        "n_steps=2",
        "lr=1e-3",
        "log_every=1",
    ]


@pytest.mark.slow
def test_a_sweep_fills_a_folder_a_job_and_a_second_call_skips_all(tmp_path):
    line = ["-m", *overrides(tmp_path), "loss=sft,dpo", "seed=1,2"]
    first = launch(*line)
    assert first.returncode == 0, first.stderr[-2000:]
    names = {p.parent.name for p in (tmp_path / "runs" / "sweep").glob("*/DONE")}
    assert names == {"loss=sft,seed=1", "loss=sft,seed=2", "loss=dpo,seed=1", "loss=dpo,seed=2"}
    second = launch(*line)
    assert second.returncode == 0 and second.stdout.count("already done") == 4
    report = launch("task=report", f"sweep={tmp_path}/runs/sweep")
    assert report.returncode == 0, report.stderr
    assert "| loss=dpo | 1 2 |" in report.stdout and "| loss=sft | 1 2 |" in report.stdout
    assert (
        "<svg" in (tmp_path / "runs/sweep/report.html").read_text() and (tmp_path / "runs/sweep/summary.md").is_file()
    )


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("joblib"), reason="hydra-joblib-launcher is not installed")
def test_joblib_runs_the_jobs_side_by_side_and_they_share_one_teacher_cache(tmp_path):
    common = [o for o in overrides(tmp_path) if not o.startswith("exp_name=")]
    launcher.run_task(composed(*common, "exp_name=teacher"))
    launcher.run_task(
        composed(
            *common, "exp_name=cache", "task=cache", "cache.top_k=6", f"model.load_from={tmp_path}/runs/teacher/FINAL"
        )
    )
    cache = tmp_path / "runs" / "cache" / "CACHE"
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    weights = "loss.chosen_weight=0.1,0.2,0.4"
    run = launch(
        "-m", "hydra/launcher=joblib_local", *overrides(tmp_path), "loss=dckd", f"loss.teacher_cache={cache}", weights
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(list((tmp_path / "runs" / "sweep").glob("loss.chosen_weight=*/DONE"))) == 3
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


@pytest.mark.parametrize("name", ["joblib_local", "submitit_slurm_cpu", "submitit_slurm_gpu"])
def test_the_launcher_groups_compose(name, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{name.split('_')[0]}_launcher")
    shown = launch(f"hydra/launcher={name}", *overrides(tmp_path), "--cfg", "hydra", "--package", "hydra.launcher")
    assert shown.returncode == 0 and "_target_" in yaml.safe_load(shown.stdout), shown.stderr[-2000:]


# ---- the report


def written_job(
    sweep: Path, name: str, seed: int, accuracy: float, loss: float, beta: float, done: bool = True
) -> None:
    """Write what a run leaves."""
    folder = sweep / name
    folder.mkdir(parents=True)
    config = {
        "task": "train",
        "seed": seed,
        "exp_name": sweep.name,
        "run_count": name,
        "lr": beta,
        "loss": {"name": "dpo", "beta": beta},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    row = {"step": 9, "loss/eval": loss, "rewards_eval/accuracies": accuracy}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss/eval": 9.0}) + "\n" + json.dumps(row) + "\n")
    if done:
        (folder / "DONE").touch()


def test_seeds_are_pooled_and_the_best_is_marked_only_where_intervals_separate(tmp_path):
    draw = random.Random(0)
    for beta, center in ((0.1, 0.9), (0.2, 0.5), (0.3, 0.51)):
        for seed in (1, 2, 3):
            written_job(tmp_path, f"beta={beta},seed={seed}", seed, center + draw.uniform(-0.01, 0.01), center, beta)
    written_job(tmp_path, "beta=0.4,seed=1", 1, 0.99, 0.1, 0.4, done=False)
    jobs = read_jobs(tmp_path)
    rows = rows_of(jobs)
    assert [row.name for row in rows] == ["beta=0.1", "beta=0.2", "beta=0.3"]
    assert [row.name for row in best_rows(rows, "rewards_eval/accuracies")] == ["beta=0.1"]
    assert best_rows(rows[1:], "rewards_eval/accuracies") == []  # 0.50 and 0.51 with overlapping intervals
    assert best_rows(rows, "loss/eval") == []  # another beta: another scale
    low, high = interval_over_seeds("share", list(rows[0].values["rewards_eval/accuracies"].values()))
    text = table(rows, [job for job in jobs if not job.done])
    assert f"[{low:.4g}, {high:.4g}]**" in text and text.count("**") == 2
    assert "Unfinished, left out" in text and "beta=0.4" in text


def test_one_seed_has_no_interval_and_is_never_best(tmp_path):
    for beta, accuracy in ((0.1, 0.9), (0.2, 0.1)):
        written_job(tmp_path, f"beta={beta}", 1, accuracy, 0.5, beta)
    rows = rows_of(read_jobs(tmp_path))
    assert best_rows(rows, "rewards_eval/accuracies") == [] and "**" not in table(rows, [])


def test_the_same_seed_twice_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        read_jobs(tmp_path)
    for name in ("a", "b"):
        written_job(tmp_path, name, 1, 0.5, 0.5, 0.1)
    with pytest.raises(ValueError, match="stands twice"):
        rows_of(read_jobs(tmp_path))


def test_an_unfinished_run_shows_where_it_stands_and_what_its_policy_says(tmp_path):
    run = tmp_path / "mine"
    written_job(tmp_path, "mine", 1, 0.75, 0.5, 0.1, done=False)
    rows = [{"step": 4, "loss/train": 0.625, "rewards_train/accuracies": 0.75}, {"step": 5, "loss/train": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    (run / "progress.json").write_text('{"total_steps": 40, "lr": 0.001}')
    (run / "warnings.txt").write_text("warning: the loss has not moved\n")
    (run / "checkpoint-4").mkdir()
    (run / "checkpoint-4" / "DONE").touch()
    samples = [{"step": 2, "prompt": "say ant", "response": "<script>alert(1)</script>"}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    jobs = read_jobs(run)
    state = state_of(run, jobs[0].name, jobs[0].config, (run / "metrics.jsonl").stat().st_mtime + 65)
    line = line_of(state)
    assert line.startswith("mine: step 5 of 40, loss 0.5, last row 1:05 ago, goes on from step 4. warning: the loss")
    assert "step 5 of 40" in table([], jobs) and "| run |" not in table([], jobs)
    page = html("Run mine", [], jobs)
    assert "step 5 of 40" in page and "say ant" in page and "<script>alert" not in page and "step 2" in page
    assert "<svg" in page  # the curves so far


def test_a_run_before_its_first_row_is_said(tmp_path):
    (tmp_path / "config.yaml").write_text("{task: cache, seed: 1, loss: {}}")
    (job,) = read_jobs(tmp_path)
    line = line_of(state_of(tmp_path, job.name, job.config, 0.0))
    assert line == f"{tmp_path.name}: task=cache, no row; nothing but its settings; last write 0:00 ago"
