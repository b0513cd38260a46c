"""What a run does with its rows before the first step: nothing a row, where a token store knows it already."""

import hashlib
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
from tokens.generations import read_generations
from tokens.store import Rows
from trainers.batches import Item, columns_of, items_digest, joined, num_tokens
from trainers.kto import partners

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


# ---- methods whose items are more than a side of each row


def labeled_rows(path: Path, count: int) -> Path:
    """Write responses with a label and a reward, three to a prompt; some rewards are whole numbers or missing."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            row = {"prompt": f"say {i // 3}", "response": "ab " * int(rng.integers(1, 6)), "label": bool(i % 2)}
            reward = {} if i % 5 == 0 else {"reward": 2 if i % 5 == 1 else round(float(rng.normal()), 3)}
            out.write(json.dumps(row | reward) + "\n")
    return path


@pytest.fixture(scope="module")
def stores(place: Path, trainer, examples):
    """Open the data of every method from its token store."""
    files = {"pairs": place / "a.jsonl", "labeled": labeled_rows(place / "labeled.jsonl", 60)}
    load = lambda file: load_examples(  # noqa: E731
        {"a": DatasetConfig(train=str(file))},
        "train",
        trainer.tokenizer,
        trainer.model_config,
        store_in=place / "tokens",
    )
    return {name: load(file) for name, file in files.items()}


@pytest.fixture(scope="module")
def generations(place: Path, trainer, examples) -> Path:
    """Write generations for the prompts of the pairs: none of them one response, some three, one empty."""
    digest, path = models.tokenizer_digest(trainer.tokenizer), place / "generations.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for number, example in enumerate(examples):
            for k in range(1 + 2 * (number % 4 == 0)):
                said = [] if number == 7 else [5 + number % 50, 6 + k, 7]
                row = {"prompt_ids": example.prompt, "response_ids": said, "prompt": [], "response": ""}
                out.write(json.dumps({**row, "finish_reason": "stop", "tokenizer_digest": digest}) + "\n")
    return path


def advantages(folder: Path, tokenizer, generations: Path, teacher: str) -> Path:
    digest = models.tokenizer_digest(tokenizer)
    writer = Writer(folder, meta := Meta("advantage", 2, len(tokenizer), teacher, "base", digest, "", "", "made up"))
    for found in read_generations(generations, None):
        if length := len(found.response_ids):
            wide = np.full((length, 2), -1.0)
            entries = {"ids": np.tile([5, 6], (length, 1)), "values": wide, "teacher_logps": wide}
            writer.add(*found.tokens, {**entries, "tail": np.full(length, 0.2)})
    writer.close()
    finish(folder, meta, set())
    return folder


@pytest.fixture(scope="module")
def methods(place: Path, trainer, cache: Path, generations: Path) -> dict[str, tuple[str, list[str]]]:
    one, two = (advantages(place / name, trainer.tokenizer, generations, name) for name in ("one", "two"))
    adpa = ["adpa", f"loss.generations={generations}", "loss.advantages="]
    live = "loss.teacher=none"
    reward = "reward-weighted-distill"
    return {
        "kto of pairs": ("pairs", ["kto", "loss.frac_unique_desirable=0.4"]),
        "kto of labels": ("labeled", ["kto"]),
        "kto without a point": ("labeled", ["kto", "loss.zero_reference_point=true"]),
        "csft": ("pairs", ["csft", "model.max_length=24", "model.max_prompt_length=20"]),
        "distillm2": ("pairs", ["distillm2", live]),
        "gkd": ("labeled", ["gkd", live]),
        "gkd of pairs": ("pairs", ["gkd", live, "loss.on_policy=1"]),
        reward: ("labeled", [reward]),
        "grpo": ("labeled", ["grpo", "loss.verifier=null"]),
        "ppo": ("labeled", ["ppo", "loss.verifier=null"]),
        "ppo of pairs": ("pairs", ["ppo", "loss.verifier=null"]),
        "opd": ("pairs", ["opd", live]),
        "adpa": ("pairs", [*adpa[:2], f"{adpa[2]}{one}"]),
        "adpa of two caches": ("pairs", [*adpa[:2], f"{adpa[2]}[{one},{two}]"]),
        "tvkd": ("pairs", ["tvkd", "loss.value=max", f"loss.teacher_cache={cache}"]),
    }


METHODS = ["kto of pairs", "kto of labels", "kto without a point", "csft", "distillm2", "gkd", "gkd of pairs", "grpo"]
METHODS += ["reward-weighted-distill", "ppo", "ppo of pairs", "opd", "adpa", "adpa of two caches", "tvkd"]


# What was hashed when every item was made for it: a run that began then goes on.
DIGESTS = {
    "kto of pairs": "0d410d89bdb24b25",
    "kto of labels": "8ad7740cf7f907bb",
    "kto without a point": "15f4a814d932549c",
    "csft": "c2a4c0fac7c3b2e9",
    "gkd of pairs": "89dcea9dcca7b66c",
    "grpo": "241003f47daa6cd5",
    "reward-weighted-distill": "bd037f2478fc037e",
    "ppo of pairs": "5b7a24d87c7aca47",
}


def told(item: Item) -> tuple:
    """Return all that an item is, so that two can be compared."""
    sequences = [(t.ids, t.response, t.length, t.num_supervised) for t in (*item.sequences, *item.scored)]
    notes = None if item.notes is None else item.notes.tolist()
    return sequences, [None if e is None else e.identity() for e in item.entries], item.label, notes, item.source


@pytest.mark.parametrize("name", METHODS)
def test_items_of_a_store_are_the_plain_ones_and_no_row_is_made_for_them(stores, methods, name, monkeypatch):
    data, overrides = methods[name]
    stored = stores[data]
    maker, plain = (trainer_of(*overrides) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "example", lambda *_: pytest.fail("a row was made"))
        items = maker.items(stored, "train")
        digest, tokens = items_digest(items), num_tokens(items)
        both = joined(items, items)
        twice = items_digest(both)
    wanted = plain.items(list(stored), "train")
    assert list(map(told, items)) == list(map(told, wanted))
    assert columns_of(items) is not None and digest == items_digest(list(items)) == items_digest(wanted)
    assert digest == DIGESTS.get(name, digest)
    assert twice == items_digest([*items, *items])
    assert tokens == sum(t.length for item in items for t in item.sequences)
    keys = [t.key for item in items for t in (*item.sequences, *item.scored)]
    assert list(map(bytes, columns_of(items).keys.reshape(-1, 16))) == keys


def test_the_digest_of_what_a_verifier_reads_is_that_of_all_rows_at_once(stores):
    trainer = trainer_of("ppo", "loss.online=false")
    items = trainer.items(stores["labeled"], "train")
    trainer.train_items = items
    metas = [example.conversation.meta for example in stores["labeled"]]
    said = f"{items_digest(items)} {json.dumps(metas, sort_keys=True, default=str)}"
    assert trainer.data_digest() == hashlib.sha256(said.encode()).hexdigest()[:16]


def test_the_plain_round_finds_the_same_partners():
    rng = np.random.default_rng(0)
    for count in (2, 3, 10, 100):
        prompts = np.append(rng.integers(0, 1 + count // 3, count - 1), 99)
        order = np.random.default_rng([5, 1]).permutation(count).tolist()
        for number, other in enumerate(partners(prompts, 5).tolist()):
            round_ = order[order.index(number) + 1 :] + order[: order.index(number)]
            assert other == next(j for j in round_ if prompts[j] != prompts[number])


def test_a_bad_row_of_labels_is_named_as_ever(place: Path, trainer):
    for row, name, message in (
        ({"prompt": "a", "response": "b", "label": "yes"}, "kto", "needs pairs, or a column `label`"),
        ({"prompt": "a", "response": "b", "reward": "much", "label": True}, "ppo", "a row has no reward"),
        ({"prompt": "a", "response": "b"}, "reward-weighted-distill", "a row has no reward"),
    ):
        file = place / f"bad-{name}.jsonl"
        file.write_text("\n".join(json.dumps(r) for r in ({"prompt": "x", "response": "y", "label": 1}, row)) + "\n")
        data = {"a": DatasetConfig(train=str(file))}
        rows = load_examples(data, "train", trainer.tokenizer, trainer.model_config, store_in=place / "tokens")
        overrides = ["loss.verifier=null"] if name == "ppo" else []
        with pytest.raises(ValueError, match=message):
            trainer_of(name, *overrides).items(rows, "train")


def test_adpa_names_a_generation_that_a_cache_lacks(place: Path, trainer, stores, generations: Path):
    short = place / "short.jsonl"
    short.write_text("".join(generations.read_text().splitlines(keepends=True)[:-3]))
    cache = advantages(place / "few", trainer.tokenizer, short, "few")
    run = ["adpa", f"loss.generations={generations}", f"loss.advantages={cache}"]
    with pytest.raises(ValueError, match="has no entries for a sequence of"):
        trainer_of(*run).items(stores["pairs"], "train")
    with pytest.raises(ValueError, match=f"of {ROWS} prompts have no generation. The first: 'say"):
        trainer_of(run[0], f"loss.generations={short}", run[2]).items(stores["pairs"], "train")


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
