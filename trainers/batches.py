"""What a trainer steps on: items (one example each, with teacher signals) and padded batches.

An item has S slots, one sequence each (DPO: chosen, rejected; ADPA: chosen, generated). A batch lays them slot after
slot: rows 0..B-1 are slot 0 of the B items, rows B..2B-1 slot 1, so every response token's slot is `rows // B`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dataloader import Sequences, Tokens, TopK, collate, unsupervised
from teacher_cache import Entry


class Item(NamedTuple):
    """One example: a sequence per slot, the teacher's entries per slot (or None), reference log-probs per slot."""

    sequences: tuple[Tokens, ...]
    entries: tuple[Entry | None, ...] = ()
    reference_logps: tuple[float, ...] | None = None

    def filler(self) -> "Item":
        """Return the same shapes with nothing supervised: all ranks step together, this one counts nowhere."""
        return Item(tuple(unsupervised(s) for s in self.sequences), (), tuple(0.0 for _ in self.sequences))


class Batch(NamedTuple):
    """S*B padded rows, slot after slot; teacher entries flat over the tokens of the slots that have them."""

    sequences: Sequences
    num_items: int
    teacher: TopK | None
    reference_logps: Tensor | None

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
        return Batch(
            Sequences(*(t.to(device) for t in self.sequences)),
            self.num_items,
            None if self.teacher is None else _moved(self.teacher, device),
            None if self.reference_logps is None else self.reference_logps.to(device),
        )


def _moved(teacher: TopK, device: torch.device) -> TopK:
    logps = None if teacher.teacher_logps is None else teacher.teacher_logps.to(device)
    return TopK(teacher.ids.to(device), teacher.values.to(device), logps)


def make_batch(items: Sequence[Item], pad_id: int, with_reference: bool) -> Batch:
    """Pad the items and lay them slot after slot."""
    slots = range(len(items[0].sequences))
    sequences = collate([item.sequences[slot] for slot in slots for item in items], pad_id)
    entries = [
        item.entries[slot] for slot in slots for item in items if item.entries and item.entries[slot] is not None
    ]
    reference = None
    if with_reference:
        values = [item.reference_logps[slot] for slot in slots for item in items if item.reference_logps is not None]
        reference = torch.tensor(values, dtype=torch.float32)
    return Batch(sequences, len(items), _top_k([e for e in entries if e is not None]), reference)


def _top_k(entries: list[Entry]) -> TopK | None:
    if not entries:
        return None
    logps = None
    if entries[0].teacher_logps is not None:
        logps = torch.cat([torch.as_tensor(e.teacher_logps, dtype=torch.float32) for e in entries])
    return TopK(
        torch.cat([torch.as_tensor(e.ids, dtype=torch.int64) for e in entries]),
        torch.cat([torch.as_tensor(e.values, dtype=torch.float32) for e in entries]),
        logps,
    )
