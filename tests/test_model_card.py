"""Model cards: whole for every trained folder, readable by huggingface_hub, and no part of the model's identity."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import launch
import models
from pipeline.digests import content_digest
from report.model_card import Facts, Source, card
from tests.support.helpers import composed, rows_of, write_pairs

FACTS = Facts(
    name="mine",
    loss="dpo",
    objective="L = -log sigmoid(0.1 (u - v))",
    base="owner/base-1B",
    base_is_folder=False,
    base_digest="abc123",
    head="lm",
    sources=[
        Source("mix", "owner/pairs:train", None, {}),
        Source("own", "/data/a.jsonl", "/data/b.jsonl", {"train": "f" * 64, "test": "e" * 64}),
    ],
    num_train=1200,
    num_test=30,
    steps=9,
    settings={"lr": 5e-7, "loss": {"beta": 0.1}},
    metrics={"loss/eval": 0.6931471},
    command="python launch.py loss=dpo",
    versions={"torch": "2.13.0"},
    commit="0123abc",
)


def test_the_front_matter_names_what_the_hub_knows_and_no_path_of_this_machine() -> None:
    read = ModelCard(card(FACTS))
    assert read.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prefdistill", "dpo"],
        "base_model": "owner/base-1B",
        "datasets": ["owner/pairs"],
    }
    local = ModelCard(
        card(FACTS._replace(base="/runs/sft/FINAL", base_is_folder=True, head="reward", loss="bradley-terry"))
    )
    assert local.data.base_model is None and local.data.pipeline_tag == "text-classification"


@pytest.mark.parametrize(
    "said",
    [
        "-log sigmoid(0.1 (u - v))",
        "`owner/base-1B`, digest `abc123`",
        "1,200 training rows, 30 held-out rows",
        "9 optimizer steps",
        "own, train: `/data/a.jsonl`, sha256 `ffffffffffffffff`",
        "| loss/eval | 0.693147 |",
        "beta: 0.1",
        "python launch.py loss=dpo",
        "torch 2.13.0",
        "`0123abc`",
    ],
)
def test_a_card_says(said: str) -> None:
    assert said in ModelCard(card(FACTS)).text


def test_what_is_not_known_is_said() -> None:
    bare = card(FACTS._replace(base=None, metrics={}, command=None, versions={}, commit=None, steps=None))
    for words in (
        "new weights (`model.build`)",
        "None were written",
        "The command was not stored",
        "no git checkout",
        "Versions: not stored",
    ):
        assert words in bare


def test_training_writes_a_card_that_is_no_part_of_the_digest(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    launch.run_task(
        composed(
            "loss=dpo",
            "model=tiny",
            "model.batch_size=4",
            "datasets=[local]",
            f"datasets.local.train={data}",
            f"datasets.local.test={data}",
            f"cache_dir={tmp_path}",
            "exp_name=run",
            "n_steps=1",
            "lr=1e-4",
            "log_every=1",
        )
    )
    final = tmp_path / "run/FINAL"
    read = ModelCard.load(final / "README.md")
    last = next(row["loss/eval"] for row in reversed(rows_of(tmp_path / "run/metrics.jsonl")) if "loss/eval" in row)
    objective = (tmp_path / "run/objective.txt").read_text().partition(": ")[2].strip()
    command = (tmp_path / "run/command.txt").read_text().strip()
    for words in (
        objective,
        command,
        f"| loss/eval | {last:.6g} |",
        "8 training rows, 8 held-out rows",
        "1 optimizer steps",
        "lr: 0.0001",
    ):
        assert words in read.text
    digest = models.model_digest(final), content_digest(final)
    (final / "README.md").unlink()
    assert (models.model_digest(final), content_digest(final)) == digest
