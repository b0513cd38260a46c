"""What a token store knows of many rows at once: arrays in the order of the mix, for which no row is made.

Letters: n rows, S slots of an item.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tokens.examples import Tokens

SIDES = ("chosen", "rejected", "response")


class Sides(NamedTuple):
    """lengths [n, 3]: tokens of chosen, rejected and response, -1 where there is none. keys [n, 3, 16] uint8."""

    lengths: np.ndarray
    keys: np.ndarray


class Columns(NamedTuple):
    """What is known of all items of a method without making one.

    keys [n, S, 16] uint8: the content keys of the sequences. lengths [n, S]: their tokens. entries: what tells the
    teachers of each slot from others, the same in every item; () without a teacher.
    """

    keys: np.ndarray
    lengths: np.ndarray
    entries: tuple[bytes, ...] = ()


def sides_of(examples: Sequence[Any]) -> Sides:
    """Return what is known of the sides of examples: from their tables, or each one's where they lie in none."""
    if hasattr(examples, "sides"):
        return examples.sides()
    lengths, keys = np.full((len(examples), 3), -1, np.int32), np.zeros((len(examples), 3, 16), np.uint8)
    for row, example in enumerate(examples):
        for side, name in enumerate(SIDES):
            tokens: Tokens | None = getattr(example, name)
            if tokens is not None:
                lengths[row, side], keys[row, side] = tokens.length, np.frombuffer(tokens.key, np.uint8)
    return Sides(lengths, keys)


def taken(sides: Sides, slots: np.ndarray) -> Columns:
    """Return the columns of items that take the side `slots` [n, S] of each row; lengths are -1 where there is none."""
    rows = np.arange(len(slots))[:, None]
    return Columns(sides.keys[rows, slots], sides.lengths[rows, slots])


def side_numbers(count: int, *names: str) -> np.ndarray:
    """Return slots [count, S] that are the same sides in every row."""
    return np.tile([SIDES.index(name) for name in names], (count, 1))
