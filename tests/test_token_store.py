"""Tokens that are kept are those that tokenizing anew gives, for whoever asks; a torn store is made again."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import models
from conversations import format_of, to_conversation
from dataloader import epoch_order, load_examples
from settings.schema import DatasetConfig, ModelConfig, typed
from tests.support.bigram import trainer_of
from tests.support.helpers import composed, write_pairs
from tokens import store as token_store
from tokens.encoding import encode_example
from tokens.examples import Example, content_key
from tokens.sources import open_rows, read_rows
from tokens.store import Record, open_store
from tokens.writing import store
from trainers.batches import items_digest, make_batch

MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
FORMATS = {
    "messages": [{"messages": [*MESSAGES, {"role": "user", "content": f"{i}?"}, *MESSAGES[1:]]} for i in range(5)],
    "strings": [{"prompt": f"p {i} é", "response": "r" * i, "label": i % 2 == 0, "n": [i]} for i in range(5)],
    "pairs": [{"prompt": f"p {i}", "chosen": "yes " * (i + 1), "rejected": "no", "reward": i / 3} for i in range(5)],
    "prompts": [{"prompt": f"only {i} é"} for i in range(5)],
    "hh": [
        {"chosen": f"\n\nHuman: {i}\n\nAssistant: a", "rejected": f"\n\nHuman: {i}\n\nAssistant: b"} for i in range(5)
    ],
    "gsm8k": [{"question": f"{i} + 1?", "answer": f"easy\n#### {i + 1}"} for i in range(5)],
}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return typed(composed("model=tiny")["model"], ModelConfig)


@pytest.fixture(scope="module")
def tokenizer(config):
    return models.load_tokenizer(config)


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(examples) -> list[tuple]:
    """Return all that an example says, as Python values."""
    parts = ("chosen", "rejected", "response")

    def sides(example: Example) -> list[tuple | None]:
        found = [getattr(example, part) for part in parts]
        return [t and (t.ids, t.response, t.key, t.length, t.num_supervised) for t in found]

    return [(e.prompt, sides(e), e.conversation, e.where) for e in examples]


def stores(base: Path) -> list[Path]:
    return sorted(path.parent for path in base.glob("*/DONE"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("supervise", ["last", "all"])
def test_a_store_gives_what_tokenizing_anew_gives(tmp_path: Path, tokenizer, config, capsys, name, supervise):
    file = written(tmp_path / "a.jsonl", FORMATS[name])
    data = {"a": DatasetConfig(train=str(file), supervise=supervise, weight=1.4)}
    found, said = [], []
    for place in (None, tmp_path / "tokens", tmp_path / "tokens"):
        found.append(plain(load_examples(data, "train", tokenizer, config, seed=3, store_in=place)))
        said.append(capsys.readouterr().out)
    assert found[0] == found[1] == found[2] and said[0] == said[1] == said[2] != ""
    assert len(stores(tmp_path / "tokens")) == 1
    for prompt, sides, _, where in found[0]:  # and it is what the encoder says of that row
        row = FORMATS[name][int(where.rsplit(" ", 1)[1]) - 1]
        conversation = to_conversation(row, format_of("auto", row, "here"), "here")
        fresh = encode_example(tokenizer, conversation, config, supervise, Counter())
        assert plain([fresh])[0][:2] == (prompt, sides)


def test_each_thing_that_decides_the_ids_gives_another_store(tmp_path: Path, tokenizer, config):
    file, base = write_pairs(tmp_path / "a.jsonl", 6), tmp_path / "tokens"
    other = models.load_tokenizer(config)
    other.chat_template = "{{ 'new' }}" + other.chat_template
    plain_data = DatasetConfig(train=str(file))

    def load(data=plain_data, tokenizer=tokenizer, config=config, limit=None):
        load_examples({"a": data}, "train", tokenizer, config, limit, store_in=base)
        return len(stores(base))

    assert load() == load() == 1
    shutil.copy(file, tmp_path / "copy.jsonl")
    assert load(DatasetConfig(train=str(tmp_path / "copy.jsonl"))) == 1  # content counts, not its name
    assert load(DatasetConfig(train=str(file), weight=3.0)) == load(limit=2) == 1  # mixing needs no other tokens
    assert load(tokenizer=other) == 2
    assert load(config=replace(config, max_length=config.max_length - 1)) == 3
    assert load(config=replace(config, max_prompt_length=config.max_prompt_length - 1)) == 4
    assert load(DatasetConfig(train=str(file), supervise="all")) == 5
    assert load(DatasetConfig(train=str(file), format="messages")) == 6
    file.write_text(file.read_text().replace("!", "!!", 1))
    assert load() == 7


def test_a_few_rows_of_many_are_tokenized_alone(tmp_path: Path, tokenizer, config):
    file = write_pairs(tmp_path / "a.jsonl", 40)
    data = {"a": DatasetConfig(train=str(file))}
    fresh = plain(load_examples(data, "train", tokenizer, config, 5, seed=2))
    kept = plain(load_examples(data, "train", tokenizer, config, 5, seed=2, store_in=tmp_path / "tokens"))
    assert kept == fresh
    [folder] = stores(tmp_path / "tokens")
    assert json.loads((folder / "meta.json").read_text())["rows"] == 5


def test_a_mix_is_what_it_is_without_a_store(tmp_path: Path, tokenizer, config):
    files = [write_pairs(tmp_path / f"{n}.jsonl", n) for n in (7, 12)]
    data = {str(f): DatasetConfig(train=str(f), weight=w) for f, w in zip(files, (2.5, 0.5), strict=True)}
    for limit in (None, 9):
        fresh = plain(load_examples(data, "train", tokenizer, config, limit, 4))
        assert plain(load_examples(data, "train", tokenizer, config, limit, 4, tmp_path / "tokens")) == fresh
    assert len(fresh) == 9


def test_dropped_rows_are_left_out_and_named_at_every_start(tmp_path: Path, tokenizer, config, capsys):
    rows = [{"prompt": "a", "response": text} for text in ("b", "  ", "c", "")]
    data = {"a": DatasetConfig(train=str(written(tmp_path / "a.jsonl", rows)))}
    for _ in range(2):
        found = load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens")
        assert [e.conversation.response[0]["content"] for e in found] == ["b", "c"]
        assert "2 of 4 rows (2 dropped: no supervised token; the first one dropped:" in capsys.readouterr().out
    assert found[1].where.endswith("row 3")


def test_many_processes_write_what_one_writes(tmp_path: Path, tokenizer, config):
    file = write_pairs(tmp_path / "a.jsonl", 50)
    data, contents = {"a": DatasetConfig(train=str(file))}, []
    for workers in (1, 3):
        base = tmp_path / f"by-{workers}"
        load_examples(data, "train", tokenizer, config, store_in=base, num_proc=workers)
        [folder] = stores(base)
        contents.append({path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))})
    assert contents[0] == contents[1] and all(contents[0].values())
    written(tmp_path / "bad.jsonl", [{"prompt": "a", "response": "b"}] * 5 + [{"prompt": "a", "response": 3}])
    with pytest.raises(ValueError, match=r"bad\.jsonl, row 6: response must be a text"):
        bad = {"a": DatasetConfig(train=str(tmp_path / "bad.jsonl"))}
        load_examples(bad, "train", tokenizer, config, store_in=tmp_path / "tokens", num_proc=2)
    assert not stores(tmp_path / "tokens") and not list((tmp_path / "tokens").glob("*.tmp"))


def test_a_folder_of_shards_is_read_as_one_file_is(tmp_path: Path, tokenizer, config):
    import datasets

    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(7)]
    for suffix in ("jsonl", "parquet"):
        folder = tmp_path / suffix
        folder.mkdir()
        for shard, part in enumerate((rows[:3], rows[3:])):
            if suffix == "jsonl":
                written(folder / f"{shard}.jsonl", part)
            else:
                datasets.Dataset.from_list(part).to_parquet(str(folder / f"{shard}.parquet"))
        assert read_rows(str(folder)) == rows and open_rows(str(folder)).size() == 7
        data = {"a": DatasetConfig(train=str(folder))}
        found = load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens")
        assert [e.conversation.prompt[0]["content"] for e in found] == [row["prompt"] for row in rows]
    assert len(stores(tmp_path / "tokens")) == 2


# ---- what happens to files


def records(numbers) -> Iterator[Record]:
    for number in numbers:
        example = Example([1, number], None, None, None, to_conversation({"prompt": "a"}, "strings", "here"))
        yield Record(number, example, [0, 0], example.conversation)


@pytest.mark.parametrize("name", sorted(token_store.FILES))
@pytest.mark.parametrize("harm", ["torn", "edited", "gone"])
def test_a_torn_or_edited_store_is_made_anew_and_that_is_said(tmp_path: Path, tokenizer, config, capsys, name, harm):
    data = {"a": DatasetConfig(train=str(write_pairs(tmp_path / "a.jsonl", 4)))}
    before = plain(load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens"))
    [folder] = stores(tmp_path / "tokens")
    path = folder / f"{name}.bin"
    content = bytearray(path.read_bytes())
    if harm == "torn":
        os.truncate(path, len(content) - 1)
    elif harm == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    capsys.readouterr()
    assert plain(load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens")) == before
    assert "the stored tokens are not as they were written" in capsys.readouterr().out
    assert plain(load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens")) == before
    assert "written" not in capsys.readouterr().out


def test_a_copied_store_is_read_and_a_foreign_one_is_not(tmp_path: Path):
    rows = store(tmp_path, {"of": "a"}, range(9), records, 1)
    assert [rows.example(i, "").prompt for i in range(9)] == [[1, i] for i in range(9)]
    [folder] = stores(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copy)
    assert np.array_equal(open_store(copy, {"of": "a"}).table.ids, rows.table.ids)
    with pytest.raises(ValueError, match="of something else"):
        open_store(copy, {"of": "b"})


def in_child(work) -> int:
    """Run `work` in a forked process; return its number."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path, workers: int):
    begun = tmp_path / "begun"

    def slowly(numbers) -> Iterator[Record]:
        for record in records(numbers):
            begun.touch()
            time.sleep(0.01)
            yield record

    for _ in range(3):
        child = in_child(lambda: store(tmp_path, {"of": "x"}, range(2000), slowly, workers))
        while not begun.exists():
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        begun.unlink()
        assert not stores(tmp_path)
    rows = store(tmp_path, {"of": "x"}, range(2000), records, 1)  # the lock fell with the writer and its helpers
    assert len(rows.table.numbers) == 2000 and len(stores(tmp_path)) == 1 and not list(tmp_path.glob("*.tmp"))


def test_two_processes_at_once_make_one_store(tmp_path: Path):
    log = tmp_path / "log"

    def noted(numbers) -> Iterator[Record]:
        with log.open("a") as out:
            out.write("written\n")
        time.sleep(0.3)
        yield from records(numbers)

    children = [in_child(lambda: store(tmp_path / "tokens", {"of": "x"}, range(50), noted, 1)) for _ in range(3)]
    for child in children:
        os.waitpid(child, 0)
    assert log.read_text() == "written\n" and len(stores(tmp_path / "tokens")) == 1


def test_what_json_does_not_hold_stays_in_memory_and_that_is_said(tmp_path: Path, tokenizer, config, capsys):
    from datetime import datetime

    import datasets

    rows = [{"prompt": "p", "response": "r", "day": datetime(2026, 11, 28)}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    data = {"a": DatasetConfig(train=str(tmp_path / "saved"))}
    [example] = load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens")
    assert example.conversation.meta == {"day": datetime(2026, 11, 28)} and not stores(tmp_path / "tokens")
    assert "tokenized at every start" in capsys.readouterr().out


def test_a_stored_sequence_knows_its_key(tmp_path: Path, tokenizer, config):
    data = {"a": DatasetConfig(train=str(write_pairs(tmp_path / "a.jsonl", 3)))}
    for example in load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens"):
        assert example.chosen.key == content_key(example.chosen.ids, example.chosen.response)


@pytest.mark.slow
def test_the_second_start_of_many_rows_costs_little(tmp_path: Path, tokenizer, config):
    """A fifth of 100,000 rows within a fifth of 15 s and of 500 MB; CPU time, as other work may share the machine."""
    trainer, seconds, pages = trainer_of("dpo"), [], []

    def start(data: dict[str, DatasetConfig]) -> None:
        began = time.process_time()
        examples = load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens")
        items = trainer.items(examples, "train")
        items_digest(items)
        make_batch([items[i] for i in epoch_order(len(items), 0, 0)[:16]], 0)
        seconds.append(time.process_time() - began)
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))

    few, many = (
        {"a": DatasetConfig(train=str(write_pairs(tmp_path / f"{count}.jsonl", count)))} for count in (100, 20_000)
    )
    for data in (few, many):
        load_examples(data, "train", tokenizer, config, store_in=tmp_path / "tokens")
    start(few)
    start(many)
    grown = (pages[1] - pages[0]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    print(f"100 rows: {seconds[0]:.2f} s; 20,000 rows: {seconds[1]:.2f} s and {grown:.0f} MB more")
    assert seconds[1] - seconds[0] < 15 / 5 and grown < 500 / 5
