"""Rows without padding: every sequence of a batch in one row, and a prompt that several of them begin with in it once.

The row is cut into segments. A segment sees itself causally, and the whole of the one segment that stands before it: a
response sees its prompt, another response to the same prompt does not. Letters: L tokens of the packed row, N response
tokens of the batch (flat, row after row), S segments.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokens.examples import Tokens

MODES = ("none", "rows", "prompts")


@dataclass(frozen=True)
class Layout:
    """The segments of a packed row: how long each is, and which one stands before it (-1: none).

    keys [K], query_starts [S + 1], key_starts [S + 1]: the same for attention kernels that take rows of any length: the
    places in the packed row of what each segment sees, one segment's after the other's.
    """

    lengths: tuple[int, ...]
    before: tuple[int, ...]
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor

    @property
    def shares(self) -> bool:
        """Tell whether any segment has another one before it."""
        return any(place >= 0 for place in self.before)

    def seen(self, number: int) -> int:
        """Return how many tokens the last token of a segment sees."""
        place = self.before[number]
        return self.lengths[number] + (self.lengths[place] if place >= 0 else 0)

    @cached_property
    def _masks(self) -> dict[tuple[Any, ...], Tensor]:
        return {}

    def mask(self, number: int, like: Tensor) -> Tensor | None:
        """Return what is added to a segment's attention scores [queries, keys]; made once for all layers.

        None for a segment with nothing before it, or of one token, which sees all.
        """
        queries, keys = self.lengths[number], self.seen(number)
        if queries == 1 or keys == queries:
            return None
        key = (queries, keys, like.dtype, like.device)
        if key not in self._masks:
            unseen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).triu(keys - queries + 1)
            self._masks[key] = torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(
                unseen, -torch.inf
            )
        return self._masks[key]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Layout":
        """Apply a function to the tensors."""
        tensors = self.keys, self.query_starts, self.key_starts
        return Layout(self.lengths, self.before, *map(function, tensors))


class Packed(NamedTuple):
    """ids [1, L], positions [1, L]; places [N] in it of what predicts the response tokens; and its segments."""

    ids: Tensor
    positions: Tensor
    places: Tensor
    layout: Layout


class _Row(NamedTuple):
    """What is computed of a sequence: its ids up to the last one that predicts, the prompt's length, what predicts."""

    ids: np.ndarray
    prompt: int
    predicts: np.ndarray


def _needed(tokens: Tokens) -> _Row | None:
    """Return the part of a sequence that is computed; None without a token to predict."""
    ids, response = tokens.arrays()
    predicts = np.flatnonzero(np.asarray(response)[1:])
    if not len(predicts):
        return None
    return _Row(np.asarray(ids[: predicts[-1] + 1], np.int64), int(predicts[0]) + 1, predicts)


def pack(rows: Sequence[Tokens], mode: str) -> Packed:
    """Lay the sequences one after the other; mode `prompts` lays a prompt that several begin with once."""
    needed = [row for row in map(_needed, rows) if row is not None]
    if not needed:  # the graph stays whole: one token, of which nothing is learned
        needed = [_Row(np.asarray(rows[0].arrays()[0][:1], np.int64), 1, np.zeros(0, np.int64))]
    prompts = [row.ids[: row.prompt].tobytes() for row in needed]
    shared = Counter(prompts) if mode == "prompts" else Counter()
    builder = _Builder()
    for row, prompt in zip(needed, prompts, strict=True):
        builder.add(row, prompt if shared[prompt] > 1 else None)
    return builder.packed()


class _Builder:
    """A packed row that grows by sequences."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.starts: list[int] = []
        self.before: list[int] = []
        self.length = 0
        self.prompts: dict[bytes, int] = {}

    def segment(self, ids: np.ndarray, first_position: int, before: int) -> int:
        """Add a segment; return its number."""
        self.ids.append(ids)
        self.positions.append(np.arange(first_position, first_position + len(ids)))
        self.starts.append(self.length)
        self.before.append(before)
        self.length += len(ids)
        return len(self.ids) - 1

    def add(self, row: _Row, prompt: bytes | None) -> None:
        """Add a sequence; `prompt`: what it shares with others, or None."""
        if prompt is None:
            start = self.starts[self.segment(row.ids, 0, -1)]
            self.places.append(start + row.predicts)
            return
        if prompt not in self.prompts:
            self.prompts[prompt] = self.segment(row.ids[: row.prompt], 0, -1)
        number = self.prompts[prompt]
        last_of_prompt = self.starts[number] + row.prompt - 1
        rest = row.ids[row.prompt :]
        start = self.starts[self.segment(rest, row.prompt, number)] if len(rest) else 0
        inside = row.predicts >= row.prompt
        self.places.append(np.where(inside, start + row.predicts - row.prompt, last_of_prompt))

    def packed(self) -> Packed:
        """Return the row."""
        lengths = [len(part) for part in self.ids]
        seen = []
        for number, place in enumerate(self.before):
            if place >= 0:
                seen.append(np.arange(self.starts[place], self.starts[place] + lengths[place]))
            seen.append(np.arange(self.starts[number], self.starts[number] + lengths[number]))
        whole = [n + (lengths[place] if place >= 0 else 0) for n, place in zip(lengths, self.before, strict=True)]
        layout = Layout(
            tuple(lengths),
            tuple(self.before),
            torch.from_numpy(np.concatenate(seen)),
            _starts(lengths),
            _starts(whole),
        )
        joined = (torch.from_numpy(np.concatenate(parts)) for parts in (self.ids, self.positions, self.places))
        ids, positions, places = joined
        return Packed(ids.unsqueeze(0), positions.unsqueeze(0), places, layout)


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
