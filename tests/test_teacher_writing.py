"""One pass over the logits gives what two did; the thread that writes loses nothing and hides no error."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloader import Tokens
from teacher.cache import Arrays, Meta, Reader, Writer, data_digest, finish, stored_keys
from teacher.entries import BLOCK, topk_entries, topk_logps
from teacher.writing import WAITING, Background, write_all


@pytest.mark.parametrize("vocab", [50, 4 * 5 * BLOCK, 4 * 5 * BLOCK + 37])  # plain, whole blocks, a rest
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [None, 3])
def test_one_pass_gives_the_bits_of_two(vocab: int, dtype: torch.dtype, chunk: int | None) -> None:
    logits = 5 * torch.randn(17, vocab, dtype=dtype, generator=torch.Generator().manual_seed(0))
    logits[3, 40:] = -torch.inf  # of a model that forbids most of its vocabulary
    logits[4, -5:] = 30 + torch.arange(5)  # the largest are the last
    for found, plain in zip(topk_entries(logits, 5, chunk), topk_logps(logits, 5, chunk), strict=True):
        assert found.dtype == plain.dtype and torch.equal(found, plain)


def test_narrow_logits_are_counted_in_float32_and_a_wide_k_is_taken_from_all() -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    ids, logps, tail = topk_entries(logits, 7)
    _, plain, rest = topk_logps(logits, 7)  # of equal logits either id may come
    assert logps.dtype == torch.float32 and torch.equal(logps, plain) and torch.equal(tail, rest)
    assert torch.equal(logits.gather(-1, ids).float() - logits.float().logsumexp(-1, keepdim=True), logps)
    assert torch.equal(topk_entries(logits.float(), 3000)[1], topk_logps(logits.float(), 3000)[1])
    with pytest.raises(ValueError, match="top_k=3001 is more than the vocabulary of 3000"):
        topk_entries(logits, 3001)


META = Meta("value", 0, 100, "t", None, "t", "t", "d", "")


def rows(count: int) -> list[list[Tokens]]:
    return [[Tokens([batch, row, 7], [False, True, True]) for row in range(2)] for batch in range(count)]


def values(batch: list[Tokens]) -> list[Arrays]:
    return [{"values": np.array(row.ids[:2], np.float32)} for row in batch]


class Counted(Writer):
    """Counts how often files are made safe, and may fail at a sequence."""

    flushes, fails_at = 0, -1

    def flush(self) -> None:
        self.flushes += bool(self._pending)
        super().flush()

    def add(self, ids: object, response: object, arrays: object) -> None:
        if ids[0] == self.fails_at:  # type: ignore[index]
            raise OSError(28, "No space left on device")
        super().add(ids, response, arrays)  # type: ignore[arg-type]


def test_files_are_made_safe_every_few_seconds_and_hold_what_a_flush_a_batch_gives(tmp_path: Path) -> None:
    todo, written = rows(50), {}
    for name, seconds in (("often", 0.0), ("seldom", 1000.0)):
        writer = Counted(tmp_path / name, META)
        waits = [(lambda batch=batch: values(batch)) for batch in todo]  # as a device gives them
        write_all(todo, waits, writer, "", False, seconds)
        writer.close()
        written[name] = {p.name: p.read_bytes() for p in (tmp_path / name / "shard-00000").iterdir()}
        assert writer.flushes == (50 if name == "often" else 2)  # the first batch, and the end
    assert written["often"] == written["seldom"]
    keys = {row.key for batch in todo for row in batch}
    finish(tmp_path / "seldom", META, keys)
    assert Reader(tmp_path / "seldom").get([3, 1, 7], [False, True, True])["values"].tolist() == [3, 1]
    assert data_digest(keys) and stored_keys(tmp_path / "often", META) == keys


def test_an_error_of_the_writing_thread_is_raised_where_the_scoring_is(tmp_path: Path) -> None:
    writer, scored = Counted(tmp_path, META), []

    def scoring() -> Iterator[list[Arrays]]:
        for batch in rows(1000):
            scored.append(batch)
            yield values(batch)

    writer.fails_at = 5
    with pytest.raises(OSError, match="No space left"):
        write_all(rows(1000), scoring(), writer, "", False)
    assert len(scored) < 1000 and threading.active_count() < 20
    writer.fails_at = -1
    with pytest.raises(OSError, match="No space left"), Background(Counted(tmp_path / "b", META)) as background:
        background.writer.fails_at = 0  # type: ignore[attr-defined]
        background.add(rows(1)[0], values(rows(1)[0]))  # the last batch: only the end can tell


def test_what_was_scored_before_an_interruption_is_safe(tmp_path: Path) -> None:
    def scoring() -> Iterator[list[Arrays]]:
        for number, batch in enumerate(rows(9)):
            if number == 6:
                raise KeyboardInterrupt
            yield values(batch)

    with pytest.raises(KeyboardInterrupt):
        write_all(rows(9), scoring(), Writer(tmp_path, META), "", False, 1000.0)
    assert stored_keys(tmp_path, META) == {row.key for batch in rows(6) for row in batch}


def test_a_slow_disk_holds_the_scoring_back(tmp_path: Path) -> None:
    ahead, written = [], []

    def slow(batch: list[Tokens]) -> list[Arrays]:
        time.sleep(0.01)
        written.append(batch)
        return values(batch)

    def scoring() -> Iterator[object]:
        for number, batch in enumerate(rows(20)):
            ahead.append(number - len(written))
            yield lambda batch=batch: slow(batch)

    write_all(rows(20), scoring(), Writer(tmp_path, META), "", False)  # type: ignore[arg-type]
    assert len(written) == 20 and max(ahead) <= WAITING + 2
