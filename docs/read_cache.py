"""Read a cache of logprob or advantage with numpy alone: read(Path("CACHE")) (docs/cache_format.md)."""

import io
import json

import numpy as np

RECORD = [("key", "V16"), ("ends", "<u8", 3), ("entries", "<u4"), ("errors", "<f4", 5)]


def unpack(blob, length, k, wide):
    """Yield the entries of each token, ascending in ids: ids, log-probs (, advantages)."""
    take = lambda n, dtype: np.frombuffer(blob.read(int(n) * np.dtype(dtype).itemsize), dtype).astype(float)  # noqa: E731
    counts, kinds = take(length, "u1" if k <= 255 else "<u2").astype(int), 2 + wide
    widths, held = take(kinds * length, "u1").reshape(length, kinds).astype(int), take(length, "<f2")
    scales, low = take(length * wide, "<f2"), np.repeat(widths, counts, axis=0).T.ravel()
    bits = np.unpackbits(take((low.sum() + 7) // 8, "u1").astype("u1"))
    lows = [int("0" + "".join(map(str, bits[end - w : end])), 2) for end, w in zip(low.cumsum(), low, strict=True)]
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(blob.read(), "u1")))
    numbers = ((np.diff(ones, prepend=-1) - 1) * 2**low + np.array(lows, int)).reshape(kinds, -1)
    for t, (gaps, levels, *steps) in enumerate(np.split(numbers, counts.cumsum()[:-1], axis=1)):
        p = (levels + 1.0) ** 2
        signed = [np.where(n % 2, n + 1, -n) / 2 / 512 * scales[t] for n in steps]
        yield ((gaps + 1).cumsum() - 1, np.log(p / p.sum()) + held[t], *signed)


def read(folder):
    """Yield the ids and the mask of each sequence, and the entries of its response tokens."""
    meta = json.loads((folder / "meta.json").read_text())
    small, wide = "<u2" if meta["vocab_size"] <= 65536 else "<i4", meta["quantity"] == "advantage"
    for shard in (folder / name for name in sorted(meta["shards"])):
        k, start = json.loads((shard / "shard.json").read_text())["k"], np.zeros(3, int)
        kinds = {"ids": small, "teacher_logps": "<f2", "values": "<f2"}
        load = {f.stem: np.memmap(f, (kinds | {"seq_ids": small}).get(f.stem, "u1"), "r") for f in shard.glob("*.bin")}
        for end in np.fromfile(shard / "index.bin", RECORD)["ends"].astype(int):
            (n, m), (a, b), (c, d) = zip(start, end, strict=True)
            raw = zip(*(load[x].reshape(-1, k)[a:b] for x in kinds if x in load), strict=True)
            entries = unpack(io.BytesIO(load["packed"][c:d]), b - a, k, wide) if "packed" in load else raw
            yield load["seq_ids"][n:m], load["seq_mask"][n:m].astype(bool), list(entries)
            start = end
