"""Teacher signals on disk: ragged arrays of a quantity per response token, found by the content of the sequence.

    meta.json        what made the entries; a reader compares it with what it expects
    shard-0000r/     one writer's arrays: seq_ids, seq_mask, those of the quantity (quantities.py), and index.jsonl
    DONE             written last

A row of index.jsonl is written after its arrays, so whatever a killed writer left behind it is cut off on resume.
Knows no model. Letters: L supervised tokens of a sequence, K entries a token.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples import content_key as content_key  # numpy alone; a cache's keys are those of the rows
from settings.artifacts import is_done, mark_done, read_jsonl, remove_parts, whole_rows, write_json
from teacher.quantities import Array, quantity_named

FORMAT_VERSION = 2
SEQUENCE = (Array("seq_ids", "int32", False), Array("seq_mask", "bool", False))  # an entry a token of the sequence
POLL_SECONDS = 0.5

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Meta:
    """What made a cache. Digests are of content, never of a path. Everything but NOT_IDENTITY changes the values."""

    quantity: str
    k: int  # 0 where the quantity has no K entries
    vocab_size: int
    teacher_digest: str
    reference_digest: str | None
    tokenizer_digest: str
    template_digest: str
    data_digest: str
    precision: str  # the numeric path: dtypes of weights, computing and last layer, attention
    beta: float = 1.0
    temperature: float = 1.0
    backend: str = "hf"  # who computed the entries: hf or vllm
    format_version: int = FORMAT_VERSION
    num_sequences: int = 0
    num_tokens: int = 0
    command: str = ""


NOT_IDENTITY = ("num_sequences", "num_tokens", "command")
IDENTITY = tuple(field.name for field in fields(Meta) if field.name not in NOT_IDENTITY)
NOUNS = {"teacher_digest": "model", "reference_digest": "reference model"}  # where the key's own words say less


def data_digest(keys: Iterable[bytes]) -> str:
    """Hash a set of sequences by their keys."""
    return hashlib.sha256(b"".join(sorted(set(keys)))).hexdigest()[:16]


def read_meta(folder: Path, expected: Mapping[str, object]) -> dict[str, Any]:
    """Read meta.json; ValueError for another format, or if it is not what is expected."""
    stored = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version={stored.get('format_version')!r} of a teacher cache, this version reads "
            f"{FORMAT_VERSION}: remove the folder and make it again (task=cache, or cache_reference_logprobs=true)"
        )
    for key, wanted in expected.items():
        if stored[key] != wanted:
            noun = NOUNS.get(key, key.removesuffix("_digest").replace("_", " "))
            raise ValueError(
                f"{folder}: the cache was made with another {noun}: {key}={stored[key]!r}, this run has {wanted!r}. "
                "Make it again with task=cache"
            )
    return stored


class _File(NamedTuple):
    """A file of a shard: the shape of one token's entry, for every token of a sequence or for those of the response."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    whole: bool

    def size(self, tokens: int, responses: int) -> int:
        """Return how many numbers it holds for so many tokens, of them so many in responses."""
        return (tokens if self.whole else responses) * math.prod(self.shape)


def _files(meta: Mapping[str, Any]) -> list[_File]:
    """List the files of a shard of this cache."""
    size, k = int(meta["vocab_size"]), int(meta["k"])
    own = quantity_named(str(meta["quantity"])).arrays
    return [_File(a.name, a.dtype_for(size), (), True) for a in SEQUENCE] + [
        _File(a.name, a.dtype_for(size), (k,) if a.wide else (), False) for a in own
    ]


def _whole_rows(shard: Path, files: list[_File]) -> tuple[list[dict[str, Any]], int]:
    """Return the index rows whose arrays are all there, and their bytes in the index."""
    path = shard / "index.jsonl"
    rows: list[dict[str, Any]] = []
    size = tokens = responses = 0
    if not path.is_file():
        return rows, size
    indexed = list(whole_rows(path))  # before the sizes: another process may be writing
    there = {f.name: (shard / f"{f.name}.bin").stat().st_size // f.dtype.itemsize for f in files}
    for row, end in indexed:
        tokens, responses = tokens + row["n"], responses + row["l"]
        if any(there[f.name] < f.size(tokens, responses) for f in files):
            break
        rows.append(row)
        size = end
    return rows, size


def stored_keys(folder: Path | str, meta: Meta) -> set[bytes]:
    """Return the keys of all sequences that are whole on disk, whoever wrote them."""
    files, shards = _files(asdict(meta)), sorted(Path(folder).glob("shard-*"))
    return {bytes.fromhex(row["key"]) for shard in shards for row in _whole_rows(shard, files)[0]}


def begin(folder: Path, meta: Meta) -> None:
    """Write meta.json, or compare with the one there: ValueError names what differs."""
    path, identity = folder / "meta.json", {key: getattr(meta, key) for key in IDENTITY}
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with suppress(FileNotFoundError):  # a process of another machine, with our number, was first
            write_json(path, asdict(meta))
    read_meta(folder, identity)


class Writer:
    """Append sequences to shard `rank` of a cache; a killed writer goes on behind its last whole sequence.

    What another shard holds is not written again: a run may go on with another number of processes.
    """

    def __init__(self, folder: Path | str, meta: Meta, rank: int = 0) -> None:
        self.folder, self.meta = Path(folder), meta
        self.shard = self.folder / f"shard-{rank:05d}"
        begin(self.folder, meta)
        self.shard.mkdir(exist_ok=True)
        self.files = _files(asdict(meta))
        rows, index_bytes = _whole_rows(self.shard, self.files)
        self.keys = stored_keys(self.folder, meta)
        num_tokens, num_responses = sum(row["n"] for row in rows), sum(row["l"] for row in rows)
        self._streams = {}
        for file in self.files:
            path = self.shard / f"{file.name}.bin"
            path.touch()
            os.truncate(path, file.size(num_tokens, num_responses) * file.dtype.itemsize)
            self._streams[file.name] = path.open("ab")
        self._index = (self.shard / "index.jsonl").open("a", encoding="utf-8")
        self._index.truncate(index_bytes)  # cut, not written anew: a kill here must not lose what is whole
        self._pending: list[str] = []

    def has(self, key: bytes) -> bool:
        """Say whether a sequence is written."""
        return key in self.keys

    def add(self, ids: Sequence[int], response: Sequence[bool], arrays: Mapping[str, np.ndarray]) -> None:
        """Append one sequence with the quantity's arrays, [L, K] or [L] each."""
        key = content_key(ids, response)
        if key in self.keys:
            return
        length = int(np.sum(response))
        given = {"seq_ids": ids, "seq_mask": response, **arrays}
        if set(given) != set(self._streams):
            raise ValueError(f"{self.meta.quantity} has the arrays {sorted(self._streams)}, got {sorted(given)}")
        found = {file.name: np.ascontiguousarray(given[file.name], dtype=file.dtype) for file in self.files}
        for file in self.files:
            wanted, shape = (len(ids) if file.whole else length, *file.shape), found[file.name].shape
            if shape != wanted:
                raise ValueError(f"a sequence with {length} supervised tokens needs {file.name} {wanted}, got {shape}")
        for name, array in found.items():
            self._streams[name].write(array.tobytes())
        self._pending.append(json.dumps({"key": key.hex(), "n": len(ids), "l": length}))
        self.keys.add(key)

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


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what another process writes. No collective: whoever is slow runs into no timeout of a process group."""
    while True:
        started = time.monotonic()
        if condition():
            return
        time.sleep(max(POLL_SECONDS, 5 * (time.monotonic() - started)))


def finish(folder: Path | str, meta: Meta, keys: set[bytes]) -> Meta:
    """Wait until all shards together hold the keys, count them into meta.json and write DONE; one process calls it."""
    folder = Path(folder)
    wait_for(lambda: keys <= stored_keys(folder, meta))
    for shard in folder.glob("shard-*"):
        Writer(folder, meta, int(shard.name.removeprefix("shard-"))).close()  # cuts what a kill left behind
    files = _files(asdict(meta))
    rows = [row for shard in folder.glob("shard-*") for row in _whole_rows(shard, files)[0]]
    counted = replace(meta, num_sequences=len(rows), num_tokens=sum(r["l"] for r in rows))
    write_json(folder / "meta.json", asdict(counted))
    remove_parts(folder, "meta.json")
    mark_done(folder)
    return counted


class _Shard:
    """Memory-mapped arrays of one shard with the place of every sequence."""

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.files = _files(meta)
        self.arrays = {f.name: _mapped(folder / f"{f.name}.bin", f) for f in self.files}
        self.places: dict[bytes, tuple[int, int, int, int]] = {}
        token = length = 0
        for row in read_jsonl(folder / "index.jsonl"):
            self.places[bytes.fromhex(row["key"])] = (token, row["n"], length, row["l"])
            token, length = token + row["n"], length + row["l"]

    def entry(self, key: bytes) -> Arrays:
        """Read the arrays of a sequence: ids as int64, numbers as float32."""
        _, _, start, count = self.places[key]
        own = [(f, self.arrays[f.name][start : start + count]) for f in self.files if not f.whole]
        return {f.name: part.astype(np.float32 if f.dtype.kind == "f" else np.int64) for f, part in own}

    def sequence(self, key: bytes) -> tuple[list[int], list[bool]]:
        """Read the ids and mask of a sequence."""
        start, count, _, _ = self.places[key]
        ids, mask = (self.arrays[name][start : start + count].tolist() for name in ("seq_ids", "seq_mask"))
        return ids, mask


def _mapped(path: Path, file: _File) -> np.ndarray:
    """Map a file of a shard as [tokens, *shape]; an empty one cannot be mapped."""
    flat = np.memmap(path, file.dtype, "r") if path.stat().st_size else np.empty(0, file.dtype)
    return flat.reshape(-1, *file.shape)


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
                "is not finished (no DONE): run the same command again" if self.folder.is_dir() else "does not exist"
            )
            raise ValueError(f"teacher cache {self.folder} {state}")
        stored = read_meta(self.folder, expected or {})
        self.meta = Meta(**stored)
        self.shards = [_Shard(f, stored) for f in sorted(self.folder.glob("shard-*"))]

    def get(self, ids: Sequence[int], response: Sequence[bool]) -> Arrays:
        """Return the arrays of a sequence; ValueError shows the first difference from the nearest cached one."""
        key = content_key(ids, response)
        for shard in self.shards:
            if key in shard.places:
                return shard.entry(key)
        raise ValueError(self.explain(list(ids), list(response)))

    def sequences(self, limit: int) -> list[tuple[list[int], list[bool]]]:
        """Return the ids and response masks of up to `limit` sequences, spread evenly over the cache."""
        places = [(shard, key) for shard in self.shards for key in shard.places]
        return [shard.sequence(key) for shard, key in places[:: max(1, -(-len(places) // max(1, limit)))][:limit]]

    def holds(self, key: bytes) -> bool:
        """Say whether a sequence is cached."""
        return any(key in shard.places for shard in self.shards)

    def coverage(self, keys: Iterable[bytes]) -> float:
        """Return the share of the keys that are cached."""
        wanted = list(keys)
        return sum(map(self.holds, wanted)) / max(1, len(wanted))

    def explain(self, ids: list[int], response: list[bool]) -> str:
        """Show where a sequence that is not cached parts from the nearest one that is."""
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
