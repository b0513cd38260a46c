"""What is shown and noted while training: the rate that fits, a loss that stands still, the line, samples, trackers."""

import json

import pytest

from engine.learning_rate import fitting, still, unmoved
from engine.logbook import NOTES
from engine.progress import clock, figure, live_line, table_row
from engine.tracking import check_installed
from settings.schema import settings_from
from settings.tasks import counted
from tests.support.helpers import composed, launch, rows_of, write_pairs


@pytest.mark.parametrize(
    ("kind", "parameters", "lora", "rate"),
    [
        ("imitation", 100_000, False, 3e-3),
        ("imitation", 7_000_000_000, False, 2e-5),
        ("imitation", 7_000_000_000, True, 2e-4),
        ("preference", 100_000, False, 5e-4),
        ("preference", 135_000_000, False, 2e-6),
        ("preference", 7_000_000_000, False, 5e-7),
        ("preference", 7_000_000_000, True, 5e-6),
        ("policy_gradient", 7_000_000_000, False, 1e-6),
        ("policy_gradient", 1_000, False, 2e-3),
        ("imitation", 1_000, True, 5e-3),
    ],
)
def test_the_rate_fits_kind_size_and_lora(kind, parameters, lora, rate):
    assert fitting(kind, parameters, lora).lr == rate


def test_a_larger_model_never_gets_a_larger_rate():
    for kind in ("imitation", "preference", "policy_gradient"):
        rates = [fitting(kind, 10**power, False).lr for power in range(4, 12)]
        assert rates == sorted(rates, reverse=True)


def losses(values, every=1):
    return [{"step": every * (i + 1), "loss/train": value} for i, value in enumerate(values)]


def test_a_loss_that_stands_still_is_said_with_the_rate_to_try():
    rows = losses([0.6931, 0.6930, 0.6931, 0.6931, 0.6930, 0.6931])
    found = unmoved(rows, 60, 5e-7, "preference", 5e-4)
    assert found is not None and "after 6 of 60 steps" in found and "lr=5e-07" in found and "try lr=0.0005" in found
    assert "try lr=0.002" in str(unmoved(rows, 60, 6e-4, "preference", 5e-4))  # above what fits: three times it
    assert unmoved(rows, 61, 5e-7, "preference", 5e-4) is None  # not yet 10 % of the steps
    assert unmoved(rows[:5], 50, 5e-7, "preference", 5e-4) is None  # too few rows to tell
    assert unmoved(rows, 60, 5e-7, "policy_gradient", 5e-4) is None


@pytest.mark.parametrize(
    ("values", "stands"),
    [
        ([2.0, 1.9, 1.8, 1.7, 1.6, 1.5], False),
        ([0.6931, 0.6920, 0.6900, 0.6880, 0.6860, 0.6840], False),
        ([2.0, 2.3, 1.8, 2.2, 1.9, 2.1], True),  # the batches differ, and nothing falls
        ([1.0, 1.5, 2.0, 3.0, 4.0, 5.0], False),  # it moves: up
        ([4.74, 3.1, 1.9, 1.2, 0.85, 0.63], False),  # steep: the halves differ within themselves, too
        ([5.0, 0.8, 0.6, 0.58, 0.57, 0.56], False),
    ],
)
def test_movement_is_told_from_noise(values, stands):
    assert still(values) is stands


def test_the_line_shows_the_methods_own_figure_speed_and_memory():
    row = {"step": 5, "loss/train": 0.61234, "rewards_train/accuracies": 0.75, "kl_train/chosen": 1.0}
    row |= {"lr": 1e-4, "tokens_per_second": 4210.4}
    assert live_line(row, 1.234) == "loss 0.6123, rewards/accuracies 0.75, 4,210 tokens/s, 1.2 GB"
    assert figure({"reward/train": 0.5}) == ("reward", 0.5) and figure({"loss/train": 1.0}) is None
    assert figure({"advantage/train": -0.5}) == ("advantage", -0.5)
    shown = table_row(row, 40, "1:05", 1.234)
    assert shown.split() == ["5/40", "0.6123", "rewards/accuracies", "0.75", "1.00e-04", "4,210", "1:05", "1.2"]
    assert table_row({"step": 5, "loss/eval": 0.5}, 40, "", 1.0).split() == ["5/40", "0.5", "held", "out"]
    assert [clock(s) for s in (59, 754, 3723)] == ["0:59", "12:34", "1:02:03"]


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("lr=fast", "lr='fast' must be a number, or auto"),
        ("lr=0", "lr=0 must be above 0"),
        ("lr=null", "must be a number"),
        ("logging=loud", "choose one of bar, table"),
        ("tracker=[mlflow]", "choose one of wandb, tensorboard, trackio"),
        ("sample_every=-1", "sample_every=-1 must not be negative"),
        ("sample_tokens=0", "at least 1"),
    ],
)
def test_a_wrong_value_is_refused(override, word):
    with pytest.raises(ValueError, match=word.replace("[", r"\[")):
        settings_from(composed(override))


def test_what_is_shown_does_not_make_another_run():
    shown = ("logging=table", "sample_every=5", "sample_prompts=[hi]", "sample_tokens=9", "tracker=[tensorboard]")
    assert counted(composed(*shown)) == counted(composed())
    assert counted(composed("lr=5e-7"))["lr"] == 5e-7 and counted(composed())["lr"] == "auto"


def test_a_missing_tracker_says_how_to_install_it():
    with pytest.raises(ValueError, match="tracker=no_such_tracker needs .*install.sh --trackers"):
        check_installed("no_such_tracker")


@pytest.mark.slow
def test_a_run_shows_a_table_warns_once_and_keeps_samples(tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 16)
    given = ["loss=dpo", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}"]
    steps = ["n_steps=20", "log_every=1", "model.batch_size=8", "logging=table", "sample_every=8", "sample_tokens=4"]
    run = launch(*given, *steps, "exp_name=still", "lr=1e-12", "sample_prompts=['say ant','say bee']")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("the loss has not moved after 6 of 20 steps") == 1
    assert "20/20" in run.stdout and "rewards/accuracies" in run.stdout and "tokens/s" in run.stdout
    folder = tmp_path / "still"
    assert "try lr=" in (folder / NOTES).read_text() and not (folder / "learning_rate.json").exists()
    samples = rows_of(folder / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (step, prompt) for step in (8, 16, 20) for prompt in ("say ant", "say bee")
    ]
    first = [row["response"] for row in samples if row["step"] == 8]
    assert first == [row["response"] for row in samples if row["step"] == 16]  # the policy stands still, so do they
    run = launch(*given, *steps, "exp_name=auto", "sample_every=0")
    assert run.returncode == 0 and "lr=auto is" in run.stdout
    chosen = json.loads((tmp_path / "auto" / "learning_rate.json").read_text())
    rates = [row["lr"] for row in rows_of(tmp_path / "auto" / "metrics.jsonl") if "lr" in row]
    assert chosen["kind"] == "preference" and max(rates) == pytest.approx(chosen["lr"], rel=0.01)
    assert not (tmp_path / "auto" / NOTES).exists()
