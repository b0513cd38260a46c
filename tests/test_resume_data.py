"""A run is gone on with on the same data only: labels, rewards, notes and teachers are data as token ids are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import launch
from settings.schema import RunConfig
from tests.support.bigram import items_of, trainer_of
from tests.support.helpers import composed, rows_of
from trainers.basic import BasicTrainer
from trainers.batches import Item, items_digest

CHANGES = {
    "kto": lambda item: item._replace(label=1.0 - item.label),
    "reward-weighted-distill": lambda item: item._replace(label=item.label + 0.5),
    "grpo": lambda item: item._replace(notes=item.notes + np.float32(0.25)),
    "dckd": lambda item: with_entries(item, values=0.5),
    "adpa": lambda item: with_entries(item, values=0.5),  # another beta
}


def with_entries(item: Item, values: float) -> Item:
    entries = (None if e is None else e._replace(values=values * e.values) for e in item.entries)
    return item._replace(entries=tuple(entries))


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_of_items_sees_what_is_learned_beside_ids(name):
    items = items_of(trainer_of(name), name)
    again = items_of(trainer_of(name), name)
    assert items_digest(items) == items_digest(again)
    for i in (0, len(items) - 1):
        changed = [CHANGES[name](item) if j == i else item for j, item in enumerate(items)]
        assert items_digest(changed) != items_digest(items)


ROWS = [{"prompt": f"say {i}", "response": "ha" * (1 + i), "label": i % 2 == 0, "answer": i} for i in range(4)]
REWARDS = [{**row, "label": not row["label"]} for row in ROWS]
ANSWERS = [{**row, "answer": row["answer"] + 1} for row in ROWS]


@pytest.mark.parametrize(
    ("overrides", "other"),
    [
        (["loss=kto"], REWARDS),
        (["loss=ppo"], REWARDS),
        (["loss=ppo", "loss.verifier=tests.support.rewards:near_answer", "loss.max_new_tokens=3"], ANSWERS),
    ],
    ids=["labels", "rewards", "answers"],
)
def test_a_resume_on_other_labels_is_refused(tmp_path: Path, overrides, other, monkeypatch):
    data = tmp_path / "data.jsonl"
    run = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", *overrides]
    command = composed(*run, "exp_name=run", "model.batch_size=4", "n_steps=3", "save_every=1", "log_every=1")
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    step = BasicTrainer._step

    def interrupted(self: BasicTrainer, number: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(BasicTrainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch.run_task(command)
    data.write_text("".join(json.dumps(row) + "\n" for row in other))
    with pytest.raises(ValueError, match="what datasets.local.train names had another content"):
        launch.run_task(command)
    (tmp_path / "run" / "digest.txt").unlink()
    with pytest.raises(ValueError, match="was written with data="):  # and what is learned from it
        launch.run_task(command)
    (tmp_path / "run" / "digest.txt").unlink()
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    launch.run_task(command)


@pytest.mark.parametrize("kept", [True, False], ids=["another store", "no store"])
def test_a_resume_reads_the_same_data_from_wherever_its_tokens_lie(tmp_path: Path, kept: bool, monkeypatch):
    """The first half of a run makes a store. The second finds it gone and makes another, or holds tokens in memory."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", "loss=kto", "model.batch_size=2"]
    run += ["n_steps=3", "save_every=1", "log_every=1", "lr=1e-2"]
    whole, parted = (composed(f"cache_dir={tmp_path / name}", "exp_name=run", *run) for name in ("whole", "parted"))
    launch.run_task(whole)
    step = BasicTrainer._step

    def interrupted(self: BasicTrainer, number: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(BasicTrainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch.run_task(parted)
    stores = tmp_path / "parted" / "tokens"
    assert list(stores.glob("*/meta.json"))
    shutil.rmtree(stores)
    with monkeypatch.context() as patch:
        if not kept:
            patch.setattr(RunConfig, "tokens_dir", None)
        launch.run_task(parted)
    assert stores.is_dir() == kept
    logged = [rows_of(tmp_path / name / "run" / "metrics.jsonl") for name in ("whole", "parted")]
    assert [[row["loss/train"] for row in rows] for rows in logged][0] == [row["loss/train"] for row in logged[1]]
    files = [tmp_path / name / "run" / "FINAL" / "model.safetensors" for name in ("whole", "parted")]
    assert files[0].read_bytes() == files[1].read_bytes()
