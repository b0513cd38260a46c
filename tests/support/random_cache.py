"""A cache of random sequences and entries, and whether two caches hold the same."""

from pathlib import Path

import numpy as np

from teacher.cache import Arrays, Meta, Reader, Writer, content_key, finish
from teacher.interchange import Tokenizing
from teacher.quantities import quantity_named

SIZE, K = 300, 5
META = dict(vocab_size=SIZE, teacher_digest="t", tokenizer_digest="tok", template_digest="tem", data_digest="")
TOKENIZING = Tokenizing(SIZE, lambda ids: [None if i == 299 else str(i) for i in ids], "tok", "tem")


def entries(rng: np.random.Generator, length: int, quantity: str) -> Arrays:
    """Draw the arrays of a sequence, as float16 holds them."""
    logits = rng.normal(0, 2, (length, SIZE))
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logps)[:, :K]
    top = np.take_along_axis(logps, ids, -1).astype(np.float16).astype(np.float32)
    tail = (1 - np.exp(top).sum(-1)).astype(np.float16).astype(np.float32)
    if quantity == "logprob":
        return {"ids": ids, "values": top, "tail": tail}
    if quantity == "advantage":
        advantages = rng.normal(0, 1, top.shape).astype(np.float16).astype(np.float32)
        return {"ids": ids, "values": advantages, "tail": tail, "teacher_logps": top}
    return {quantity_named(quantity).arrays[0].name: rng.normal(0, 1, length).astype(np.float32)}


def write_cache(folder: Path, quantity: str = "logprob", count: int = 7) -> Reader:
    """Write a cache of random sequences."""
    rng = np.random.default_rng(0)
    two = quantity == "advantage"
    meta = Meta(quantity=quantity, k=K, precision="float32", reference_digest="r" if two else None, **META)
    writer = Writer(folder, meta)
    for _ in range(count):
        prompt, said = int(rng.integers(1, 5)), int(rng.integers(1, 6))
        ids = rng.integers(0, 299, prompt + said).tolist()
        writer.add(ids, [False] * prompt + [True] * said, entries(rng, said, quantity))
    writer.close()
    finish(folder, meta, writer.keys)
    return Reader(folder)


def assert_same(one: Reader, other: Reader, tail_error: float) -> None:
    """Compare the keys and, token by token, the entries of two caches, whatever their order."""
    rows = one.sequences(one.meta.num_sequences)
    assert other.meta.num_sequences == len(rows) and other.meta.num_tokens == one.meta.num_tokens
    for ids, mask in rows:
        assert other.holds(content_key(ids, mask))
        found, expected = other.get(ids, mask), one.get(ids, mask)
        for name in expected:
            wide = name != "tail" and expected[name].ndim == 2
            sides = [
                np.take_along_axis(a[name], np.argsort(a["ids"]), -1) if wide else a[name] for a in (found, expected)
            ]
            np.testing.assert_allclose(*sides, rtol=0, atol=tail_error if name == "tail" else 0)
