"""Teachers by a column and teachers with another tokenizer: a run's start makes no more rows for more data."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import launch
from dataloader import load_examples
from settings.schema import DatasetConfig
from teacher import asking
from teacher.lookup import identity_of
from tests.support.bigram import trainer_of
from tests.support.helpers import composed, rows_of, write_pairs
from tests.support.tokenizers import small, written
from tests.test_start_up import told, write_cache
from tokens.store import Rows
from trainers.batches import columns_of, items_digest

ROWS = 60
TEACHERS = ("math", "code", "code")  # of every three rows


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("asking")


def opened(place: Path, count: int, tokenizer=None):
    """Return `count` pairs, every third one for the teacher `math`, from their token store."""
    file = place / f"pairs-{count}.jsonl"
    if not file.is_file():
        rows = [
            row | {"teacher": "code" if i % 3 else "math"} for i, row in enumerate(rows_of(write_pairs(file, count)))
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer, data = trainer_of("dpo"), {"a": DatasetConfig(train=str(file))}
    kept = place / "tokens"
    return load_examples(data, "train", tokenizer or trainer.tokenizer, trainer.model_config, store_in=kept)


@pytest.fixture(scope="module")
def ways(place: Path) -> dict[str, list[str]]:
    """Write the caches of two teachers of the student's tokens and of one with a BPE; return what names them."""
    examples, tokenizer, bpe = opened(place, ROWS), trainer_of("dpo").tokenizer, small("bpe")
    other = opened(place, ROWS, bpe)
    for name in ("code", "math"):
        write_cache(place / name, tokenizer, [e for e in examples if e.conversation.meta["teacher"] == name])
    write_cache(place / "bpe", bpe, other)
    folders = f"{{math: {place / 'math'}, code: {place / 'code'}}}"
    by_bytes = ["loss.alignment=bytes", f"loss.teacher_tokenizer={written('bpe', place)}", "loss.min_coverage=0.9"]
    return {
        "column": [f"loss.teacher_cache={folders}", "loss.teacher_column=teacher"],
        "bytes": [f"loss.teacher_cache={place / 'bpe'}", *by_bytes],
    }


@pytest.mark.parametrize("way", ["column", "bytes"])
def test_items_of_a_store_are_those_of_rows_one_by_one(place: Path, ways, way: str, monkeypatch):
    examples = opened(place, ROWS)
    items, plain = (trainer_of("dckd", *ways[way]).items(rows, "train") for rows in (examples, list(examples)))
    assert list(map(told, items)) == list(map(told, plain))
    assert columns_of(items) is not None
    assert items_digest(items) == items_digest(list(items)) == items_digest(plain)
    for item, same in zip(items, plain, strict=True):
        for one, other in zip(item.entries, same.entries, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one.read()[:3], other.read()[:3], strict=True))
    assert len(trainer_of("dckd", *ways[way]).items([], "train")) == 0
    if way == "column":
        asked = [item.entries[0].identity() for item in items]
        readers = {name: identity_of(reader) for name, reader in items[0].entries[0].teachers.readers.items()}
        assert asked == [readers[TEACHERS[i % 3]] for i in range(ROWS)]


@pytest.mark.parametrize("way", ["column", "bytes"])
def test_the_rows_made_at_a_start_do_not_grow_with_the_data(place: Path, ways, way: str, monkeypatch):
    """Of a column none; with another tokenizer those of the sample, whose entries are read."""
    monkeypatch.setattr(asking, "SAMPLE", 3)
    made, made_by = Counter[int](), {}
    plain = Rows.example

    def counted(self, row: int, where: str):
        made[len(self.table.lengths)] += 1
        return plain(self, row, where)

    monkeypatch.setattr(Rows, "example", counted)
    for count in (ROWS // 2, ROWS):
        examples = opened(place, count)
        made.clear()
        items_digest(trainer_of("dckd", *ways[way]).items(examples, "train"))
        made_by[count] = made.total()
    assert set(made_by.values()) == {0 if way == "column" else 2 * 3}  # in the student's tokens and in the teacher's
    with monkeypatch.context() as patch:
        patch.setattr(asking, "encode_example", lambda *_: pytest.fail("tokenized again"))
        patch.setattr(Rows, "conversation", lambda *_: pytest.fail("a conversation was read"))
        trainer_of("dckd", *ways[way]).items(opened(place, ROWS), "train")


def test_what_a_teacher_lacks_is_named_by_its_row(place: Path, ways):
    more = opened(place, ROWS + 1)
    for way in ("column", "bytes"):
        with pytest.raises(ValueError, match="has no entries for a sequence of"):
            trainer_of("dckd", *ways[way]).items(more, "train")
        assert columns_of(trainer_of("dckd", *ways[way]).items(more, "test")) is not None  # held out: NLL alone
    unknown = ways["column"][0].replace("math", "maths", 1)
    with pytest.raises(ValueError, match=r"row 1: the row's column 'teacher' .* says 'math', .* has maths, code"):
        trainer_of("dckd", unknown, ways["column"][1]).items(opened(place, ROWS), "train")
    few = ["loss.teacher_tokenizer=" + str(written("words", place)), f"loss.teacher_cache={place / 'words'}"]
    write_cache(place / "words", small("words"), opened(place, ROWS, small("words")))
    with pytest.raises(ValueError, match=r"(?s)min_coverage=0.9. The worst response.*student: '.*teacher: '"):
        trainer_of("dckd", *few, *ways["bytes"][1:2], ways["bytes"][3]).items(opened(place, ROWS), "train")


def test_a_teacher_of_another_tokenizer_finds_rows_that_spell_marks_as_their_data_set_reads_them(tmp_path: Path):
    answers = ["the ant", "the ant <|im_end|> and bee", "bee"]
    rows = [{"prompt": "say", "chosen": text, "rejected": "no"} for text in answers]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bpe = written("bpe", tmp_path)
    line = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    line += ["datasets.local.special_tokens=split"]
    cache = ["task=cache", "exp_name=teacher", f"model.tokenizer_name_or_path={bpe}", "cache.top_k=8"]
    launch.run_task(composed(*line, *cache))
    run = ["loss=dckd", f"loss.teacher_cache={tmp_path}/teacher/CACHE", "loss.alignment=bytes", "loss.min_coverage=0.9"]
    launch.run_task(composed(*line, *run, f"loss.teacher_tokenizer={bpe}", "exp_name=student", "n_steps=1"))
    assert (tmp_path / "student" / "DONE").is_file()
