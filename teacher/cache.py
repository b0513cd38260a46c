"""Teacher signals on disk: ragged top-k entries per response token, found by the content of the sequence.

    meta.json        what made the entries; a reader compares it with what it expects
    shard-0000r/     one writer's arrays: seq_ids, seq_mask, topk_ids, values, tail[, teacher_logps] and index.jsonl
    DONE             written last

A row of index.jsonl is written after its arrays, so whatever a killed writer left behind it is cut off on resume.
Knows no model. Letters: L supervised tokens of a sequence, K entries a token.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from settings.artifacts import is_done, mark_done, read_jsonl, whole_rows, write_json

FORMAT_VERSION = 1


class Entry(NamedTuple):
    """A sequence's entries: ids [L, K], values [L, K], tail [L] (mass outside the top k), teacher_logps [L, K] or
    None.
    """

    ids: np.ndarray
    values: np.ndarray
    tail: np.ndarray
    teacher_logps: np.ndarray | None


@dataclass(frozen=True)
class Meta:
    """What made a cache. Digests are of content, never of a path."""

    quantity: str
    k: int
    vocab_size: int
    teacher_digest: str
    reference_digest: str | None
    tokenizer_digest: str
    template_digest: str
    data_digest: str
    command: str
    temperature: float = 1.0
    dtype: str = "float16"
    format_version: int = FORMAT_VERSION
    num_sequences: int = 0
    num_tokens: int = 0
    backend: str = "hf"  # who computed the entries: hf or vllm


def content_key(ids: Sequence[int], response: Sequence[bool]) -> bytes:
    """Hash token ids and response mask to 16 bytes: the same text under another template or cut has another key."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.asarray(ids, dtype=np.int32).tobytes())
    digest.update(np.asarray(response, dtype=np.bool_).tobytes())
    return digest.digest()


_IDENTITY = (
    "format_version",
    "quantity",
    "k",
    "vocab_size",
    "temperature",
    "dtype",
    "teacher_digest",
    "reference_digest",
    "tokenizer_digest",
    "template_digest",
    "data_digest",
    "backend",
)


def _dtypes(meta: Mapping[str, Any]) -> dict[str, np.dtype]:
    ids = np.dtype(np.uint16 if meta["vocab_size"] <= 65536 else np.int32)
    found = {
        "seq_ids": np.dtype(np.int32),
        "seq_mask": np.dtype(np.bool_),
        "topk_ids": ids,
        "values": np.dtype(np.float16),
        "tail": np.dtype(np.float16),
    }
    if meta["quantity"] == "advantage":
        found["teacher_logps"] = np.dtype(np.float16)
    return found


def _mismatch(folder: Path, key: str, stored: object, wanted: object) -> str:
    return f"{folder}: the cache was made with {key}={stored!r}, this run has {wanted!r}. Make it again with task=cache"


class Writer:
    """Append sequences to shard `rank` of a cache; a killed writer goes on behind its last whole sequence."""

    def __init__(self, folder: Path | str, meta: Meta, rank: int = 0) -> None:
        self.folder, self.meta = Path(folder), meta
        self.shard = self.folder / f"shard-{rank:05d}"
        self.shard.mkdir(parents=True, exist_ok=True)
        self._check_meta()
        self.dtypes = _dtypes(asdict(meta))
        self.keys: set[bytes] = set()
        self.num_tokens = 0
        rows, index_bytes = self._whole_rows()
        lengths = [sum(r["n"] for r in rows), sum(r["l"] for r in rows)]
        self._streams = {}
        for name, dtype in self.dtypes.items():
            count = lengths[0] if name.startswith("seq_") else lengths[1] * (1 if name == "tail" else meta.k)
            path = self.shard / f"{name}.bin"
            path.touch()
            os.truncate(path, count * dtype.itemsize)
            self._streams[name] = path.open("ab")
        self._index = (self.shard / "index.jsonl").open("a", encoding="utf-8")
        self._index.truncate(index_bytes)  # cut, not written anew: a kill here must not lose what is whole
        for row in rows:
            self.keys.add(bytes.fromhex(row["key"]))
            self.num_tokens += row["l"]
        self._pending: list[str] = []

    def _check_meta(self) -> None:
        path = self.folder / "meta.json"
        if path.is_file():
            stored = {"backend": "hf", **json.loads(path.read_text(encoding="utf-8"))}  # older caches do not say
            for key in _IDENTITY:
                if stored[key] != getattr(self.meta, key):
                    raise ValueError(_mismatch(self.folder, key, stored[key], getattr(self.meta, key)))
        else:
            write_json(path, asdict(self.meta))

    def _whole_rows(self) -> tuple[list[dict[str, Any]], int]:
        """Return the index rows whose arrays are all there, and their bytes in the index."""
        path = self.shard / "index.jsonl"
        rows: list[dict[str, Any]] = []
        size = 0
        if not path.is_file():
            return rows, size
        sizes = {n: (self.shard / f"{n}.bin").stat().st_size // d.itemsize for n, d in self.dtypes.items()}
        tokens = length = 0
        for row, end in whole_rows(path):
            tokens, length = tokens + row["n"], length + row["l"]
            if tokens > sizes["seq_ids"] or length > sizes["tail"] or length * self.meta.k > sizes["values"]:
                break
            rows.append(row)
            size = end
        return rows, size

    def has(self, key: bytes) -> bool:
        """Say whether a sequence is written."""
        return key in self.keys

    def add(
        self,
        ids: Sequence[int],
        response: Sequence[bool],
        topk_ids: np.ndarray,
        values: np.ndarray,
        tail: np.ndarray,
        teacher_logps: np.ndarray | None = None,
    ) -> None:
        """Append one sequence's entries: topk_ids [L, K], values [L, K], tail [L]."""
        length = int(np.sum(response))
        if topk_ids.shape != (length, self.meta.k) or values.shape != topk_ids.shape or tail.shape != (length,):
            raise ValueError(
                f"a sequence with {length} supervised tokens needs entries [{length}, {self.meta.k}], "
                f"got ids {topk_ids.shape}, values {values.shape}, tail {tail.shape}"
            )
        key = content_key(ids, response)
        if key in self.keys:
            return
        arrays = {"seq_ids": ids, "seq_mask": response, "topk_ids": topk_ids, "values": values, "tail": tail}
        if "teacher_logps" in self.dtypes:
            assert teacher_logps is not None, "an advantage cache stores the aligned teacher's log-probabilities, too"
            arrays["teacher_logps"] = teacher_logps
        for name, array in arrays.items():
            self._streams[name].write(np.ascontiguousarray(array, dtype=self.dtypes[name]).tobytes())
        self._pending.append(json.dumps({"key": key.hex(), "n": len(ids), "l": length}))
        self.keys.add(key)
        self.num_tokens += length

    def flush(self) -> None:
        """Put what was added on disk, arrays before index."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        self._index.write("".join(row + "\n" for row in self._pending))
        self._index.flush()
        self._pending = []

    def close(self) -> None:
        """Flush and close this shard; `finish` makes the cache readable."""
        self.flush()
        for stream in [*self._streams.values(), self._index]:
            stream.close()


def finish(folder: Path | str) -> Meta:
    """Count the shards into meta.json and write DONE."""
    folder = Path(folder)
    stored = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    rows = [row for file in sorted(folder.glob("shard-*/index.jsonl")) for row in read_jsonl(file)]
    stored.update(num_sequences=len(rows), num_tokens=sum(r["l"] for r in rows))
    write_json(folder / "meta.json", stored)
    mark_done(folder)
    return Meta(**stored)


class _Shard:
    """Memory-mapped arrays of one shard with the place of every sequence."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.k = int(meta["k"])
        self.arrays = {
            n: np.memmap(folder / f"{n}.bin", d, "r") if (folder / f"{n}.bin").stat().st_size else np.empty(0, d)
            for n, d in _dtypes(meta).items()
        }
        self.places: dict[bytes, tuple[int, int, int, int]] = {}
        token = length = 0
        for row in read_jsonl(folder / "index.jsonl"):
            self.places[bytes.fromhex(row["key"])] = (token, row["n"], length, row["l"])
            token, length = token + row["n"], length + row["l"]

    def entry(self, key: bytes) -> Entry:
        """Read the entries of a sequence."""
        _, _, start, count = self.places[key]

        def part(name: str, width: int) -> np.ndarray:
            flat = self.arrays[name][start * width : (start + count) * width]
            return np.asarray(flat).reshape(count, width)

        logps = part("teacher_logps", self.k).astype(np.float32) if "teacher_logps" in self.arrays else None
        return Entry(
            part("topk_ids", self.k).astype(np.int64),
            part("values", self.k).astype(np.float32),
            part("tail", 1)[:, 0].astype(np.float32),
            logps,
        )

    def sequence(self, key: bytes) -> tuple[list[int], list[bool]]:
        """Read the ids and mask of a sequence."""
        start, count, _, _ = self.places[key]
        return self.arrays["seq_ids"][start : start + count].tolist(), self.arrays["seq_mask"][
            start : start + count
        ].tolist()


class Reader:
    """Find a sequence's entries by the ids that the trainer itself made; anything else is refused and shown."""

    def __init__(
        self,
        folder: Path | str,
        expected: Mapping[str, object] | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.folder, self.decode = Path(folder).expanduser(), decode
        if not is_done(self.folder):
            state = (
                "is not finished (no DONE): run the same task=cache command again"
                if self.folder.is_dir()
                else "does not exist"
            )
            raise ValueError(f"teacher cache {self.folder} {state}")
        stored = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        for key, wanted in {"format_version": FORMAT_VERSION, **(expected or {})}.items():
            if stored[key] != wanted:
                raise ValueError(_mismatch(self.folder, key, stored[key], wanted))
        self.meta = Meta(**stored)
        self.shards = [_Shard(f, stored) for f in sorted(self.folder.glob("shard-*"))]

    def get(self, ids: Sequence[int], response: Sequence[bool]) -> Entry:
        """Return the entries of a sequence; ValueError shows the first difference from the nearest cached one."""
        key = content_key(ids, response)
        for shard in self.shards:
            if key in shard.places:
                return shard.entry(key)
        raise ValueError(self._explain(list(ids), list(response)))

    def sequences(self, limit: int) -> list[tuple[list[int], list[bool]]]:
        """Return the ids and response masks of up to `limit` sequences, spread evenly over the cache."""
        places = [(shard, key) for shard in self.shards for key in shard.places]
        return [shard.sequence(key) for shard, key in places[:: max(1, -(-len(places) // max(1, limit)))][:limit]]

    def coverage(self, keys: Iterable[bytes]) -> float:
        """Return the share of the keys that are cached."""
        wanted = list(keys)
        return sum(any(k in s.places for s in self.shards) for k in wanted) / max(1, len(wanted))

    def _explain(self, ids: list[int], response: list[bool]) -> str:
        best: tuple[int, list[int], list[bool]] = (-1, [], [])
        for shard in self.shards:
            for key in shard.places:
                other, mask = shard.sequence(key)
                common = next(
                    (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other))
                )
                if common > best[0]:
                    best = (common, other, mask)
        common, other, mask = best
        show = self.decode or str
        what = "another template, tokenizer, truncation or data set"
        if ids == other:
            what = "the same ids with another supervised part"
        elif common == min(len(ids), len(other)):
            what = f"the nearest cached sequence has {len(other)} tokens, this one {len(ids)}: another truncation?"
        return (
            f"{self.folder} has no entries for a sequence of {len(ids)} tokens ({what}). It agrees with the nearest "
            f"cached one for {common} tokens, then\n"
            f"  this run: {show(ids[max(0, common - 8) : common])!r} + {show(ids[common : common + 12])!r}\n"
            f"  cached:   {show(other[max(0, common - 8) : common])!r} + {show(other[common : common + 12])!r}\n"
            "Make the cache again with task=cache on the same data, model.tokenizer_name_or_path, model.max_length and "
            "model.max_prompt_length"
        )
