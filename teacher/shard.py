"""A shard of a teacher cache: its files, its index of fixed-size records, and checksums that are checked when read.

index.bin        a RECORD a sequence, in the order of writing; ends count from the start of the shard
index.sorted     uint64 [n]: the keys' first 8 bytes, ascending; then uint32 [n]: the row of each
checksums.bin    uint32: the CRC-32 of each block of BLOCK bytes, file after file as shard.json lists them
shard.json       codec, k, counts, and the bytes of each file
"""

import fcntl
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from settings.artifacts import write_bytes, write_json
from teacher.quantities import Array, quantity_named

BLOCK = 65536
KEY_BYTES = 16
SEQUENCE = (Array("seq_ids", None, False), Array("seq_mask", "bool", False))  # an entry a token of the sequence
RECORD = np.dtype(
    [
        ("high", ">u8"),  # the key's 16 bytes
        ("low", ">u8"),
        ("tokens", "<u8"),  # ends: of its tokens, of its response tokens, of its bytes in packed.bin
        ("responses", "<u8"),
        ("packed", "<u8"),
        ("entries", "<u4"),  # entries kept
        ("kl", "<f4"),  # mean over its response tokens, nats: KL of the exact entries and the rest from the stored ones
        ("logp_max", "<f4"),  # errors of what is packed, over its entries
        ("logp_mean", "<f4"),
        ("advantage_max", "<f4"),
        ("advantage_mean", "<f4"),
    ]
)


class File(NamedTuple):
    """A file of arrays: the shape of one entry, and which end of a record counts the entries."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    unit: str  # tokens | responses | packed

    @property
    def entry_bytes(self) -> int:
        """Return the bytes of one entry."""
        return self.dtype.itemsize * math.prod(self.shape)


def files_of(quantity: str, vocab_size: int, k: int, codec: str) -> list[File]:
    """List the files of arrays of a shard."""
    whole = [File(a.name, a.dtype_for(vocab_size), (), "tokens") for a in SEQUENCE]
    if codec == "compact":
        return [*whole, File("packed", np.dtype("uint8"), (), "packed")]
    own = quantity_named(quantity).arrays
    return whole + [File(a.name, a.dtype_for(vocab_size), (k,) if a.wide else (), "responses") for a in own]


def whole_records(shard: Path, files: list[File]) -> np.ndarray:
    """Return the records of the index whose arrays are all there."""
    path = shard / "index.bin"
    records = np.fromfile(path, RECORD) if path.is_file() else np.empty(0, RECORD)
    for file in files:  # sizes after the index: another process may be writing
        there = (shard / f"{file.name}.bin").stat().st_size // file.entry_bytes if len(records) else 0
        records = records[: np.searchsorted(records[file.unit], there, side="right")]
    return records


def keys_of(records: np.ndarray) -> list[bytes]:
    """Return the keys of records."""
    data = np.stack([records["high"], records["low"]], axis=1).astype(">u8").tobytes()
    return [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]


# ---- writing


def claim(index: BinaryIO, shard: Path, wait: bool) -> None:
    """Hold a shard for one writer until its index is closed, or its process ends; on a disk without locks nobody does.

    Two writers would cut off and interleave each other's entries. ValueError where another one is at work, or `wait`.
    """
    try:
        fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise ValueError(
                f"{shard} is being written by another process: the same run is at work, or a process of an earlier one "
                "was left behind. Wait for it or end it, then run the same command again"
            ) from None
        fcntl.flock(index, fcntl.LOCK_EX)
    except OSError:
        return


def check_numbers(name: str, numbers: np.ndarray, dtype: np.dtype, gaps: bool) -> None:
    """Refuse what is no number, or too large for its dtype on disk; -inf is no entry where there may be `gaps`."""
    found = np.asarray(numbers)
    if dtype.kind != "f":
        return
    largest = float(np.finfo(dtype).max)
    bad = ~(np.abs(found) <= largest)
    if gaps:
        bad &= found != -np.inf
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {found.size} {name} of a sequence are no numbers that {dtype.name} holds on disk, up "
            f"to {largest:g}: the first is {found[bad][0]:g}. Is the teacher whole, model.reference_dtype wide enough, "
            "and cache.beta, which advantages are multiplied by, not too large?"
        )


# ---- sealing


def _digest(shard: Path) -> str:
    parts = [(shard / name).read_bytes() for name in ("shard.json", "checksums.bin")]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def sealed(shard: Path, files: list[File], codec: str, k: int) -> str:
    """Write what a reader needs beside the arrays; return the digest of it all, which meta.json holds."""
    records = whole_records(shard, files)
    order = np.argsort(records["high"], kind="stable")
    write_bytes(shard / "index.sorted", records["high"][order].astype("<u8").tobytes() + order.astype("<u4").tobytes())
    names = [*(f"{file.name}.bin" for file in files), "index.bin", "index.sorted"]
    write_bytes(shard / "checksums.bin", b"".join(_checksums(shard / name).tobytes() for name in names))
    counts = {"num_sequences": len(records), "num_tokens": int(records["responses"][-1]) if len(records) else 0}
    sizes = {name: (shard / name).stat().st_size for name in names}
    write_json(shard / "shard.json", {"codec": codec, "k": k, **counts, "block_bytes": BLOCK, "files": sizes})
    return _digest(shard)


def _checksums(path: Path) -> np.ndarray:
    with path.open("rb") as stream:
        return np.array([zlib.crc32(block) for block in iter(lambda: stream.read(BLOCK), b"")], "<u4")


def damaged(path: Path, what: str) -> ValueError:
    """Return the one error of a file that is not the one which was written."""
    return ValueError(
        f"teacher cache: {path} is not the file that was written ({what}). Copy the cache again, or remove the folder "
        "and make it again with task=cache"
    )


class Checked:
    """The bytes of a file, mapped; a block is checked when it is read for the first time."""

    def __init__(self, path: Path, size: int, checksums: np.ndarray) -> None:
        self.path, self.checksums = path, checksums
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise damaged(path, "it is missing" if actual is None else f"{actual} bytes, {size} were written")
        self.bytes: np.ndarray = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        self.seen = np.zeros(len(checksums), bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return bytes; ValueError names the file where they are not those that were written."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if not self.seen[block]:
                if zlib.crc32(self.bytes[block * BLOCK : (block + 1) * BLOCK].data) != self.checksums[block]:
                    raise damaged(self.path, f"another checksum in the {BLOCK} bytes from {block * BLOCK} on")
                self.seen[block] = True
        return self.bytes[start:stop]


# ---- reading


class Index:
    """Find the row of a key among the records of a shard, by memory map."""

    def __init__(self, index: Checked, ordered: Checked) -> None:
        self.records = index.read(0, len(index.bytes)).view(RECORD)
        size = len(self.records)
        data = ordered.read(0, len(ordered.bytes))
        self.firsts, self.rows = data[: 8 * size].view("<u8"), data[8 * size :].view("<u4")

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the row of each key, -1 where it is not there."""
        halves = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
        found = np.full(len(halves), -1, np.int64)
        at = np.searchsorted(self.firsts, halves[:, 0])
        open_ = np.arange(len(halves))
        while len(open_):  # once; again only where two keys share their first 8 bytes
            open_ = open_[at[open_] < len(self.firsts)]
            open_ = open_[self.firsts[at[open_]] == halves[open_, 0]]
            rows = self.rows[at[open_]]
            same = self.records["low"][rows] == halves[open_, 1]
            found[open_[same]] = rows[same]
            open_ = open_[~same]
            at[open_] += 1
        return found

    def span(self, row: int, unit: str) -> tuple[int, int]:
        """Return where a sequence's entries start and end."""
        ends = self.records[unit]
        return int(ends[row - 1]) if row else 0, int(ends[row])


class Shard:
    """Memory-mapped files of one finished shard. ValueError where it is not the one that was written."""

    def __init__(self, folder: Path, quantity: str, vocab_size: int, digest: str | None) -> None:
        if not (folder / "shard.json").is_file() or not (folder / "checksums.bin").is_file():
            raise damaged(folder / "shard.json", "shard.json or checksums.bin is missing")
        if _digest(folder) != digest:
            raise damaged(folder / "shard.json", "meta.json names another shard: swapped, edited or of another cache")
        about: Mapping[str, Any] = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
        self.codec, self.k = str(about["codec"]), int(about["k"])
        sums, checked, at = np.fromfile(folder / "checksums.bin", "<u4"), {}, 0
        for name, size in about["files"].items():
            blocks = -(-size // BLOCK)
            checked[name], at = Checked(folder / name, size, sums[at : at + blocks]), at + blocks
        self.checked: dict[str, Checked] = checked
        self.files = {file.name: file for file in files_of(quantity, vocab_size, self.k, self.codec)}
        self.index = Index(checked["index.bin"], checked["index.sorted"])

    def array(self, name: str, row: int) -> np.ndarray:
        """Return a sequence's part of a file [entries, *shape]."""
        file = self.files[name]
        start, stop = self.index.span(row, file.unit)
        data = self.checked[f"{name}.bin"].read(start * file.entry_bytes, stop * file.entry_bytes)
        return data.view(file.dtype).reshape(stop - start, *file.shape)

    def length(self, row: int) -> int:
        """Return the number of response tokens of a sequence."""
        start, stop = self.index.span(row, "responses")
        return stop - start

    def sequence(self, row: int) -> tuple[list[int], list[bool]]:
        """Read the ids and mask of a sequence."""
        return self.array("seq_ids", row).tolist(), self.array("seq_mask", row).tolist()

    def verify(self) -> None:
        """Check every byte; ValueError names the file that is not the one which was written."""
        for file in self.checked.values():
            file.read(0, len(file.bytes))


def total_error(records: Sequence[np.ndarray]) -> dict[str, float]:
    """Return what packing costs over all sequences: entries a token, added KL (nats), errors at most and on average."""
    found = np.concatenate([np.empty(0, RECORD), *records])
    lengths = np.concatenate([np.empty(0), *(np.diff(part["responses"].astype(float), prepend=0) for part in records)])
    entries = found["entries"].astype(float)
    result = {"entries_per_token": entries.sum() / max(1, lengths.sum()), "kl": (found["kl"] * lengths).sum()}
    result["kl"] /= max(1, lengths.sum())
    for name in ("logp", "advantage"):
        result[f"{name}_error_max"] = found[f"{name}_max"].max(initial=0.0)
        result[f"{name}_error_mean"] = (found[f"{name}_mean"] * entries).sum() / max(1.0, entries.sum())
    return {name: float(value) for name, value in result.items()}
