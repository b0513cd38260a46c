"""Packed entries come back: ids exactly, probabilities to their levels; padding changes no loss and no gradient."""

import importlib.util
import json
import os
import shutil
import time
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
from teacher.cache import Meta, Reader, Writer, _meta_digest, finish
from teacher.codec import LEVELS, STEPS, decode, encode, kept
from teacher.entries import expected_advantage, support_mass, topk_kl
from teacher.shard import BLOCK, RECORD, Checked, Index, keys_of
from tests.support.helpers import ROOT, composed, write_pairs

META = Meta("logprob", 8, 1000, "teacher", None, "tokenizer", "template", "data", "float32", codec="compact", mass=0.99)


def distributions(rng: np.random.Generator, length: int, k: int, vocab: int, kind: str):
    """Return ids [L, K] of the most probable and their log-probabilities [L, K], descending."""
    if kind == "one_hot":
        p = np.full((length, vocab), 1e-9)
        p[np.arange(length), rng.integers(0, vocab, length)] = 1
    elif kind == "ties":
        p = rng.integers(1, 3, (length, vocab)).astype(float)
    else:
        p = rng.dirichlet(np.full(vocab, {"flat": 10.0, "sharp": 0.01}[kind]), length) + 1e-12
    logps = np.log(p / p.sum(1, keepdims=True))
    ids = np.argsort(-logps, axis=1)[:, :k]
    return ids, np.take_along_axis(logps, ids, 1).astype(np.float32)


@pytest.mark.parametrize("kind", ["flat", "sharp", "ties", "one_hot"])
@pytest.mark.parametrize(("length", "k", "vocab"), [(40, 1, 60), (30, 12, 300), (3, 300, 70_000), (0, 5, 60)])
@pytest.mark.parametrize("mass", [0.9, 0.999, 1.0])
def test_what_was_packed_comes_back(kind, length, k, vocab, mass):
    rng = np.random.default_rng(length + k)
    ids, logps = distributions(rng, length, k, vocab, kind)
    advantages = rng.normal(0, 0.1, (length, k)).astype(np.float32) * rng.integers(0, 2, (length, 1))
    packed = encode(ids, logps, advantages, mass)
    assert packed == encode(ids, logps, advantages, mass)
    found, counts = decode(packed, length, k, True), kept(logps.astype(float), mass)
    there = np.arange(k) < counts[:, None]
    assert ((found["logps"] > -np.inf) == there).all() and (found["advantages"][~there] == 0).all()
    assert (found["logps"][:, 1:] <= found["logps"][:, :-1]).all()  # the most probable first
    for token in range(length):
        n, names = counts[token], ("ids", "logps", "advantages")
        back = {i: (p, a) for i, p, a in zip(*(found[name][token][:n] for name in names), strict=True)}
        scale = np.abs(advantages[token]).max()
        assert set(found["ids"][token][:n].tolist()) == set(ids[token][:n].tolist())
        held = np.exp(logps[token][:n].astype(float)).sum()
        assert np.exp(found["logps"][token][:n].astype(float)).sum() == pytest.approx(min(held, 1), rel=6e-3)
        assert found["tail"][token] == pytest.approx(max(0, 1 - held), rel=6e-3, abs=2e-6)
        for i, p, a in zip(ids[token][:n], logps[token][:n], advantages[token][:n], strict=True):
            assert abs(back[i][1] - a) <= 0.51 * scale * 1.001 / STEPS
            assert np.exp(back[i][0] / 2) == pytest.approx(np.exp(p / 2), abs=2 / LEVELS, rel=0.06 if n > 1 else 0.003)


def test_bytes_do_not_change():
    """Written caches stay readable: these bytes are those of format 3 (docs/cache_format.md)."""
    ids, logps = np.array([[7, 2, 300]]), np.log(np.array([[0.5, 0.25, 0.125]]))
    packed = encode(ids, logps, np.array([[1.0, -0.5, 0.0]]), 1.0)
    assert packed.hex() == "0306060846b0003c08493fd1a00ff000c2948c"
    np.testing.assert_allclose(decode(packed, 1, 3, True)["advantages"], [[1.0, -0.5, 0.0]])


def test_an_id_twice_is_refused():
    with pytest.raises(ValueError, match="an id twice"):
        encode(np.array([[4, 4]]), np.log(np.array([[0.5, 0.4]])), None, 1.0)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_padding_changes_no_loss_and_no_gradient(tail):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(6, 40)))
    ids, logps = (torch.from_numpy(part) for part in distributions(rng, 6, 4, 40, "flat"))
    advantages = torch.from_numpy(rng.normal(size=(6, 4)))
    wide = torch.nn.functional.pad
    padded = wide(ids, (0, 3)), wide(logps, (0, 3), value=-torch.inf), wide(advantages, (0, 3))

    def found(ids, logps, advantages):
        leaf = logits.clone().requires_grad_()
        parts = topk_kl(leaf, ids, logps, tail), expected_advantage(leaf, ids, advantages)
        gradients = [torch.autograd.grad(part.sum(), leaf, retain_graph=True)[0] for part in parts]
        return [*parts, *gradients, support_mass(logits, ids, logps)]

    for one, other in zip(found(ids, logps, advantages), found(*padded), strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


# ---- the files


def rows(seeds, meta=META):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        ids, logps = distributions(rng, 5, meta.k, meta.vocab_size, "sharp" if seed % 2 else "flat")
        arrays = {"ids": ids, "values": logps, "tail": 1 - np.exp(logps).sum(1)}
        yield rng.integers(0, meta.vocab_size, 9).tolist(), [False] * 4 + [True] * 5, arrays


def written(folder: Path, seeds, meta=META, ranks=1) -> Path:
    keys = set()
    for rank in range(ranks):
        writer = Writer(folder, meta, rank)
        for row in rows([s for s in seeds if s % ranks == rank], meta):
            writer.add(*row)
            writer.flush()
        writer.close()
        keys |= writer.keys
    finish(folder, meta, keys)
    return folder


def read_all(folder: Path) -> None:
    """Read every sequence, as a run does."""
    reader = Reader(folder)
    for ids, mask in reader.sequences(1000):
        reader.get(ids, mask)


@pytest.mark.parametrize("codec", ["compact", "none"])
def test_a_killed_writer_ends_with_the_same_bytes(tmp_path, codec):
    meta = replace(META, codec=codec, mass=0.99 if codec == "compact" else 1.0)
    whole, torn = written(tmp_path / "whole", range(6), meta), tmp_path / "torn"
    writer = Writer(torn, meta)
    for seed, row in enumerate(rows(range(5), meta)):
        writer.add(*row)
        if seed < 3:
            writer.flush()
    for stream in writer._streams.values():  # arrays reach the disk, the records do not: a kill in between
        stream.flush()
    with (torn / "shard-00000" / "index.bin").open("ab") as index:
        index.write(b"half a record")
    writer._index.close()  # as a kill does
    written(torn, range(6), meta)
    for path in whole.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (torn / path.relative_to(whole)).read_bytes(), path


def test_meta_says_what_packing_cost(tmp_path):
    packing = Reader(written(tmp_path, range(20))).meta.packing
    assert 1 <= packing["entries_per_token"] <= 8 and 0 <= packing["kl"] < 1e-3
    assert 0 < packing["logp_error_mean"] < packing["logp_error_max"] < 0.5 and packing["advantage_error_max"] == 0


@pytest.mark.parametrize("name", ["packed.bin", "seq_ids.bin", "seq_mask.bin", "index.bin", "index.sorted"])
@pytest.mark.parametrize("how", ["changed", "truncated", "longer", "missing", "swapped"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, how):
    folder = written(tmp_path / "c", range(8), ranks=2)
    path = folder / "shard-00001" / name
    data = path.read_bytes()
    if how == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "truncated":
        os.truncate(path, len(data) - 1)
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "missing":
        path.unlink()
    else:
        other = written(tmp_path / "other", range(100, 108), ranks=2) / "shard-00001" / name
        if other.read_bytes() == data:  # every mask is the same here
            return
        shutil.copy(other, path)
    with pytest.raises(ValueError, match=rf"shard-00001/{name} is not the file that was written"):
        read_all(folder)
    with pytest.raises(ValueError, match=rf"shard-00001/{name} is not the file that was written"):
        Reader(folder).verify()


@pytest.mark.parametrize("how", ["foreign", "exchanged", "missing", "edited", "meta"])
def test_a_foreign_shard_and_an_edited_meta_are_refused(tmp_path, how):
    folder = written(tmp_path / "c", range(8), ranks=2)
    other, shard = written(tmp_path / "other", range(100, 108), ranks=3), folder / "shard-00001"
    if how == "foreign":
        shutil.copytree(other / "shard-00002", folder / "shard-00002")
    elif how == "exchanged":
        shutil.rmtree(shard)
        shutil.copytree(other / "shard-00001", shard)
    elif how == "missing":
        shutil.rmtree(shard)
    elif how == "edited":
        path = shard / "shard.json"
        path.write_text(path.read_text().replace('"k": 8', '"k": 9'))
    else:
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_tokens": 7}))
    with pytest.raises(ValueError, match="is not the file that was written"):
        Reader(folder)


def test_shards_may_have_another_codec_and_another_k(tmp_path):
    """A reader widens every entry to the largest K; here a shard of four float16 entries is put into another cache."""
    few = replace(META, k=4, codec="none", mass=1.0)
    folder, other = written(tmp_path / "c", range(3)), written(tmp_path / "other", range(10, 13), few)
    shutil.copytree(other / "shard-00000", folder / "shard-00007")
    meta = json.loads((folder / "meta.json").read_text())
    meta["shards"]["shard-00007"] = json.loads((other / "meta.json").read_text())["shards"]["shard-00000"]
    meta["num_sequences"] += 3
    (folder / "meta.json").write_text(json.dumps(meta | {"digest": _meta_digest(meta)}))
    reader = Reader(folder)
    for seed, (ids, mask, arrays) in zip([0, 10], [*rows([0]), *rows([10], few)], strict=True):
        found = reader.get(ids, mask)
        assert found["ids"].shape == (5, 8) and found["ids"].dtype == np.int64 and found["values"].dtype == np.float32
        if seed == 10:
            np.testing.assert_array_equal(found["values"][:, :4], arrays["values"].astype(np.float16))
            assert np.isneginf(found["values"][:, 4:]).all() and (found["ids"][:, 4:] == 0).all()
    assert len(reader.sequences(100)) == 6


def test_an_index_of_a_hundred_million_tokens_opens_at_once(tmp_path):
    size = 303_030  # sequences of 330 tokens
    records = np.zeros(size, RECORD)
    records["high"] = np.random.default_rng(0).integers(0, 2**63, size)
    records["high"][1] = records["high"][0]  # two keys that share their first half
    records["low"] = np.arange(size)
    records["responses"] = np.arange(1, size + 1) * 330
    order = np.argsort(records["high"], kind="stable")
    (tmp_path / "index.bin").write_bytes(records.tobytes())
    ordered = records["high"][order].astype("<u8").tobytes() + order.astype("<u4").tobytes()
    (tmp_path / "index.sorted").write_bytes(ordered)
    packed = tmp_path / "packed.bin"
    packed.touch()
    os.truncate(packed, 100 * 330 * size)  # 10 GB, sparse
    sums = []
    for name in ("index.bin", "index.sorted"):
        data = (tmp_path / name).read_bytes()
        sums.append(np.array([zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)], np.uint32))
    zeros = np.full(-(-packed.stat().st_size // BLOCK), zlib.crc32(bytes(BLOCK)), np.uint32)
    wanted = keys_of(records[[0, 1, 77, size - 1]])
    tracemalloc.start()
    started = time.perf_counter()
    index = Index(
        Checked(tmp_path / "index.bin", 64 * size, sums[0]), Checked(tmp_path / "index.sorted", 12 * size, sums[1])
    )
    blob = Checked(packed, packed.stat().st_size, zeros)
    assert index.find([*wanted, bytes(16)]).tolist() == [0, 1, 77, size - 1, -1]
    assert index.span(1, "responses") == (330, 660) and not blob.read(5 * 10**9, 5 * 10**9 + 9).any()
    assert time.perf_counter() - started < 1 and tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


# ---- through the command line


def test_forty_lines_without_ours_read_what_task_cache_wrote(tmp_path):
    path = ROOT / "docs" / "read_cache.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and "teacher.cache" not in text
    spec = importlib.util.spec_from_file_location("read_cache", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    common = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", "task=cache"]
    launch.run_task(composed("task=train", *common[:-1], "exp_name=sft", "n_steps=1", "lr=1e-3"))
    reference = f"cache.reference={tmp_path}/sft/FINAL"
    for codec in ("compact", "none"):
        for name, second in (("logprob", []), ("advantage", [reference])):
            own = [
                f"exp_name={codec}_{name}",
                f"cache.codec={codec}",
                "cache.top_k=300" if not second else "cache.top_k=6",
            ]
            own = [part.replace("300", "9") for part in own]
            launch.run_task(composed(*common, *own, *second))
            folder = tmp_path / f"{codec}_{name}" / "CACHE"
            reader, seen = Reader(folder), 0
            for ids, mask, tokens in program.read(folder):
                entry = reader.get(ids.tolist(), mask.tolist())
                logps = entry["teacher_logps" if second else "values"]
                assert len(tokens) == len(logps)
                for t, (own_ids, own_logps, *advantages) in enumerate(tokens):
                    found = {i: t for t, i in enumerate(own_ids.tolist())}
                    there = logps[t] > -np.inf
                    order = [found[i] for i in entry["ids"][t][there].tolist()]
                    assert len(order) == len(own_ids)
                    np.testing.assert_allclose(np.asarray(own_logps)[order], logps[t][there], rtol=1e-6)
                    for part in advantages:
                        np.testing.assert_allclose(np.asarray(part)[order], entry["values"][t][there], rtol=1e-6)
                seen += 1
            assert seen == reader.meta.num_sequences == 8


def test_renormalizing_over_as_many_entries_as_hold_the_mass_is_refused(tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 3)
    common = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    launch.run_task(composed(*common, "exp_name=cache", "task=cache", "cache.top_k=6", "cache.codec=compact"))
    dckd = ["loss=dckd", f"loss.teacher_cache={tmp_path}/cache/CACHE", "loss.tail=renormalize"]
    with pytest.raises(ValueError, match=r"loss.tail=renormalize.*cache.mass=1"):
        launch.run_task(composed(*common, *dckd))
