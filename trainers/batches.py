"""What a trainer steps on: items (one example each, with teacher signals) and padded batches.

An item has S slots, one sequence each (DPO: chosen, rejected; ADPA: chosen, generated). A batch lays them slot after
slot: rows 0..B-1 are slot 0 of the B items, rows B..2B-1 slot 1, so every response token's slot is `rows // B`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from dataloader import Example, Sequences, Tokens, TopK, collate, unsupervised
from teacher.lookup import Stored, StoredLogps
from teacher.quantities import Entry
from tokens.examples import held


class Item(NamedTuple):
    """One example: a sequence per slot, and what belongs to it.

    entries: the teacher's entries per slot (or None). reference_logps: the reference's log-probability of every
    response token, an array per slot, then one per `scored` sequence. Both may stand in a cache, where they are read
    when a batch is made. label: 1 desirable, 0 undesirable, or a reward.
    scored: sequences that are scored without learning from them (KTO's mismatched response). notes [n, F]: what a
    method noted of each response token when it was written (PPO's old log-probability, advantage, ...). source: the
    number of the example that this item was made of (-1: a filler).
    """

    sequences: tuple[Tokens, ...]
    entries: tuple[Entry | Stored | None, ...] = ()
    reference_logps: tuple[np.ndarray | StoredLogps, ...] | None = None
    label: float | None = None
    scored: tuple[Tokens, ...] = ()
    notes: np.ndarray | None = None
    source: int = 0

    def filler(self) -> "Item":
        """Return the same shapes with nothing supervised: all ranks step together, this one counts nowhere."""
        nothing = np.zeros(0, np.float32)
        return Item(
            tuple(unsupervised(s) for s in self.sequences),
            reference_logps=None if self.reference_logps is None else tuple(nothing for _ in self.reference_logps),
            label=self.label,
            scored=tuple(unsupervised(s) for s in self.scored),
            notes=None if self.notes is None else self.notes[:0],
            source=-1,
        )


class Items(Sequence[Item]):
    """Items that are made when they are asked for, by their number."""

    def __init__(self, count: int, make: Callable[[int], Item]) -> None:
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self.size))]
        number = index + self.size if index < 0 else index
        if not 0 <= number < self.size:
            raise IndexError(index)
        return self.make(number)

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, range(self.size))


def checked(count: int, make: Callable[[int], Item]) -> Items:
    """Make every item once, so that a row that lacks something is refused before the first step, and keep none."""
    items = Items(count, make)
    for _ in items:
        pass
    return items


def joined(first: Sequence[Item], second: Sequence[Item]) -> Items:
    """Return the items of both, one after the other."""
    return Items(len(first) + len(second), lambda i: first[i] if i < len(first) else second[i - len(first)])


class Batch(NamedTuple):
    """S*B padded rows, slot after slot, and what belongs to them.

    teacher: entries, flat over the tokens of the slots that have them. reference_logps [N]: flat over the response
    tokens. labels [B]. scored: rows without learning, with their reference_logps. shared: what a method found out
    over the whole global batch (KTO's z_0, the rank partners of AOT, ...). notes [N, F]: flat over the response tokens.
    """

    sequences: Sequences
    num_items: int
    teacher: TopK | None = None
    reference_logps: Tensor | None = None
    labels: Tensor | None = None
    scored: Sequences | None = None
    scored_reference_logps: Tensor | None = None
    shared: Tensor | None = None
    notes: Tensor | None = None

    def supervised(self, slot: int) -> Tensor:
        """Return a [B] mask of the items whose `slot` has a supervised token (fillers have none)."""
        rows = slice(slot * self.num_items, (slot + 1) * self.num_items)
        return self.sequences.response[rows].any(dim=1)

    def num_tokens(self, slot: int) -> int:
        """Count the supervised tokens of a slot."""
        rows = slice(slot * self.num_items, (slot + 1) * self.num_items)
        return int(self.sequences.response[rows].sum())

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor."""
        return Batch._make(_moved(part, device) for part in self)


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, tuple):
        return type(part)._make(_moved(tensor, device) for tensor in part)  # type: ignore[attr-defined]
    return part.to(device) if isinstance(part, Tensor) else part


def make_batch(items: Sequence[Item], pad_id: int) -> Batch:
    """Pad the items and lay them slot after slot."""
    first = items[0]
    slots = range(len(first.sequences))
    entries = [item.entries[slot] for slot in slots for item in items if item.entries]
    scored = [tokens for item in items for tokens in item.scored]
    labels = None if first.label is None else torch.tensor([float(item.label or 0.0) for item in items])
    return Batch(
        collate([item.sequences[slot] for slot in slots for item in items], pad_id),
        len(items),
        _top_k([e if isinstance(e, Entry) else e.read() for e in entries if e is not None]),
        _joined([item.reference_logps[slot] for slot in slots for item in items if item.reference_logps is not None]),
        labels,
        collate(scored, pad_id) if scored else None,
        _joined([a for item in items if item.reference_logps is not None for a in item.reference_logps[len(slots) :]]),
        notes=_joined([item.notes for item in items if item.notes is not None]),
    )


def _joined(arrays: list[Any]) -> Tensor | None:
    read = [array.read() if isinstance(array, StoredLogps) else array for array in arrays]
    return torch.from_numpy(np.concatenate(read)) if read else None


def _top_k(entries: list[Entry]) -> TopK | None:
    if not entries:
        return None
    logps = None
    if entries[0].teacher_logps is not None:
        logps = torch.cat([torch.as_tensor(e.teacher_logps, dtype=torch.float32) for e in entries])
    spans, span_logps = _spans(entries)
    return TopK(
        torch.cat([torch.as_tensor(e.ids, dtype=torch.int64) for e in entries]),
        torch.cat([torch.as_tensor(e.values, dtype=torch.float32) for e in entries]),
        logps,
        spans,
        span_logps,
    )


def _spans(entries: list[Entry]) -> tuple[Tensor | None, Tensor | None]:
    """Number the spans of all sequences one after the other."""
    if entries[0].spans is None or entries[0].span_logps is None:
        return None, None
    numbered, begun = [], 0
    for e in entries:
        assert e.spans is not None and e.span_logps is not None, "all of a batch's teachers have another tokenizer"
        numbered.append(torch.as_tensor(np.where(e.spans < 0, -1, e.spans + begun), dtype=torch.int64))
        begun += len(e.span_logps)
    return torch.cat(numbered), torch.cat([torch.as_tensor(e.span_logps, dtype=torch.float32) for e in entries])


def items_digest(items: Sequence[Item]) -> str:
    """Hash what is learned from, in its order: sequences, labels or rewards, notes, and who the teacher was.

    Nothing of a cache is read for it: what made the cache (its meta.json) stands for its entries.
    """
    digest = hashlib.sha256()
    for item in items:
        for tokens in chain(item.sequences, item.scored):
            digest.update(tokens.key)
        digest.update(repr(item.label).encode())
        digest.update(b"" if item.notes is None else item.notes.tobytes())
        for entry in item.entries:
            digest.update(b"entries" + _who(entry))
    return digest.hexdigest()[:16]


def _who(entry: Entry | Stored | None) -> bytes:
    """Return what tells a teacher's entries from another's; of arrays, the first token's values and the spans' do."""
    if entry is None:
        return b""
    if not isinstance(entry, Entry):
        return entry.identity()
    parts = [part[:1] for part in (entry.ids, entry.values, entry.tail)]
    return b"".join(part.tobytes() for part in (*parts, *(() if entry.span_logps is None else (entry.span_logps,))))


def supervised_sequence(tokens: Tokens | None, what: str, method: str, example: Example) -> Tokens:
    """Return the tokens, or refuse a row, by its place, that lacks what the method learns from."""
    if tokens is None:
        raise ValueError(
            f"{example.where}: loss={method} needs {what} in every row, and this one gives {held(example)}. Check "
            "datasets= and its format, or remove the row"
        )
    return tokens


def pair_of(example: Example, method: str) -> tuple[Tokens, Tokens]:
    """Return chosen and rejected, or refuse the row."""
    return (
        supervised_sequence(example.chosen, "chosen", method, example),
        supervised_sequence(example.rejected, "rejected", method, example),
    )
