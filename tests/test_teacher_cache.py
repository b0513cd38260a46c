"""The teacher cache: what was written is found by content, and anything else is refused and shown."""

import json
import re
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import launch
from teacher.cache import IDENTITY, NOT_IDENTITY, Meta, Reader, Writer, begin, content_key, finish, stored_keys
from teacher.quantities import TABLE, quantity_named, quantity_of
from teacher.scoring import SCORES
from tests.support.helpers import ROOT, composed

META = Meta("logprob", 3, 100, "teacher", None, "tokenizer", "template", "data", "float32")


def sequence(seed: int, length: int = 9, response: int = 4):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 100, length).tolist()
    mask = [False] * (length - response) + [True] * response
    logps = np.log(rng.dirichlet(np.ones(5), response)[:, :3]).astype(np.float32)
    arrays = {"ids": rng.integers(0, 100, (response, 3)), "values": logps, "tail": 1 - np.exp(logps).sum(1)}
    return ids, mask, arrays


def written(folder: Path, seeds: range, meta: Meta = META) -> Path:
    writer = Writer(folder, meta)
    for seed in seeds:
        writer.add(*sequence(seed))
        writer.flush()
    writer.close()
    finish(folder, meta, writer.keys)
    return folder


def test_round_trip_is_exact_in_ids_and_within_float16_in_values(tmp_path):
    reader = Reader(written(tmp_path / "c", range(5)))
    for seed in range(5):
        ids, mask, arrays = sequence(seed)
        entry, values = reader.get(ids, mask), arrays["values"]
        assert np.array_equal(entry["ids"], arrays["ids"])
        assert (np.abs(entry["values"] - values) <= np.abs(values) * 2**-11).all()  # half of float16's last place
    assert (reader.meta.num_sequences, reader.meta.num_tokens) == (5, 20)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_quantity_comes_back_in_its_shapes_and_precision(tmp_path, row):
    k, rng = 3, np.random.default_rng(1)
    meta = replace(META, quantity=row.name, k=k if row.is_wide else 0)
    writer, lengths = Writer(tmp_path, meta), (4, 0, 2)
    rows = []
    for seed, length in enumerate(lengths):
        ids, mask, _ = sequence(seed, response=length)
        arrays = {a.name: rng.integers(0, 99, (length, k) if a.wide else length) for a in row.arrays}
        arrays |= {name: part + 0.123 for name, part in arrays.items() if name != "ids"}
        rows.append((ids, mask, arrays))
        writer.add(*rows[-1])
    with pytest.raises(ValueError, match=f"{row.name} has the arrays"):
        writer.add([1, 2], [False, True], {})
    with pytest.raises(ValueError, match=r"needs \w+ \(1.*got \(2"):
        writer.add([1, 2], [False, True], {name: part[:1].repeat(2, axis=0) for name, part in rows[0][2].items()})
    writer.close()
    finish(tmp_path, meta, writer.keys)
    reader = Reader(tmp_path, {"quantity": row.name})
    for ids, mask, arrays in rows:
        found = reader.get(ids, mask)
        assert found.keys() == arrays.keys()
        for array in row.arrays:
            rounding = 0 if array.dtype is None else np.finfo(array.dtype).eps
            np.testing.assert_allclose(found[array.name], arrays[array.name], rtol=rounding, strict=False)
            assert found[array.name].shape == arrays[array.name].shape


def test_the_table_the_functions_and_the_documentation_name_the_same_quantities():
    text = (ROOT / "docs" / "cache_format.md").read_text(encoding="utf-8")
    text = text[text.index("## Quantities") :].split("\n## ")[0]
    names = [row.name for row in TABLE]
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == names and list(SCORES) == names


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], "logprob"),
        (["cache.reference=x"], "advantage"),
        (["cache.quantity=value"], "value"),
        (["cache.reference=x", "cache.quantity=advantage", "cache.beta=2"], "advantage"),
        (["cache.quantity=advantage"], "compares two teachers: set cache.reference"),
        (["cache.quantity=logprob", "cache.reference=x"], "asks one model, and cache.reference=x names a second"),
        (["cache.quantity=token_logp", "cache.beta=2"], "cache.beta=2.0 is a factor on advantages"),
        (["cache.reference=x", "cache.backend=vllm"], "advantage"),
        (["cache.quantity=value", "cache.backend=vllm"], "cache.backend=vllm cannot give cache.quantity=value"),
        (["cache.quantity=token_lgp"], "Did you mean 'token_logp'"),
    ],
)
def test_the_quantity_is_what_the_keys_say_and_contradictions_are_refused(overrides, wanted):
    raw = composed("task=cache", *overrides)
    if " " not in wanted:
        assert quantity_of(launch.settings_of(raw).cache) == quantity_named(wanted)
    else:
        with pytest.raises(ValueError, match=wanted):
            launch.settings_of(raw)


def test_a_sequence_that_is_not_there_is_shown_beside_the_nearest(tmp_path):
    reader = Reader(written(tmp_path / "c", range(3)), decode=lambda ids: " ".join(map(str, ids)))
    ids, mask, _ = sequence(1)
    with pytest.raises(ValueError, match="another truncation") as caught:
        reader.get(ids[:-2], mask[:-2])
    assert "agrees with the nearest cached one for 7 tokens" in str(caught.value)
    changed = [*ids[:5], 77, *ids[6:]]
    with pytest.raises(ValueError, match="template, tokenizer"):
        reader.get(changed, mask)
    with pytest.raises(ValueError, match="another supervised part"):
        reader.get(ids, [False] * 4 + [True] * 5)


@pytest.mark.parametrize("key", ["tokenizer_digest", "quantity", "teacher_digest", "template_digest", "precision"])
def test_another_origin_is_refused_by_name(tmp_path, key):
    folder = written(tmp_path / "c", range(2))
    with pytest.raises(ValueError, match=f"{key}=.*this run has 'other'"):
        Reader(folder, {key: "other"})


@pytest.mark.parametrize("stored", [{"format_version": 1}, {"format_version": 2}, {"model": "a", "keys": []}])
def test_an_older_format_is_refused_with_what_to_do(tmp_path, stored):
    folder = written(tmp_path / "c", range(2))
    (folder / "meta.json").write_text(json.dumps(stored), encoding="utf-8")
    for opened in (lambda: Reader(folder), lambda: Writer(folder, META)):
        with pytest.raises(ValueError, match="format_version=.*remove the folder and make it again"):
            opened()


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
    with (torn / "shard-00000" / "index.bin").open("ab") as index:
        index.write(b"half a record")
    writer._index.close()  # as a kill does
    again = Writer(torn, META)
    assert [again.has(content_key(*sequence(seed)[:2])) for seed in range(5)] == [True, True, True, False, False]
    for seed in range(6):
        again.add(*sequence(seed))
    again.close()
    finish(torn, META, again.keys)
    for name in ("seq_ids", "seq_mask", "ids", "values", "tail", "index"):
        file = f"shard-00000/{name}.bin"
        assert (whole / file).read_bytes() == (torn / file).read_bytes(), name


def test_a_run_goes_on_with_fewer_processes_behind_what_a_kill_left(tmp_path):
    for rank, seeds in ((0, (0, 2)), (1, (1, 3))):
        writer = Writer(tmp_path, META, rank)
        for seed in seeds:
            writer.add(*sequence(seed))
        writer.close()
    with (tmp_path / "shard-00001" / "index.bin").open("ab") as index:
        index.write(b"half a record")
    with (tmp_path / "shard-00001" / "values.bin").open("ab") as values:
        values.write(b"torn")
    alone = Writer(tmp_path, META)
    for seed in range(6):
        alone.add(*sequence(seed))
    alone.close()
    assert finish(tmp_path, META, alone.keys).num_sequences == 6  # each once
    reader = Reader(tmp_path)
    for seed in range(6):
        assert np.array_equal(reader.get(*sequence(seed)[:2])["ids"], sequence(seed)[2]["ids"])


def test_the_first_rank_waits_for_a_slow_one(tmp_path):
    fast, slow = Writer(tmp_path, META, 0), Writer(tmp_path, META, 1)
    fast.add(*sequence(0))
    fast.close()
    wanted = {content_key(*sequence(seed)[:2]) for seed in (0, 1)}

    def work() -> None:
        slow.add(*sequence(1))
        slow.close()

    later = threading.Timer(0.8, work)
    later.start()
    assert not (tmp_path / "DONE").exists() and stored_keys(tmp_path, META) < wanted
    assert finish(tmp_path, META, wanted).num_sequences == 2
    later.join()


@pytest.mark.parametrize(
    "key", [key for key in IDENTITY if key not in ("format_version", "quantity", "k", "vocab_size")]
)
def test_another_meta_in_the_same_folder_is_refused(tmp_path, key):
    written(tmp_path / "c", range(2))
    with pytest.raises(ValueError, match=f"made with another .*{key}="):
        Writer(tmp_path / "c", replace(META, **{key: 0.5 if key in ("beta", "temperature", "mass") else "another"}))


def test_another_backend_is_named_before_what_comes_with_it(tmp_path: Path) -> None:
    begin(tmp_path / "CACHE", META)
    with pytest.raises(ValueError, match="made with another backend: backend='hf', this run has 'vllm'"):
        begin(tmp_path / "CACHE", replace(META, backend="vllm", precision="attention=vllm"))


def test_all_of_a_meta_but_counts_and_command_is_its_identity():
    assert {field.name for field in fields(Meta)} == {*IDENTITY, *NOT_IDENTITY}
    assert NOT_IDENTITY == ("num_sequences", "num_tokens", "command", "packing", "shards", "digest")


def test_the_mask_is_part_of_the_key():
    assert content_key([1, 2], [False, True]) != content_key([1, 2], [True, True])
    assert content_key([1, 2], [False, True]) == content_key(np.array([1, 2]), np.array([False, True]))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_meta_that_cannot_be_read_is_named(tmp_path, content):
    folder = written(tmp_path / "c", range(2))
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(ValueError, match="meta.json"):
        Reader(folder)
