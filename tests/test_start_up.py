"""What a run does with its rows before the first step: nothing a row, where a token store knows it already."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import launch
import models
import tokens.store
from dataloader import load_examples
from report.inspection import warnings
from settings.schema import DatasetConfig
from tasks.train import _check_pairs
from teacher.cache import Meta, Writer, finish
from templates import turn_end
from tests.support.bigram import trainer_of
from tests.support.helpers import composed, write_pairs
from tokens.columns import sides_of
from tokens.store import Rows
from trainers.batches import columns_of, items_digest, joined, num_tokens

ROWS = 300
BATCH = 4


class CountingRows(Rows):
    """A table that counts which of its rows are made."""

    made: Counter[int] = Counter()

    def example(self, row: int, where: str):
        self.made[int(row)] += 1
        return super().example(row, where)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def trainer():
    return trainer_of("dpo")


@pytest.fixture(scope="module")
def examples(place: Path, trainer):
    data = {"a": DatasetConfig(train=str(write_pairs(place / "a.jsonl", ROWS)))}
    return load_examples(data, "train", trainer.tokenizer, trainer.model_config, store_in=place / "tokens")


@pytest.fixture(scope="module")
def cache(place: Path, trainer, examples) -> Path:
    return write_cache(place / "cache", trainer.tokenizer, examples)


def write_cache(folder: Path, tokenizer, examples) -> Path:
    digest = models.tokenizer_digest(tokenizer)
    meta = Meta("logprob", 2, len(tokenizer), "made up", None, digest, "", "", "made up")
    writer = Writer(folder, meta)
    for example in examples:
        for sequence in (example.chosen, example.rejected):
            length = sequence.num_supervised
            entries = {"ids": np.tile([5, 6], (length, 1)), "values": np.full((length, 2), -1.0)}
            writer.add(sequence.ids, sequence.response, {**entries, "tail": np.full(length, 0.2)})
    writer.close()
    finish(folder, meta, set())
    return folder


@pytest.mark.parametrize("name", ["dckd", "dpo", "sft"])
def test_a_run_makes_the_rows_of_its_batches_alone(place: Path, cache: Path, examples, monkeypatch, name):
    """The first row, which is shown, and those of the steps; checkpoints hash the data without a row."""
    monkeypatch.setattr(tokens.store, "Rows", CountingRows)
    monkeypatch.setattr(CountingRows, "made", Counter())
    run = ["model=tiny", "datasets=[local]", f"datasets.local.train={place / 'a.jsonl'}", f"loss={name}"]
    run += [f"loss.teacher_cache={cache}"] if name == "dckd" else ["loss.train_on=chosen"] if name == "sft" else []
    run += [f"cache_dir={place / 'runs'}", f"exp_name={name}", f"model.batch_size={BATCH}", "n_steps=2", "save_every=1"]
    launch.run_task(composed(*run))
    made = CountingRows.made
    assert made, "the run did not read from a counted table"
    assert made.total() <= 2 * BATCH + 2


def test_what_columns_say_is_what_items_say(place: Path, cache: Path, examples):
    methods = [("dckd", f"loss.teacher_cache={cache}"), ("dpo",), ("sft", "loss.train_on=chosen"), ("bradley-terry",)]
    for name, *overrides in methods:
        items = trainer_of(name, *overrides).items(examples, "train")
        assert columns_of(items) is not None
        assert items_digest(items) == items_digest(list(items)), name
        both = joined(items, items[:0])
        assert items_digest(both) == items_digest(items) and columns_of(both) is not None
        assert items_digest(joined(items, items)) == items_digest([*items, *items])
        assert num_tokens(items) == sum(tokens.length for item in items for tokens in item.sequences)
    stored, plain = sides_of(examples), sides_of(list(examples))
    assert np.array_equal(stored.lengths, plain.lengths) and np.array_equal(stored.keys, plain.keys)


def test_warnings_are_those_of_rows_read_one_by_one(place: Path, trainer):
    file = write_pairs(place / "twice.jsonl", 40)
    lines = file.read_text().splitlines()
    same = json.loads(lines[0])
    file.write_text("\n".join([*lines, *lines[:9], json.dumps({**same, "rejected": same["chosen"]})]) + "\n")
    data = {"a": DatasetConfig(train=str(file), test=str(place / "twice.jsonl"))}
    train, test = (
        load_examples(data, split, trainer.tokenizer, trainer.model_config, store_in=place / "tokens")
        for split in ("train", "test")
    )
    end = turn_end(trainer.tokenizer).id
    for length in (trainer.model_config.max_length, 8):  # nothing cut; nearly all
        for closing in (end, 3):  # every response ends with its turn; none
            said = warnings(train, test, closing, length)
            assert said and said == warnings(list(train), list(test), closing, length)


def test_a_row_that_lacks_a_side_or_entries_is_named(place: Path, trainer, examples):
    lines = (place / "a.jsonl").read_text().splitlines()
    alone = {"messages": json.loads(lines[0])["chosen"]}
    (place / "alone.jsonl").write_text(json.dumps(alone) + "\n")
    data = {name: DatasetConfig(train=str(place / f"{name}.jsonl")) for name in ("a", "alone")}
    mixed = load_examples(data, "train", trainer.tokenizer, trainer.model_config, store_in=place / "tokens")
    with pytest.raises(ValueError, match=r"alone.jsonl, row 1: loss=dpo learns from pairs, and this row has no chosen"):
        _check_pairs(mixed, "dpo")
    with pytest.raises(ValueError, match="needs chosen in every row, and this one gives a prompt and response"):
        trainer.items(mixed, "train")
    short = write_cache(place / "short", trainer.tokenizer, examples[: ROWS - 20])
    with pytest.raises(ValueError, match="has no entries for a sequence of"):
        trainer_of("dckd", f"loss.teacher_cache={short}").items(examples, "train")
