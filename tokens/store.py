"""Tokenized rows as arrays, computed once from a source and then memory-mapped: cache_dir/tokens/DIGEST/.

The digest covers all that decides the arrays: the source's content, which of its rows, tokenizer and template, lengths,
format, `supervise`, and the code. Mixing, weights and order are no part of it, so runs and stages share a store. One
process writes (writing.py) while others that want the same store wait at a file lock; a killed writer leaves a folder
under another name (settings/artifacts.py), and the lock falls with it.
Letters: R rows, N tokens of all rows, C things counted.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conversations import Conversation
from settings.artifacts import mark_done, write_json
from tokens.columns import numbers_in
from tokens.examples import Example, Tokens, content_key

FORMAT = 2  # of the files
SIDES = ("chosen", "rejected", "response")


class Table(NamedTuple):
    """Tokenized rows. A row's prompt and its up to three sequences lie one after the other in `ids` and `mask`.

    numbers [R] int64: the rows' places in the source. lengths [R, 4] int32: of prompt, chosen, rejected, response; -1
    where there is none, everywhere in a dropped row. supervised [R, 3] int32. keys [R, 3, 16] uint8: content keys;
    prompts [R, 16] uint8: those of the prompts. figures [R, 2] float64: label and reward, nan where there is none.
    counts [R, C] int32: what was cut and dropped. ids [N] int32, mask [N] bool. text, ends [R] int64: the
    conversations as JSON, and where each ends; or `told` holds them as they are.
    """

    numbers: np.ndarray
    lengths: np.ndarray
    supervised: np.ndarray
    keys: np.ndarray
    prompts: np.ndarray
    figures: np.ndarray
    counts: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    ends: np.ndarray
    text: np.ndarray
    told: list[Conversation] | None = None


class Record(NamedTuple):
    """A row on its way into a table; `example` is None where it is dropped."""

    number: int
    example: Example | None
    counts: Sequence[int]
    conversation: Conversation


# name: (dtype, shape of one entry); `counts` has as many columns as things are counted
FILES: dict[str, tuple[str, tuple[int, ...]]] = {
    "numbers": ("int64", ()),
    "lengths": ("int32", (4,)),
    "supervised": ("int32", (3,)),
    "keys": ("uint8", (3, 16)),
    "prompts": ("uint8", (16,)),
    "figures": ("float64", (2,)),
    "counts": ("int32", (-1,)),
    "ids": ("int32", ()),
    "mask": ("bool", ()),
    "ends": ("int64", ()),
    "text": ("uint8", ()),
}


class NotStorable(Exception):
    """A conversation holds what JSON does not give back as it was."""


def pack(records: Sequence[Record], as_json: bool) -> Table:
    """Lay records out as arrays; NotStorable where a conversation cannot be written as JSON."""
    size = len(records)
    lengths, supervised = np.full((size, 4), -1, np.int32), np.zeros((size, 3), np.int32)
    keys, prompts = np.zeros((size, 3, 16), np.uint8), np.zeros((size, 16), np.uint8)
    ids: list[np.ndarray] = [np.zeros(0, np.int32)]
    mask: list[np.ndarray] = [np.zeros(0, np.bool_)]
    for row, record in enumerate(records):
        if record.example is None:
            continue
        lengths[row, 0] = len(record.example.prompt)
        prompts[row] = np.frombuffer(content_key(record.example.prompt, ()), np.uint8)
        ids.append(np.asarray(record.example.prompt, np.int32))
        mask.append(np.zeros(len(record.example.prompt), np.bool_))
        for side, name in enumerate(SIDES):
            tokens = getattr(record.example, name)
            if tokens is None:
                continue
            own_ids, own_mask = tokens.arrays()
            lengths[row, side + 1], supervised[row, side] = len(own_ids), np.count_nonzero(own_mask)
            keys[row, side] = np.frombuffer(tokens.key, np.uint8)
            ids.append(own_ids)
            mask.append(own_mask)
    texts = [_as_json(record.conversation) for record in records] if as_json else []
    return Table(
        np.array([record.number for record in records], np.int64),
        lengths,
        supervised,
        keys,
        prompts,
        np.array([numbers_in(record.conversation.meta) for record in records], np.float64).reshape(-1, 2),
        np.array([record.counts for record in records], np.int32),
        np.concatenate(ids),
        np.concatenate(mask),
        np.cumsum([len(text) for text in texts], dtype=np.int64),
        np.frombuffer(b"".join(texts), np.uint8),
        None if as_json else [record.conversation for record in records],
    )


def _as_json(conversation: Conversation) -> bytes:
    try:
        text = json.dumps(conversation, ensure_ascii=False)
    except TypeError as error:
        raise NotStorable(str(error)) from error
    if json.loads(text) != list(conversation):
        raise NotStorable("a value comes back from JSON as another one")
    return text.encode("utf-8", "surrogatepass")


# ---- rows as they are asked for


class StoredTokens(Tokens):
    """A sequence in a table: what is asked for is read."""

    def __init__(self, table: "Rows", row: int, side: int) -> None:
        object.__setattr__(self, "_place", (table, row, side))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokens, (self.ids, self.response)

    @property
    def ids(self) -> list[int]:  # type: ignore[override]
        """Return the token ids."""
        return self.arrays()[0].tolist()

    @property
    def response(self) -> list[bool]:  # type: ignore[override]
        """Return the mask of supervised tokens."""
        return self.arrays()[1].tolist()

    @property
    def key(self) -> bytes:
        """Return the content key."""
        rows, row, side = self._place  # type: ignore[attr-defined]
        return rows.table.keys[row, side].tobytes()

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        rows, row, side = self._place  # type: ignore[attr-defined]
        return int(rows.table.lengths[row, side + 1])

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        rows, row, side = self._place  # type: ignore[attr-defined]
        return int(rows.table.supervised[row, side])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [T] int32 and mask [T] bool as views."""
        rows, row, side = self._place  # type: ignore[attr-defined]
        return rows.part(row, side + 1)


class StoredExample(Example):
    """A row of a table: what is asked for is read."""

    def __init__(self, rows: "Rows", row: int, where: str) -> None:
        object.__setattr__(self, "_place", (rows, row, where))

    @property
    def prompt(self) -> list[int]:  # type: ignore[override]
        """Return the prompt's ids."""
        rows, row, _ = self._place  # type: ignore[attr-defined]
        return rows.part(row, 0)[0].tolist()

    @property
    def chosen(self) -> Tokens | None:  # type: ignore[override]
        """Return the chosen response behind its prompt."""
        return self._side(0)

    @property
    def rejected(self) -> Tokens | None:  # type: ignore[override]
        """Return the rejected response behind its prompt."""
        return self._side(1)

    @property
    def response(self) -> Tokens | None:  # type: ignore[override]
        """Return the response behind its prompt."""
        return self._side(2)

    @property
    def conversation(self) -> Conversation:  # type: ignore[override]
        """Return the row's conversation."""
        rows, row, _ = self._place  # type: ignore[attr-defined]
        return rows.conversation(row)

    @property
    def where(self) -> str:  # type: ignore[override]
        """Return the source and the row's number in it."""
        return self._place[2]  # type: ignore[attr-defined]

    def _side(self, side: int) -> Tokens | None:
        rows, row, _ = self._place  # type: ignore[attr-defined]
        return StoredTokens(rows, row, side) if rows.table.lengths[row, side + 1] >= 0 else None


class Rows:
    """A table with the place of everything in it; `folder`: where it is mapped from, None if it is in memory."""

    def __init__(self, table: Table, folder: Path | None = None) -> None:
        self.table, self.folder = table, folder
        sizes = np.maximum(table.lengths, 0).ravel().astype(np.int64)
        self.starts = (np.cumsum(sizes) - sizes).reshape(-1, 4)

    def part(self, row: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask of a row's prompt (0), chosen (1), rejected (2) or response (3)."""
        start = self.starts[row, part]
        stop = start + max(0, self.table.lengths[row, part])
        return self.table.ids[start:stop], self.table.mask[start:stop]

    def conversation(self, row: int) -> Conversation:
        """Return the conversation of a row."""
        if self.table.told is not None:
            return self.table.told[row]
        start = self.table.ends[row - 1] if row else 0
        return Conversation(*json.loads(self.table.text[start : self.table.ends[row]].tobytes()))

    def example(self, row: int, where: str) -> Example:
        """Return a row as an example."""
        return StoredExample(self, row, where)


# ---- files


def digest_of(identity: Mapping[str, Any]) -> str:
    """Hash what decides a store's content."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write_tables(folder: Path, tables: Iterable[Table]) -> None:
    """Append tables to the files of a folder; `ends` go on where those of the last table stopped."""
    end = 0
    files = {name: (folder / f"{name}.bin").open("wb") for name in FILES}
    for table in tables:
        for name, file in files.items():
            array = getattr(table, name)
            file.write(np.ascontiguousarray(array + end if name == "ends" else array).tobytes())
        end += len(table.text)
    for file in files.values():
        file.close()


def seal(folder: Path, identity: Mapping[str, Any]) -> None:
    """Put the files on disk and write meta.json and DONE: from here on the folder counts as whole."""
    files = {}
    for name in FILES:
        path = folder / f"{name}.bin"
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {**_stamp(path), "crc32": _crc(path)}
    rows = files["numbers"]["bytes"] // 8
    write_json(folder / "meta.json", {"format": FORMAT, "rows": rows, "identity": dict(identity), "files": files})
    mark_done(folder)


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns}


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def open_store(folder: Path, identity: Mapping[str, Any]) -> Rows:
    """Map a store; ValueError if it is torn, was edited, or is of something else.

    A file that is as old and as long as it was written is taken to be whole; any other one is read and compared with
    its checksum (a copied folder is).
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        files, same = meta["files"], meta["format"] == FORMAT and meta["identity"] == dict(identity)
        if not same:
            raise ValueError("it is of something else")
        for name in FILES:
            path, noted = folder / f"{name}.bin", files[name]
            found = _stamp(path)
            if found["bytes"] != noted["bytes"]:
                raise ValueError(f"{path.name} has {found['bytes']} bytes, {noted['bytes']} were written")
            if found != {key: noted[key] for key in found} and _crc(path) != noted["crc32"]:
                raise ValueError(f"{path.name} was changed: its checksum is another one")
        arrays = {name: _mapped(folder / f"{name}.bin", *FILES[name], meta["rows"]) for name in FILES}
        return Rows(Table(**arrays, told=None), folder)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _mapped(path: Path, dtype: str, shape: tuple[int, ...], rows: int) -> np.ndarray:
    flat = np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)
    if -1 in shape:
        return flat.reshape(rows, len(flat) // max(1, rows))
    return flat.reshape(-1, *shape)
