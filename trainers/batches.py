"""What a trainer steps on: items (one example each, with teacher signals) and padded batches.

An item has S slots, one sequence each (DPO: chosen, rejected; ADPA: chosen, generated). A batch lays them slot after
slot: rows 0..B-1 are slot 0 of the B items, rows B..2B-1 slot 1, so every response token's slot is `rows // B`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from dataloader import Example, Tokens, TopK
from forward.rows import Sequences, collate, mapped, unsupervised
from teacher.lookup import Stored, StoredLogps
from teacher.quantities import Entry
from tokens.columns import Columns, side_numbers, sides_of, taken
from tokens.examples import held


class Item(NamedTuple):
    """One example: a sequence per slot, and what belongs to it.

    entries: the teacher's entries per slot (or None). reference_logps: the reference's log-probability of every
    response token, an array per slot, then one per `scored` sequence. Both may stand in a cache, where they are read
    when a batch is made. label: 1 desirable, 0 undesirable, or a reward.
    scored: sequences that are scored without learning from them (KTO's mismatched response). notes [n, F]: what a
    method noted of each response token when it was written (PPO's old log-probability, advantage, ...). source: the
    number of the example that this item was made of (-1: a filler). sampler_logps: the log-probability of each response
    token by who sampled it, where that was not the policy as it stands.
    """

    sequences: tuple[Tokens, ...]
    entries: tuple[Entry | Stored | None, ...] = ()
    reference_logps: tuple[np.ndarray | StoredLogps, ...] | None = None
    label: float | None = None
    scored: tuple[Tokens, ...] = ()
    notes: np.ndarray | None = None
    source: int = 0
    sampler_logps: np.ndarray | None = None

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
    """Items that are made when they are asked for, by their number; `columns` is what is known of them before."""

    def __init__(self, count: int, make: Callable[[int], Item], columns: Columns | None = None) -> None:
        self.size, self.make, self.columns = count, make, columns

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


def checked(count: int, make: Callable[[int], Item], columns: Columns | None = None) -> Items:
    """Refuse a row that lacks something before the first step; no item is kept.

    With columns only items that lack a sequence are made, for what `make` says of them; without, every item is, once.
    """
    items = Items(count, make, columns)
    for i in range(count) if columns is None else np.flatnonzero((columns.lengths < 0).any(axis=1)).tolist():
        make(i)
    return items


def pair_items(examples: Sequence[Example], method: str) -> Items:
    """Take chosen and rejected of every row, or refuse the row that lacks one."""
    columns = taken(sides_of(examples), side_numbers(len(examples), "chosen", "rejected"))
    return checked(len(examples), lambda i: Item(pair_of(examples[i], method)), columns)


def columns_of(items: Sequence[Item]) -> Columns | None:
    """Return what is known of the items without making one; None if nothing is."""
    return items.columns if isinstance(items, Items) else None


def num_tokens(items: Sequence[Item]) -> int:
    """Count the tokens of all sequences that are learned from."""
    columns = columns_of(items)
    if columns is not None:
        return int(columns.lengths.sum(dtype=np.int64))
    return sum(tokens.length for item in items for tokens in item.sequences)


def joined(first: Sequence[Item], second: Sequence[Item]) -> Items:
    """Return the items of both, one after the other."""
    size, parts, columns = len(first), [columns_of(items) for items in (first, second) if len(items)], None
    known = [part for part in parts if part is not None]
    if known and len(known) == len(parts) and len({part.lengths.shape[1] for part in known}) == 1:
        lengths = np.concatenate([part.lengths for part in known])
        rest: Any = known[0].behind
        if len({part.behind for part in known}) > 1 or callable(rest):
            rest = lambda i: known[0].rest(i) if i < len(known[0].lengths) else known[-1].rest(i - size)  # noqa: E731
        columns = Columns(lengths, lambda: np.concatenate([part.keys for part in known]), rest)
    return Items(size + len(second), lambda i: first[i] if i < size else second[i - size], columns)


class Counted(NamedTuple):
    """What a slot has that counts: supervised tokens, and items that have any."""

    tokens: int
    items: int


class Batch(NamedTuple):
    """S*B padded rows, slot after slot, and what belongs to them.

    teacher: entries, flat over the tokens of the slots that have them. reference_logps [N]: flat over the response
    tokens. labels [B]. scored: rows without learning, with their reference_logps. shared: what a method found out
    over the whole global batch (KTO's z_0, the rank partners of AOT, ...). notes [N, F]: flat over the response tokens.
    """

    sequences: Sequences
    num_items: int
    counted: tuple[Counted, ...]  # of each slot
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
        return self.counted[slot].tokens

    def num_supervised(self, slot: int) -> int:
        """Count the items whose `slot` has a supervised token."""
        return self.counted[slot].items

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor; from pinned memory without waiting."""
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Lay every tensor where a GPU can fetch it by itself."""
        return mapped(self, Tensor.pin_memory)


def cost_of(item: Item, packing: str) -> int:
    """Return how many tokens an item costs: of all that is scored, a prompt that its slots share counted once."""
    lengths = [tokens.length for tokens in (*item.sequences, *item.scored)]
    if packing != "prompts" or len(item.sequences) < 2:
        return sum(lengths)
    prompt = min(tokens.length - tokens.num_supervised for tokens in item.sequences)
    return sum(lengths) - prompt * (len(item.sequences) - 1)


def make_batch(items: Sequence[Item], pad_id: int, packing: str = "none") -> Batch:
    """Pad the items and lay them slot after slot; `packing`: lay them without padding, too (forward/packing.py)."""
    first = items[0]
    slots = range(len(first.sequences))
    entries = [item.entries[slot] for slot in slots for item in items if item.entries]
    scored = [tokens for item in items for tokens in item.scored]
    labels = None if first.label is None else torch.tensor([float(item.label or 0.0) for item in items])
    return Batch(
        collate([item.sequences[slot] for slot in slots for item in items], pad_id, packing),
        len(items),
        tuple(_counted([item.sequences[slot].num_supervised for item in items]) for slot in slots),
        _top_k([e if isinstance(e, Entry) else e.read() for e in entries if e is not None]),
        _joined([item.reference_logps[slot] for slot in slots for item in items if item.reference_logps is not None]),
        labels,
        collate(scored, pad_id, packing) if scored else None,
        _joined([a for item in items if item.reference_logps is not None for a in item.reference_logps[len(slots) :]]),
        notes=_joined([item.notes for item in items if item.notes is not None]),
    )


def _counted(supervised: list[int]) -> Counted:
    return Counted(sum(supervised), sum(1 for number in supervised if number))


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
    digest, columns = hashlib.sha256(), columns_of(items)
    if columns is not None:  # the same bytes as below, of many items at once
        keys = columns.keys.reshape(len(columns.keys), -1)
        for start in range(0, len(keys), 65536):
            part = keys[start : start + 65536]
            if isinstance(columns.behind, bytes):
                rests = np.tile(np.frombuffer(columns.behind, np.uint8), (len(part), 1))
                digest.update(np.hstack([part, rests]).tobytes())
            else:
                digest.update(b"".join(k.tobytes() + columns.behind(start + i) for i, k in enumerate(part)))
        return digest.hexdigest()[:16]
    for item in items:
        for tokens in chain(item.sequences, item.scored):
            digest.update(tokens.key)
        digest.update(repr(item.label).encode())
        digest.update(b"" if item.notes is None else item.notes.tobytes())
        digest.update(asked(map(_who, item.entries)))
    return digest.hexdigest()[:16]


def asked(teachers: Iterable[bytes]) -> bytes:
    """Return what stands for the teachers of an item's slots in a digest; b"" for a slot without one."""
    return b"".join(b"entries" + who for who in teachers)


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
