"""task=report on one run: points that can be seen, what was trained, how to read its metrics, runs without a row."""

import json
import re
from pathlib import Path

import pytest
import yaml

import launch as launcher
from pipeline.run_folder import ERROR, note_error
from report.charts import Series, line_chart, panel_of
from report.glossary import glossary_section, meaning
from report.page import curves_section
from report.running import line_of, state_of
from settings.help import choices
from tasks import report
from tests.support.bigram import items_of, split, trainer_of
from tests.support.helpers import composed, launch, write_pairs
from tests.test_sweeps import written_job


def settings_of_report(folder: Path):
    return launcher.settings_of(composed("task=report", f"sweep={folder}"))


def test_a_single_point_is_drawn_as_a_dot_also_beside_longer_lines() -> None:
    chart = line_chart("loss", [Series("train", "", [(3.0, 0.5)])])
    assert chart.count('<circle class="point train"') == 1 and "<polyline" not in chart
    both = line_chart("loss", [Series("train", "1", [(1.0, 0.5), (2.0, 0.4)]), Series("train", "2", [(2.0, 0.6)])])
    assert both.count("<polyline") == 1 and both.count('<circle class="point train"') == 1
    assert line_chart("loss", [Series("eval", "", [(3.0, 0.5)])]).count("<circle") == 1


def test_the_legend_shows_held_out_only_where_a_line_is(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss/train": 1.0}\n{"step": 2, "loss/train": 0.5}\n')
    assert "held out" not in curves_section({"run": file})
    file.write_text('{"step": 1, "loss/train": 1.0}\n{"step": 1, "loss/eval": 0.5}\n')
    assert "held out</span>" in curves_section({"run": file})


@pytest.mark.parametrize("name", choices("loss"))
def test_every_metric_that_a_method_writes_has_a_line_of_the_glossary(name: str) -> None:
    trainer = trainer_of(name)
    batches = trainer.prepared(split(trainer, items_of(trainer, name), 1), True)
    counts = trainer.global_counts(batches)
    written = trainer.terms(batches[0], counts)[1]
    assert {metric for metric in written if not meaning(metric)} == set()


def test_the_glossary_names_what_appears_alone_and_escapes() -> None:
    said = glossary_section(["loss", "kl/chosen", "my_own<b>"])
    assert "<dt>kl/chosen</dt>" in said and "my_own" not in said and "mass_in_support" not in said
    assert glossary_section(["my_own"]) == ""
    assert "<b>" not in glossary_section(["term/<b>"])


def one_run(folder: Path, *more: str) -> Path:
    """Train three steps with one logged row."""
    data = write_pairs(folder / "pairs.jsonl", 12)
    words = ["loss=dpo", "model=tiny", "model.batch_size=4", "datasets=[local]", f"datasets.local.train={data}"]
    launcher.run_task(composed(*words, f"cache_dir={folder}", "exp_name=one", "lr=1e-4", *more))
    return folder / "one"


def test_the_report_of_one_run_says_what_it_was_and_that_nothing_is_compared(tmp_path: Path, capsys) -> None:
    run = one_run(tmp_path)
    report.run(settings_of_report(run))
    page, summary = (run / "report.html").read_text(), (run / "summary.md").read_text()
    objective = (run / "objective.txt").read_text().partition(": ")[2].strip()
    for words in (
        objective.replace("'", "&#x27;"),
        "12 training rows; no held-out rows: datasets.local.test= gives them",
        "new weights",
        str(tmp_path / "pairs.jsonl"),
        "<dt>rewards/accuracies</dt>",
        "beta: 0.1",
        "Last values",
    ):
        assert words in page, words
    assert "over seeds" not in page and "Runs of the sweep" not in page and "held out</span>" not in page
    assert "No interval lies apart" not in summary and "over seeds" not in summary and "datasets.local.test=" in summary
    assert "nothing to compare" in summary
    command = (run / "command.txt").read_text().split()
    assert command[0] in page
    card = (run / "FINAL/README.md").read_text()
    facts = json.loads((run / "facts.json").read_text())
    assert facts["objective"] in card and f"{facts['num_train']} training rows" in card


def test_what_was_typed_is_listed_from_the_command(tmp_path: Path) -> None:
    written_job(tmp_path, "mine", 1, 0.5, 0.5, 0.1)
    run = tmp_path / "mine"
    (run / "command.txt").write_text("/bin/python launch.py loss=dpo 'datasets=[<b>]' lr=1e-4\n")
    (run / "objective.txt").write_text("loss=dpo: L = a < b\n")
    jobs = report.read_jobs(run)
    page = report.html("Run mine", report.rows_of(jobs), [])
    assert "L = a &lt; b" in page and "<code>lr=1e-4</code>" in page and "<b>]" not in page
    assert "<code>datasets=[&lt;b&gt;]</code>" in page


def test_a_cache_is_no_run_of_training_and_is_said_beside_the_table(tmp_path: Path) -> None:
    written_job(tmp_path, "a", 1, 0.5, 0.5, 0.1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/config.yaml").write_text("{task: cache, seed: 1, loss: {}}")
    (tmp_path / "cache/DONE").touch()
    jobs = report.read_jobs(tmp_path)
    assert [row.name for row in report.rows_of(jobs)] == ["a"]
    report.run(settings_of_report(tmp_path))
    summary = (tmp_path / "summary.md").read_text()
    assert "| cache |" not in summary and "cache (task=cache)" in summary and "nothing to compare" in summary


def test_a_folder_without_a_single_row_is_refused_with_how_far_each_run_came(tmp_path: Path) -> None:
    for name, task in (("first", "train"), ("asked", "cache")):
        (tmp_path / name).mkdir()
        config = {"task": task, "seed": 1, "loss": {"name": "dpo"}, "log_every": 10}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "asked/DONE").touch()
    done = launch("task=report", f"sweep={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no run with a row to show" in done.stderr and "first: task=train, no row" in done.stderr
    assert "asked (task=cache)" in done.stderr
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "summary.md").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "came as far as reading and checking its rows"),
        ({"objective.txt": "loss=dpo: L"}, "read its rows, and began no step"),
        ({"progress.json": '{"total_steps": 40, "lr": 1}'}, "began its 40 steps; a row comes every 10"),
        ({"log.txt": "$ launch.py\nstep 1\rstep 2\nerror: no such file: a\n"}, "log.txt: error: no such file: a"),
        (
            {"log.txt": "Traceback\n  File x\nRuntimeError: out of memory\nbye\n"},
            "log.txt: RuntimeError: out of memory",
        ),
    ],
)
def test_a_run_without_a_row_says_how_far_it_came_and_why(tmp_path: Path, files: dict[str, str], said: str) -> None:
    config = {"task": "train", "seed": 1, "loss": {}, "log_every": 10}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    state = state_of(tmp_path, "mine", config, (tmp_path / "config.yaml").stat().st_mtime + 65)
    line = line_of(state)
    assert line.startswith("mine: task=train, no row; ") and said in line
    assert re.search(r"last write 1:0\d ago", line)


def test_a_panel_is_what_the_glossary_is_asked_for() -> None:
    assert meaning(panel_of("kl_train/chosen")[0]) and meaning(panel_of("mass_in_support/train")[0])
    assert "kl_chosen" in meaning(panel_of("term_train/kl_chosen")[0])


def test_the_report_says_why_a_run_ended_until_it_begins_again(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    common = ["loss=dpo", "model=tiny", "datasets=[local]", f"cache_dir={tmp_path}", "exp_name=run", "n_steps=2"]
    rows = [f"datasets.local.train={data}"]
    with pytest.raises(ValueError, match="no model folder"):
        launcher.run_task(composed(*common, *rows, "model.load_from=/nowhere/FINAL"))
    assert (tmp_path / "run" / ERROR).read_text().startswith("ValueError: no model folder '/nowhere/FINAL'")
    with pytest.raises(ValueError, match=r"no row; .* error.txt: ValueError: no model folder '/nowhere/FINAL'"):
        launcher.run_task(composed("task=report", f"sweep={tmp_path}/run"))
    launcher.run_task(composed(*common, *rows))
    assert not (tmp_path / "run" / ERROR).exists()


def test_a_kept_error_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    note_error(tmp_path, ValueError("401 for hf_abcdefghijklmnop"))
    assert "401" in (tmp_path / ERROR).read_text() and "abcdef" not in (tmp_path / ERROR).read_text()


def test_the_folder_of_a_pipeline_says_where_its_reports_are(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text("[]")
        (tmp_path / name / "dckd").symlink_to(tmp_path / "stages" / "dckd-1")
    with pytest.raises(ValueError, match=r"are done \(none is\). For one stage: sweep=.*/mine/STAGE, of dckd"):
        report.read_jobs(tmp_path / "mine")
    (tmp_path / "other" / "report.html").write_text("")
    with pytest.raises(ValueError, match=r"holds pipelines, .* done \(.*/other/report.html\)"):
        report.read_jobs(tmp_path)
