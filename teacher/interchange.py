"""A cache in the formats of neighboring projects, and theirs as a cache: rows in, rows out, checked.

    axolotl       columns target_token_ids, target_logprobs, target_mask (teacher/axolotl.py)
    distillkit    compressed_logprobs and bytepacked_indices with compression_config.yaml (teacher/distillkit.py)
    huggingface   every array of the quantity as a column, meta.json and a dataset card beside them

Export writes Parquet files and a README.md that says what the format cannot hold. Import checks every row before the
first is written. Letters: T tokens of a sequence, L supervised ones, K entries a token.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from settings.artifacts import is_done, whole_folder, write_text
from settings.typed import nearest
from teacher import axolotl, distillkit
from teacher.cache import Arrays, Meta, Reader, Writer, content_key, data_digest, finish
from teacher.quantities import quantity_named
from teacher.rows import ROWS_AT_ONCE, Columns, Foreign, Row, Shape, entries, filled, source_rows, with_tail

FORMATS = ("axolotl", "distillkit", "huggingface")
ROWS_PER_FILE = 20_000
MASS = 1.01  # probabilities of a row sum to at most this: float16 rounds each by 1 / 2048

# ---- reading


def first_row(source: Path) -> dict[str, Any]:
    """Return a source's first row; ValueError where it has none or is not there."""
    if not source.exists():
        raise ValueError(f"cache.import_from={source} does not exist")
    for _, row in source_rows(source):
        return row
    raise ValueError(f"cache.import_from={source} has no rows")


def format_of(source: Path) -> str:
    """Tell a source's format by its columns; ValueError names what was looked for."""
    columns = set(first_row(source))
    if {"target_token_ids", "target_logprobs"} <= columns:
        return "axolotl"
    if {"compressed_logprobs", "bytepacked_indices"} <= columns:
        return "distillkit"
    if {"input_ids", "response"} <= columns and _meta_file(source).is_file():
        return "huggingface"
    if {"packed_indices", "exact_values"} <= columns:
        raise ValueError(
            f"{source} is in DistillKit's legacy format (packed_indices, exact_values, coeffs), which is not read: "
            "capture with logprob_compressor, which writes compressed_logprobs"
        )
    raise ValueError(
        f"{source} has the columns {', '.join(sorted(columns))}: none of Axolotl's (target_token_ids, "
        "target_logprobs, target_mask), DistillKit's (compressed_logprobs, bytepacked_indices) or ours (input_ids, "
        "response, with meta.json)"
    )


def _meta_file(source: Path) -> Path:
    return (source if source.is_dir() else source.parent) / "meta.json"


def check_row(where: str, row: Row, size: int, names: Callable[[list[int]], list[str | None]]) -> None:
    """Refuse a row whose ids are no tokens of the tokenizer, or whose numbers are no log-probabilities."""
    if len(row.ids) != len(row.response) or not any(row.response) or row.response[0]:
        raise ValueError(f"{where}: no token after the first is supervised, or ids and mask differ in length")
    for what, ids in (("input_ids", np.asarray(row.ids)), ("entries", row.arrays.get("ids", np.zeros(0, np.int64)))):
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(f"{where}: {what} has the id {bad}, the tokenizer of this run has {size} tokens")
    if any(name is None for name in names(list(row.ids))):
        hole = row.ids[names(list(row.ids)).index(None)]
        raise ValueError(f"{where}: input_ids has the id {hole}, which the tokenizer of this run cannot decode")
    length = sum(row.response)
    logps = row.arrays.get("teacher_logps", row.arrays.get("values")) if "ids" in row.arrays else None
    for name, array in row.arrays.items():
        if len(array) != length:
            raise ValueError(f"{where}: {name} is of {len(array)} tokens, {length} are supervised")
        empty = array == -np.inf if array is logps else False  # -inf: no entry there
        if not (np.isfinite(array) | empty).all():
            raise ValueError(f"{where}: {name} holds numbers that are not finite")
    if logps is not None:
        _check_entries(where, row.arrays["ids"], logps)


def _check_entries(where: str, ids: np.ndarray, logps: np.ndarray) -> None:
    """Refuse entries [L, K] that are no log-probabilities, or that name an id twice."""
    mass = np.exp(logps.astype(np.float64)).sum(-1).max()
    if logps.max() > 1e-3 or mass > MASS:
        raise ValueError(
            f"{where}: the largest value is {logps.max():.4g} and a token's probabilities sum to {mass:.4g}: these "
            "are no log-probabilities of a softmax"
        )
    if any(len(set(some[on])) < on.sum() for some, on in zip(ids, logps > -np.inf, strict=True)):
        raise ValueError(f"{where}: a token has the same id twice among its entries")


# ---- import


def open_foreign(source: Path, kind: str) -> Foreign:
    """Open a source with its format's module."""
    if kind == "axolotl":
        return axolotl.read(source)
    if kind == "distillkit":
        return distillkit.read(source)
    return _read_own(source)


def _read_own(source: Path) -> Foreign:
    meta = json.loads(_meta_file(source).read_text(encoding="utf-8"))
    arrays = quantity_named(meta["quantity"]).arrays

    def rows() -> Iterator[tuple[str, list[int], list[bool] | None, Arrays]]:
        for where, row in source_rows(source):
            missing = [a.name for a in arrays if a.name not in row]
            if missing:
                raise ValueError(f"{where}: quantity {meta['quantity']} needs a column {missing[0]}")
            found = {a.name: np.array(row[a.name], np.int64 if a.dtype is None else np.float32) for a in arrays}
            yield where, row["input_ids"], row["response"], found

    return Foreign(rows, [], meta)


class Tokenizing(NamedTuple):
    """What an import needs of the run's own model: its tokenizer's size, names of ids, and digests."""

    size: int
    names: Callable[[list[int]], list[str | None]]
    tokenizer_digest: str
    template_digest: str


def import_cache(
    source: Path,
    kind: str,
    folder: Path,
    tokenizing: Tokenizing,
    masks: Mapping[tuple[int, ...], Sequence[bool]] | None,
    command: str = "",
) -> tuple[Meta, list[str]]:
    """Write a cache from another project's file; every row is checked before the first is written.

    masks: ids -> supervised tokens, of this run's data, for a format that has none. Returns the cache's meta data and
    notes of what the format does not say.
    """
    kind = format_of(source) if kind == "auto" else kind
    foreign = open_foreign(source, kind)
    if foreign.meta and foreign.meta["tokenizer_digest"] != tokenizing.tokenizer_digest:
        raise ValueError(
            f"{source} was made with another tokenizer: tokenizer_digest={foreign.meta['tokenizer_digest']!r}, this "
            f"run has {tokenizing.tokenizer_digest!r}: name its teacher's with model=..."
        )
    notes = list(foreign.notes)

    def rows() -> Iterator[tuple[str, Row]]:
        return _masked(foreign, source, masks)

    keys, k, content = set(), 0, hashlib.sha256()
    for where, row in rows():
        check_row(where, row, tokenizing.size, tokenizing.names)
        keys.add(content_key(row.ids, row.response))
        for name in sorted(row.arrays):
            content.update(np.ascontiguousarray(row.arrays[name]).tobytes())
        k = max(k, row.arrays["ids"].shape[1] if "ids" in row.arrays else 0)
    if not keys:
        raise ValueError(f"{source}: none of its sequences is among this run's data, so there is nothing to import")
    meta = _meta_of(foreign, kind, k, tokenizing, data_digest(keys), content.hexdigest()[:16], command)
    with closing(Writer(folder, meta)) as writer:
        for _, row in rows():
            writer.add(row.ids, row.response, _widened(row.arrays, k))
    return finish(folder, meta, keys), notes


def _masked(
    foreign: Foreign, source: Path, masks: Mapping[tuple[int, ...], Sequence[bool]] | None
) -> Iterator[tuple[str, Row]]:
    """Yield rows with a mask: their own, or that of this run's sequence with the same ids."""
    for where, ids, response, arrays in foreign.rows():
        if response is not None:
            yield where, Row(list(ids), [bool(on) for on in response], arrays)
            continue
        if masks is None:
            raise ValueError(
                f"{where}: no labels say which tokens are supervised. Name the data that it was made of (datasets=, or "
                "cache.generations=FILE): its sequences are found by their ids"
            )
        mask = masks.get(tuple(ids))
        if mask is not None:  # entries of all tokens but the first
            chosen = np.asarray(mask[1:], dtype=bool)
            yield where, Row(list(ids), list(mask), {name: array[chosen] for name, array in arrays.items()})


def _widened(arrays: Arrays, k: int) -> Arrays:
    """Return entries with K a token, if a row of the file has fewer."""
    if "ids" not in arrays or arrays["ids"].shape[1] == k:
        return arrays
    ids, logps = filled(*entries(arrays), k)
    return with_tail(ids, logps)


def _meta_of(
    foreign: Foreign, kind: str, k: int, tokenizing: Tokenizing, data: str, content: str, command: str
) -> Meta:
    if foreign.meta:
        known = {key: value for key, value in foreign.meta.items() if key in Meta.__dataclass_fields__}
        own = {"data_digest": data, "command": command, "num_sequences": 0, "num_tokens": 0}
        return Meta(**(known | own | {"format_version": Meta.__dataclass_fields__["format_version"].default}))
    return Meta(
        quantity="logprob",
        k=k,
        vocab_size=tokenizing.size,
        teacher_digest=f"imported-{content}",  # who the teacher was stands nowhere in the file
        reference_digest=None,
        tokenizer_digest=tokenizing.tokenizer_digest,
        template_digest=tokenizing.template_digest,
        data_digest=data,
        precision=f"imported from {kind}",
        backend="imported",
        command=command,
    )


# ---- export


def export_cache(folder: Path, kind: str, target: Path) -> list[str]:
    """Write a finished cache as another project's Parquet files with a README.md; return what it cannot hold."""
    reader = Reader(folder)
    shape = shape_of(kind, reader.meta)
    with whole_folder(target) as part:
        count = write_parquet(part / "data", shape, rows_of(reader))
        for name, content in shape.files.items():
            write_text(part / name, content)
        write_text(part / "README.md", card(reader.meta, kind, shape, count))
    return shape.lost


def shape_of(kind: str, meta: Meta) -> Shape:
    """Return how a format writes this cache; ValueError for a quantity that it has no place for."""
    if kind not in FORMATS:
        raise ValueError(f"cache.export_format={kind!r} is not known.{nearest(kind, list(FORMATS))}")
    if kind == "huggingface":
        return _own_shape(meta)
    if meta.quantity != "logprob":
        raise ValueError(
            f"cache.export_format={kind} holds log-probabilities, this cache {meta.quantity}: use "
            "cache.export_format=huggingface"
        )
    return axolotl.shape(meta) if kind == "axolotl" else distillkit.shape(meta)


def _own_shape(meta: Meta) -> Shape:
    import pyarrow as pa

    arrays = quantity_named(meta.quantity).arrays
    fields = [("input_ids", pa.list_(pa.int32())), ("response", pa.list_(pa.bool_()))]
    for array in arrays:
        one = pa.list_(pa.int32() if array.dtype is None else pa.float32())
        fields.append((array.name, pa.list_(one) if array.wide else one))

    def columns(row: Row) -> Columns:
        return {
            "input_ids": row.ids,
            "response": row.response,
            **{array.name: row.arrays[array.name].tolist() for array in arrays},
        }

    return Shape(pa.schema(fields), columns, {"meta.json": json.dumps(asdict(meta), indent=1) + "\n"}, [])


def rows_of(reader: Reader) -> Iterator[Row]:
    """Yield every sequence of a cache with its arrays."""
    for ids, response in reader.sequences(reader.meta.num_sequences):
        yield Row(ids, response, reader.get(ids, response))


def write_parquet(folder: Path, shape: Shape, rows: Iterable[Row]) -> int:
    """Write rows into train-NNNNN.parquet files of ROWS_PER_FILE, and return how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    writer, count = None, 0
    pending: list[Columns] = []
    for row in rows:
        if count % ROWS_PER_FILE == 0:
            if writer is not None:
                writer.write_table(pa.Table.from_pylist(pending, shape.schema))
                writer.close()
            writer = pq.ParquetWriter(folder / f"train-{count // ROWS_PER_FILE:05d}.parquet", shape.schema)
            pending = []
        pending.append(shape.columns(row))
        count += 1
        if len(pending) == ROWS_AT_ONCE:
            assert writer is not None
            writer.write_table(pa.Table.from_pylist(pending, shape.schema))
            pending = []
    assert writer is not None  # a cache is never empty
    if pending:
        writer.write_table(pa.Table.from_pylist(pending, shape.schema))
    writer.close()
    return count


def card(meta: Meta, kind: str, shape: Shape | None, count: int) -> str:
    """Write a dataset card: what the entries are, whose, and what the format cannot hold."""
    facts = {
        "format": kind,
        "quantity": meta.quantity,
        "k": meta.k,
        "temperature": meta.temperature,
        "vocab_size": meta.vocab_size,
        "teacher_digest": meta.teacher_digest,
        "reference_digest": meta.reference_digest,
        "tokenizer_digest": meta.tokenizer_digest,
        "template_digest": meta.template_digest,
        "data_digest": meta.data_digest,
        "precision": meta.precision,
        "num_sequences": count,
        "num_tokens": meta.num_tokens,
    }
    lines = ["---", "task_categories:", "- text-generation", "tags:", "- knowledge-distillation", "- prefdistill"]
    if shape is not None:
        lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: data/train-*"]
    lines += ["prefdistill:", *(f"  {name}: {json.dumps(value)}" for name, value in facts.items()), "---", ""]
    lines += [f"# Teacher signals: {meta.quantity}", ""]
    lines += [f"{count} sequences, {meta.num_tokens} supervised tokens; format: {kind}.", ""]
    if shape is not None:
        lines += ["Columns: " + ", ".join(f"`{name}`" for name in shape.schema.names) + ".", ""]
        if shape.lost:
            lines += ["What this format does not hold:", "", *(f"- {words}" for words in shape.lost), ""]
    if meta.command:
        lines += ["Made with:", "", f"    {meta.command}", ""]
    return "\n".join(lines)


def is_cache(source: Path) -> bool:
    """Tell whether a folder is a finished cache of our own."""
    return source.is_dir() and is_done(source) and (source / "meta.json").is_file()
