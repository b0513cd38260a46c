"""Teacher signals on disk: a quantity per response token, found by the content of the sequence (docs/cache_format.md).

    meta.json        what made the entries, and a digest of every shard; a reader compares it with what it expects
    shard-0000r/     one writer's: seq_ids, seq_mask, the arrays of the quantity or `packed` (codec.py), and index.bin
    DONE             written last

A record of index.bin is written after its arrays, so whatever a killed writer left behind it is cut off on resume.
Knows no model. Letters: L supervised tokens of a sequence, K entries a token.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from settings.artifacts import is_done, mark_done, remove_parts, write_json
from settings.parts import wait_for as wait_for  # those who write caches wait for them
from settings.paths import hint_for
from teacher.codec import decode, encode, errors
from teacher.shard import (
    KEY_BYTES,
    RECORD,
    File,
    Shard,
    check_numbers,
    claim,
    damaged,
    files_of,
    keys_of,
    sealed,
    total_error,
    whole_records,
)
from tokens.examples import content_key as content_key  # numpy alone; a cache's keys are those of the rows

FORMAT_VERSION = 3
UNITS = ("tokens", "responses", "packed")  # what the ends in a record count
LOGPS = {"logprob": "values", "top_k": "values", "advantage": "teacher_logps"}  # where -inf is no entry

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
    codec: str = "none"  # how K entries are stored: as arrays, or packed by teacher/codec.py (compact)
    mass: float = 1.0  # compact: a token keeps its most probable entries until they hold this much
    format_version: int = FORMAT_VERSION
    num_sequences: int = 0
    num_tokens: int = 0
    command: str = ""
    packing: dict[str, float] = field(default_factory=dict)  # compact: what was kept, and its error (shard.total_error)
    shards: dict[str, str] = field(default_factory=dict)  # the digest of each
    digest: str = ""  # of all the rest, once it is finished


NOT_IDENTITY = ("num_sequences", "num_tokens", "command", "packing", "shards", "digest")
IDENTITY = tuple(field.name for field in fields(Meta) if field.name not in NOT_IDENTITY)
NOUNS = {"teacher_digest": "model", "reference_digest": "reference model"}  # where the key's own words say less


def data_digest(keys: Iterable[bytes]) -> str:
    """Hash a set of sequences by their keys."""
    return hashlib.sha256(b"".join(sorted(set(keys)))).hexdigest()[:16]


def read_meta(folder: Path, expected: Mapping[str, object]) -> dict[str, Any]:
    """Read meta.json; ValueError for another format, or if it is not what is expected."""
    try:
        stored = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder / "meta.json", f"it cannot be read ({error})") from error
    if not isinstance(stored, dict):
        raise damaged(folder / "meta.json", "it holds no object")
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version={stored.get('format_version')!r} of a teacher cache, this version reads "
            f"{FORMAT_VERSION}: remove the folder and make it again (task=cache, or cache_reference_logprobs=true)"
        )
    for key in sorted(expected, key=lambda key: key != "backend"):  # another backend has another precision, too
        wanted = expected[key]
        if stored[key] != wanted:
            noun = NOUNS.get(key, key.removesuffix("_digest").replace("_", " "))
            raise ValueError(
                f"{folder}: the cache was made with another {noun}: {key}={stored[key]!r}, this run has {wanted!r}. "
                "Make it again with task=cache"
            )
    return stored


def _files(meta: Meta) -> list[File]:
    return files_of(meta.quantity, meta.vocab_size, meta.k, meta.codec)


def _meta_digest(stored: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in stored.items() if key != "digest"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stored_keys(folder: Path | str, meta: Meta) -> set[bytes]:
    """Return the keys of all sequences that are whole on disk, whoever wrote them."""
    files, shards = _files(meta), sorted(Path(folder).glob("shard-*"))
    return {key for shard in shards for key in keys_of(whole_records(shard, files))}


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

    What another shard holds is not written again: a run may go on with another number of processes. A shard has one
    writer at a time: a second one is refused, or waits.
    """

    def __init__(self, folder: Path | str, meta: Meta, rank: int = 0, wait: bool = False) -> None:
        self.folder, self.meta = Path(folder), meta
        self.shard = self.folder / f"shard-{rank:05d}"
        begin(self.folder, meta)
        self.shard.mkdir(exist_ok=True)
        self._index = (self.shard / "index.bin").open("ab")
        claim(self._index, self.shard, wait)
        self.files = _files(meta)
        self.logps = LOGPS.get(meta.quantity, "")
        records = whole_records(self.shard, self.files)
        self.keys = stored_keys(self.folder, meta)
        self.ends = {unit: int(records[unit][-1]) if len(records) else 0 for unit in UNITS}
        self._streams = {}
        for file in self.files:
            path = self.shard / f"{file.name}.bin"
            path.touch()
            os.truncate(path, self.ends[file.unit] * file.entry_bytes)
            self._streams[file.name] = path.open("ab")
        self._index.truncate(len(records) * RECORD.itemsize)  # cut, not anew: a kill must not lose what is whole
        self._pending: list[bytes] = []

    def has(self, key: bytes) -> bool:
        """Say whether a sequence is written."""
        return key in self.keys

    def add(self, ids: Sequence[int], response: Sequence[bool], arrays: Mapping[str, np.ndarray]) -> None:
        """Append one sequence with the quantity's arrays, [L, K] or [L] each."""
        key = content_key(ids, response)
        if key in self.keys:
            return
        length, arrays = int(np.sum(response)), dict(arrays)
        wanted = {file.name: file for file in files_of(self.meta.quantity, self.meta.vocab_size, self.meta.k, "none")}
        given: dict[str, Any] = {"seq_ids": ids, "seq_mask": response, **arrays}
        if set(given) != set(wanted):
            raise ValueError(f"{self.meta.quantity} has the arrays {sorted(wanted)}, got {sorted(given)}")
        for name, file in wanted.items():
            needed = (len(ids) if file.unit == "tokens" else length, *file.shape)
            if np.shape(given[name]) != needed:
                shape = np.shape(given[name])
                raise ValueError(f"a sequence with {length} supervised tokens needs {name} {needed}, got {shape}")
            check_numbers(name, given[name], file.dtype, gaps=name == self.logps)
        kept: dict[str, float] = {}
        if self.meta.codec == "compact":
            packed, kept = pack(arrays, self.meta)
            given["packed"] = np.frombuffer(packed, np.uint8)
            self.ends["packed"] += len(packed)
        for file in self.files:
            self._streams[file.name].write(np.ascontiguousarray(given[file.name], dtype=file.dtype).tobytes())
        self.ends["tokens"] += len(ids)
        self.ends["responses"] += length
        record = np.zeros(1, RECORD)
        for name, value in {**self.ends, **kept}.items():
            record[name] = value
        self._pending.append(key + record.tobytes()[KEY_BYTES:])
        self.keys.add(key)

    def flush(self) -> None:
        """Put what was added on disk, arrays before index."""
        if not self._pending:
            return
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        self._index.write(b"".join(self._pending))
        self._index.flush()
        self._pending = []

    def close(self) -> None:
        """Flush and close this shard; `finish` makes the cache readable."""
        self.flush()
        for stream in [*self._streams.values(), self._index]:
            stream.close()


def finish(folder: Path | str, meta: Meta, keys: set[bytes]) -> Meta:
    """Wait until all shards together hold the keys, count them into meta.json and write DONE; one process calls it."""
    folder = Path(folder)
    wait_for(lambda: keys <= stored_keys(folder, meta))
    for shard in folder.glob("shard-*"):
        Writer(folder, meta, int(shard.name.removeprefix("shard-")), wait=True).close()  # cuts what a kill left behind
    files, shards = _files(meta), sorted(folder.glob("shard-*"))
    records = [whole_records(shard, files) for shard in shards]
    counted = replace(
        meta,
        num_sequences=sum(map(len, records)),
        num_tokens=sum(int(part["responses"][-1]) for part in records if len(part)),
        packing=total_error(records) if meta.codec == "compact" else {},
        shards={shard.name: sealed(shard, files, meta.codec, meta.k) for shard in shards},
    )
    counted = replace(counted, digest=_meta_digest(asdict(counted)))
    write_json(folder / "meta.json", asdict(counted))
    remove_parts(folder)
    mark_done(folder)
    return counted


# ---- packing


def pack(arrays: Mapping[str, np.ndarray], meta: Meta) -> tuple[bytes, dict[str, float]]:
    """Pack a sequence's entries; return them, and what a record says of them."""
    has_advantages = meta.quantity == "advantage"
    logps = np.asarray(arrays["teacher_logps" if has_advantages else "values"])
    advantages = np.asarray(arrays["values"]) if has_advantages else None
    ids = np.asarray(arrays["ids"])
    length, k = ids.shape
    packed = encode(ids, logps, advantages, meta.mass)
    return packed, errors(ids, logps, advantages, decode(packed, length, k, has_advantages))


def unpack(packed: np.ndarray, length: int, k: int, has_advantages: bool) -> Arrays:
    """Return the arrays of the quantity from a sequence's bytes; what a token lacks of k entries is padded (codec)."""
    found = decode(packed, length, k, has_advantages)
    if not has_advantages:
        return {"ids": found["ids"], "values": found["logps"], "tail": found["tail"]}
    names = {"ids": "ids", "values": "advantages", "tail": "tail", "teacher_logps": "logps"}
    return {name: found[theirs] for name, theirs in names.items()}


def padded(arrays: Arrays, k: int, logps: str) -> Arrays:
    """Widen [L, fewer] entries to [L, k] as the codec pads: id 0, log-probability -inf, advantage 0."""
    fill = {logps: -np.inf}
    return {
        name: part
        if part.ndim == 1 or part.shape[1] == k
        else np.pad(part, ((0, 0), (0, k - part.shape[1])), constant_values=fill.get(name, 0))
        for name, part in arrays.items()
    }


def check_whole(folder: Path, key: str = "") -> None:
    """Refuse a folder that is no teacher cache, or one that is not finished, and say which folder is meant."""
    if is_done(folder) and not (folder / "CACHE").is_dir():
        return
    inside = folder / "CACHE"
    if inside.is_dir():
        what = f"is a run's folder; its cache is {inside}: give that"
    elif (folder / "config.json").is_file():
        what = f"is a model. Have its cache made by task=cache model.load_from={folder}, and give the CACHE of that run"
    elif folder.is_dir():
        what = "is not finished (no DONE): run the same command again"
    else:
        what = f"does not exist: {hint_for(folder)}"
    raise ValueError(f"{key}teacher cache {folder} {what}")


class Reader:
    """Find a sequence's entries by the ids that the trainer itself made; anything else is refused and shown."""

    def __init__(
        self,
        folder: Path | str,
        expected: Mapping[str, object] | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.folder, self.decode = Path(folder).expanduser(), decode
        check_whole(self.folder)
        stored = read_meta(self.folder, expected or {})
        path = self.folder / "meta.json"
        if stored.get("digest") != _meta_digest(stored):
            raise damaged(path, "its fields have another digest")
        self.meta = Meta(**stored)
        names = {shard.name for shard in self.folder.glob("shard-*")} | set(self.meta.shards)
        foreign = sorted(names - set(self.meta.shards))
        if foreign:
            raise damaged(self.folder / foreign[0], "meta.json does not name it: it is of another cache")
        opened = self.meta.quantity, self.meta.vocab_size
        self.shards = [Shard(self.folder / name, *opened, self.meta.shards[name]) for name in sorted(names)]
        self.k = max((shard.k for shard in self.shards), default=self.meta.k)

    def get(self, ids: Sequence[int], response: Sequence[bool]) -> Arrays:
        """Return the arrays of a sequence; ValueError shows the first difference from the nearest cached one.

        ids are int64, numbers float32. A token with fewer than K entries is padded: id 0, log-probability -inf,
        advantage 0.
        """
        key = content_key(ids, response)
        for shard in self.shards:
            row = int(shard.index.find([key])[0])
            if row >= 0:
                return self._entry(shard, row)
        raise ValueError(self.explain(list(ids), list(response)))

    def _entry(self, shard: Shard, row: int) -> Arrays:
        has_advantages = self.meta.quantity == "advantage"
        if shard.codec == "compact":
            found = unpack(shard.array("packed", row), shard.length(row), shard.k, has_advantages)
        else:
            own = [file for file in shard.files.values() if file.unit == "responses"]
            found = {
                f.name: shard.array(f.name, row).astype(np.float32 if f.dtype.kind == "f" else np.int64) for f in own
            }
        return padded(found, self.k, "teacher_logps" if has_advantages else "values")

    def sequences(self, limit: int) -> list[tuple[list[int], list[bool]]]:
        """Return the ids and response masks of up to `limit` sequences, spread evenly over the cache."""
        total = self.meta.num_sequences
        rows = range(0, total, max(1, -(-total // max(1, limit))))[:limit]
        starts = np.cumsum([0, *(len(shard.index.records) for shard in self.shards)])
        where = [int(np.searchsorted(starts, row, side="right")) - 1 for row in rows]
        return [self.shards[at].sequence(row - int(starts[at])) for at, row in zip(where, rows, strict=True)]

    def holds(self, key: bytes) -> bool:
        """Say whether a sequence is cached."""
        return any(shard.index.find([key])[0] >= 0 for shard in self.shards)

    def held(self, keys: np.ndarray) -> np.ndarray:
        """Return which of the keys [n, 16] uint8 are cached [n]."""
        data, found = [np.ascontiguousarray(keys).tobytes()], np.zeros(len(keys), bool)
        for shard in self.shards:
            found |= shard.index.find(data) >= 0
        return found

    def coverage(self, keys: Iterable[bytes]) -> float:
        """Return the share of the keys that are cached."""
        found = self.held(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))
        return float(found.sum()) / max(1, len(found))

    def verify(self) -> None:
        """Check every byte of the cache now; else each part is checked when it is first read."""
        for shard in self.shards:
            shard.verify()

    def explain(self, ids: list[int], response: list[bool]) -> str:
        """Show where a sequence that is not cached parts from the nearest one that is."""
        best: tuple[int, list[int], list[bool]] = (-1, [], [])
        for shard in self.shards:
            for row in range(len(shard.index.records)):
                other, mask = shard.sequence(row)
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
