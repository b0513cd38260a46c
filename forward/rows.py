"""A batch of sequences: padded rows, what of them is predicted, and the same without padding.

Letters: B rows, T tokens of a padded row, N response tokens of the batch (flat, row after row).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from forward.packing import Layout, Packed, pack
from tokens.examples import Tokens


class Predicted(NamedTuple):
    """The response tokens: rows [N] and columns [N] of what predicts each, and the ids themselves, targets [N].

    THE one place of the next-token shift: position t predicts token t+1. Columns lie in [start, stop).
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor
    start: int
    stop: int


class Sequences(NamedTuple):
    """Right-padded rows: ids [B, T] int64, attention [B, T] bool, response [B, T] bool (supervised tokens).

    predicted: what `collate` found while the tokens were on the host. packed: the same tokens without padding.
    """

    ids: Tensor
    attention: Tensor
    response: Tensor
    predicted: Predicted | None = None
    packed: Packed | None = None

    def to(self, device: torch.device | str) -> "Sequences":
        """Move every tensor."""
        return mapped(self, lambda tensor: tensor.to(device, non_blocking=True))

    def predictions(self) -> Predicted:
        """Return what is predicted; found anew (a read on the host) for rows that `collate` did not make."""
        return self.predicted or predicted(self.ids, self.response)


def mapped(part: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a named tuple, however deep; what is none stays as it is."""
    if isinstance(part, tuple) and hasattr(part, "_make"):
        return part._make(mapped(entry, function) for entry in part)
    if isinstance(part, Layout):
        return part.mapped(function)
    return function(part) if isinstance(part, Tensor) else part


def predicted(ids: Tensor, response: Tensor) -> Predicted:
    """Find what predicts the response tokens of ids [B, T]; a first token is predicted by nothing."""
    rows, columns = response[:, 1:].nonzero(as_tuple=True)
    bounds = (int(columns.min()), int(columns.max()) + 1) if len(columns) else (ids.shape[1] - 1, ids.shape[1])
    return Predicted(rows, columns, ids[rows, columns + 1] if len(columns) else ids.new_zeros(0), *bounds)


def collate(rows: Sequence[Tokens], pad_id: int, packing: str = "none") -> Sequences:
    """Pad rows on the right, and lay them without padding as `packing` says (forward/packing.py)."""
    longest = max(row.length for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    attention = np.zeros((len(rows), longest), bool)
    response = np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        own, mask = row.arrays()
        ids[i, : len(own)] = own
        attention[i, : len(own)] = True
        response[i, : len(own)] = mask
    tensors = torch.from_numpy(ids), torch.from_numpy(attention), torch.from_numpy(response)
    packed = None if packing == "none" else pack(rows, packing)
    return Sequences(*tensors, predicted(tensors[0], tensors[2]), packed)


def unsupervised(tokens: Tokens) -> Tokens:
    """Return the sequence with nothing supervised: it fills a batch and counts nowhere."""
    return Tokens(tokens.ids, [False] * len(tokens.ids))
