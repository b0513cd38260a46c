"""Keys of a command line that the task, or no stage of the pipeline, reads are named."""

from typing import Any

import pytest

from settings.tasks import unread
from tests.support.helpers import launch, write_pairs


@pytest.mark.parametrize(
    ("task", "typed", "named"),
    [
        (
            "train",
            "generation.n=4 lr=1 loss=dpo ++loss.beta=1 +judge.base_url=x wandb.mode=offline",
            ["generation.n", "judge.base_url"],
        ),
        ("generate", "loss=dpo lr=1 n_epochs=3 generation.n=4 seed=2 save_every=3", ["loss", "lr", "n_epochs"]),
        ("evaluate", "generation.max_new_tokens=9 evaluation.batch_size=3", ["generation.max_new_tokens"]),
        ("inspect", "loss=dpo lr=1", []),
        ("cache", "hub.push=a/b cache.top_k=3 datasets=[local]", []),
    ],
)
def test_what_a_task_does_not_read_is_named(task: str, typed: str, named: list[str]) -> None:
    raw: dict[str, Any] = {"task": task, "generation": {"backend": "auto"}}
    assert unread([raw], typed.split()) == named


def test_what_one_of_several_reads_is_not_named() -> None:
    served = {"task": "evaluate", "generation": {"backend": "openai"}}
    typed = ["generation.base_url=x", "loss.beta=1", "cache.top_k=3"]
    assert unread([served], typed) == ["loss.beta", "cache.top_k"]
    assert unread([served, {"task": "train"}, {"task": "cache"}], typed) == []


def test_a_run_and_a_pipeline_say_it(tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    base = [f"cache_dir={tmp_path}", "datasets=[local]", f"datasets.local.train={data}"]
    run = launch(*base, "task=generate", "loss=dpo", "generation.max_new_tokens=2")
    assert run.returncode == 0 and "warning: task=generate does not read loss\n" in run.stdout
    tiny = ["pipeline=dckd", "pipeline.teacher=tiny", "pipeline.student=tiny"]
    plan = launch(*base, *tiny, "dry_run=true", "generation.n=4", "n_epochs=1", "estimate.devices=2")
    assert plan.returncode == 0 and "warning: no stage of this pipeline reads generation.n\n" in plan.stdout
