"""TVKD learns from a cache of values through the command line, and refuses what its form does not define."""

import math
from pathlib import Path

import pytest

import launch
from tests.support.bigram import trainer_of
from tests.support.helpers import composed, rows_of, write_pairs


def test_a_cache_of_values_shapes_the_loss_and_another_quantity_is_refused(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", 6)
    common = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    launch.run_task(composed(*common, "task=cache", "exp_name=values", "cache.quantity=value"))
    run = [*common, "loss=tvkd", f"loss.teacher_cache={tmp_path}/values/CACHE", "n_steps=1", "log_every=1"]
    launch.run_task(composed(*run, "exp_name=shaped", "model.batch_size=6"))
    row = rows_of(tmp_path / "shaped" / "metrics.jsonl")[0]
    assert abs(row["shaping/train"]) > 1e-4 and abs(row["loss/train"] - math.log(2)) > 1e-6  # the margin is the shaping
    with pytest.raises(ValueError, match="logprob"):
        launch.run_task(composed(*run, "exp_name=wrong", "loss.value=lse"))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.value=student_entropy"], "must not move with the policy"),
        (["loss.student_weight=0.5", "loss.value=lse"], "must not move with the policy"),
        (["loss.student_weight=0.5", "loss.form=released"], "loss.student_weight"),
        (["loss.discount=1.5"], "loss.discount"),
    ],
)
def test_what_a_form_does_not_define_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        trainer_of("tvkd", *overrides)


def test_only_the_shaped_form_needs_a_reference():
    assert trainer_of("tvkd").needs.reference == "logps"
    assert trainer_of("tvkd", "loss.form=released").needs.reference == ""
