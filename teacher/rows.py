"""What the formats of teacher/interchange.py share: a row, what reads and what writes one, and the entries of a token.

Letters: T tokens of a sequence, L supervised ones, K entries a token.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from settings.artifacts import read_jsonl
from teacher.cache import Arrays

FILL = -100.0  # log-probability of an entry that only fills a row: teacher/audit.py's NO_ENTRY lies above it
ROWS_AT_ONCE = 64

Columns = dict[str, Any]


class Row(NamedTuple):
    """A sequence with its entries: ids [T], which are supervised [T], and the quantity's arrays [L, K] or [L]."""

    ids: list[int]
    response: list[bool]
    arrays: Arrays


class Foreign(NamedTuple):
    """What a format's module makes of a source: its rows, which may come without a mask (None), and what it is."""

    rows: Callable[[], Iterator[tuple[str, list[int], list[bool] | None, Arrays]]]
    notes: list[str]
    meta: Mapping[str, Any]  # of a format that has one


class Shape(NamedTuple):
    """What a format's module writes: a Parquet schema, a row's columns, files beside them, and what it cannot hold."""

    schema: Any
    columns: Callable[[Row], Columns]
    files: dict[str, str]
    lost: list[str]


# ---- entries


def filled(ids: np.ndarray, logps: np.ndarray, kept: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return K different ids [L, K] and log-probabilities [L, K], descending; no entry is FILL at an unused id."""
    out_ids, out = np.zeros((len(ids), k), np.int64), np.full((len(ids), k), FILL, np.float32)
    for row, (some, values, on) in enumerate(zip(ids, logps, kept, strict=True)):
        own, found = some[on], values[on]
        order = np.argsort(-found, kind="stable")
        count = len(own)
        out_ids[row, :count], out[row, :count] = own[order], found[order]
        if count < k:
            unused = np.setdiff1d(np.arange(k + count), own, assume_unique=False)
            out_ids[row, count:] = unused[: k - count]
    return out_ids, out


def entries(arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, log-probabilities and which of them are entries, [L, K] each, of a `logprob` cache's row."""
    logps = arrays["values"]
    return arrays["ids"], logps, np.isfinite(logps) & (logps > FILL + 1)


def with_tail(ids: np.ndarray, logps: np.ndarray) -> Arrays:
    """Return the arrays of quantity `logprob`; the tail is what the entries leave."""
    tail = np.clip(1.0 - np.exp(logps.astype(np.float64)).sum(-1), 0.0, 1.0)
    return {"ids": ids.astype(np.int64), "values": logps.astype(np.float32), "tail": tail.astype(np.float32)}


# ---- reading


def source_rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) of a JSONL or Parquet file, a folder of Parquet files, or a save_to_disk folder."""
    if source.is_dir() and (source / "state.json").is_file():
        import datasets

        for number, row in enumerate(datasets.load_from_disk(str(source))):
            yield f"{source}, row {number}", dict(row)
        return
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"cache.import_from={source} has no Parquet file and is no save_to_disk folder")
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            number = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
        else:
            for number, row in enumerate(read_jsonl(file)):
                yield f"{file}, row {number}", row
