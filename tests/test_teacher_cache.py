"""The teacher cache: what was written is found by content, and anything else is refused and shown."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from teacher.cache import Meta, Reader, Writer, content_key, finish

META = Meta("logprob", 3, 100, "teacher", None, "tokenizer", "template", "data", "command")


def sequence(seed: int, length: int = 9, response: int = 4):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 100, length).tolist()
    mask = [False] * (length - response) + [True] * response
    logps = np.log(rng.dirichlet(np.ones(5), response)[:, :3]).astype(np.float32)
    return ids, mask, rng.integers(0, 100, (response, 3)), logps, 1 - np.exp(logps).sum(1)


def written(folder: Path, seeds: range, meta: Meta = META) -> Path:
    writer = Writer(folder, meta)
    for seed in seeds:
        writer.add(*sequence(seed))
        writer.flush()
    writer.close()
    finish(folder)
    return folder


def test_round_trip_is_exact_in_ids_and_within_float16_in_values(tmp_path):
    reader = Reader(written(tmp_path / "c", range(5)))
    for seed in range(5):
        ids, mask, top, values, _ = sequence(seed)
        entry = reader.get(ids, mask)
        assert np.array_equal(entry.ids, top)
        assert (np.abs(entry.values - values) <= np.abs(values) * 2**-11).all()  # half a unit in float16's last place
    assert (reader.meta.num_sequences, reader.meta.num_tokens) == (5, 20)


def test_a_sequence_that_is_not_there_is_shown_beside_the_nearest(tmp_path):
    reader = Reader(written(tmp_path / "c", range(3)), decode=lambda ids: " ".join(map(str, ids)))
    ids, mask, *_ = sequence(1)
    with pytest.raises(ValueError, match="another truncation") as caught:
        reader.get(ids[:-2], mask[:-2])
    assert "agrees with the nearest cached one for 7 tokens" in str(caught.value)
    changed = [*ids[:5], 77, *ids[6:]]
    with pytest.raises(ValueError, match="template, tokenizer"):
        reader.get(changed, mask)
    with pytest.raises(ValueError, match="another supervised part"):
        reader.get(ids, [False] * 4 + [True] * 5)


@pytest.mark.parametrize("key", ["tokenizer_digest", "quantity", "teacher_digest", "template_digest"])
def test_another_origin_is_refused_by_name(tmp_path, key):
    folder = written(tmp_path / "c", range(2))
    with pytest.raises(ValueError, match=f"{key}=.*this run has 'other'"):
        Reader(folder, {key: "other"})


def test_an_unfinished_cache_is_not_trusted(tmp_path):
    Writer(tmp_path / "c", META).close()
    with pytest.raises(ValueError, match="no DONE"):
        Reader(tmp_path / "c")


def test_a_killed_writer_goes_on_behind_its_last_whole_sequence(tmp_path):
    whole, torn = written(tmp_path / "whole", range(6)), tmp_path / "torn"
    writer = Writer(torn, META)
    for seed in range(3):
        writer.add(*sequence(seed))
        writer.flush()
    writer.add(*sequence(3))
    for stream in writer._streams.values():  # arrays reach the disk, the index row does not: a kill in between
        stream.flush()
    with (torn / "shard-00000" / "index.jsonl").open("a") as index:
        index.write('{"key": "00')
    again = Writer(torn, META)
    assert [again.has(content_key(*sequence(seed)[:2])) for seed in range(5)] == [True, True, True, False, False]
    for seed in range(6):
        again.add(*sequence(seed))
    again.close()
    finish(torn)
    for name in ("seq_ids", "seq_mask", "topk_ids", "values", "tail"):
        file = f"shard-00000/{name}.bin"
        assert (whole / file).read_bytes() == (torn / file).read_bytes(), name


def test_another_meta_in_the_same_folder_is_refused(tmp_path):
    written(tmp_path / "c", range(2))
    with pytest.raises(ValueError, match="teacher_digest"):
        Writer(tmp_path / "c", replace(META, teacher_digest="another"))


def test_the_mask_is_part_of_the_key():
    assert content_key([1, 2], [False, True]) != content_key([1, 2], [True, True])
    assert content_key([1, 2], [False, True]) == content_key(np.array([1, 2]), np.array([False, True]))
