"""What a token store knows of many rows at once: arrays in the order of the mix, for which no row is made.

Rows that lie in no table (a list of examples) are asked one by one for the same. Letters: n rows or items, S slots of
an item, Q sequences of an item: its slots and what is scored beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tokens.examples import Tokens, content_key, number_in

SIDES = ("chosen", "rejected", "response")
NUMBERS = ("label", "reward")
PROMPT = -1  # in the place of a side: the bare prompt
NOTHING = repr(None).encode()


class Sides(NamedTuple):
    """lengths [n, 3]: tokens of chosen, rejected and response, -1 where there is none; supervised [n, 3] of them.
    keys [n, 3, 16] uint8.
    """

    lengths: np.ndarray
    keys: np.ndarray
    supervised: np.ndarray


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known of all items of a method without making one.

    lengths [n, S]: the tokens of the sequences that are learned from; -1 where an item lacks one. make_keys gives the
    content keys [n, Q, 16] uint8, computed where they are first asked for. behind: the bytes that stand for what else
    an item has (label, notes, who its teachers are) in a digest of the data; by number where items differ in it.
    """

    lengths: np.ndarray
    make_keys: Callable[[], np.ndarray]
    behind: bytes | Callable[[int], bytes] = NOTHING

    @cached_property
    def keys(self) -> np.ndarray:
        """Return the content keys [n, Q, 16]."""
        return self.make_keys()

    def having(self, behind: bytes | Callable[[int], bytes]) -> "Columns":
        """Return the same items with something else behind their keys."""
        return replace(self, behind=behind, make_keys=lambda: self.keys)

    def rest(self, number: int) -> bytes:
        """Return what stands behind an item's keys."""
        return self.behind if isinstance(self.behind, bytes) else self.behind(number)


def sides_of(examples: Sequence[Any]) -> Sides:
    """Return what is known of the sides of examples: from their tables, or each one's where they lie in none."""
    if hasattr(examples, "sides"):
        return examples.sides()
    lengths, keys = np.full((len(examples), 3), -1, np.int32), np.zeros((len(examples), 3, 16), np.uint8)
    supervised = np.zeros((len(examples), 3), np.int32)
    for row, example in enumerate(examples):
        for side, name in enumerate(SIDES):
            tokens: Tokens | None = getattr(example, name)
            if tokens is not None:
                lengths[row, side], keys[row, side] = tokens.length, np.frombuffer(tokens.key, np.uint8)
                supervised[row, side] = tokens.num_supervised
    return Sides(lengths, keys, supervised)


class Prompts(NamedTuple):
    """lengths [n] of the prompts in tokens, and keys [n, 16] uint8: rows of one prompt have one key."""

    lengths: np.ndarray
    keys: np.ndarray

    @property
    def groups(self) -> np.ndarray:
        """Return a number [n] a row that rows of one prompt share."""
        return groups_of(self.keys)


def prompts_of(examples: Sequence[Any]) -> Prompts:
    """Return what is known of the prompts of examples."""
    if hasattr(examples, "prompts"):
        return examples.prompts()
    ids = [example.prompt for example in examples]
    keys = b"".join(content_key(prompt, ()) for prompt in ids)
    return Prompts(np.array([len(p) for p in ids], np.int32), np.frombuffer(keys, np.uint8).reshape(-1, 16))


def groups_of(keys: np.ndarray) -> np.ndarray:
    """Number equal keys [n, 16] alike [n]."""
    halves = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    new = np.ones(len(order), np.int64)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    found = np.empty(len(order), np.int64)
    found[order] = np.cumsum(new) - 1
    return found


def numbers_of(examples: Sequence[Any], name: str, rows: np.ndarray, read: Callable[[Any], float]) -> np.ndarray:
    """Return the label or the reward [m] that the rows of these numbers [m] have beside their text.

    A row without a number there is read: `read` knows what to make of it, and says what is wrong.
    """
    if not hasattr(examples, "numbers"):
        return np.array([read(examples[i]) for i in rows.tolist()], np.float64)
    found = examples.numbers()[rows, NUMBERS.index(name)]
    for place in np.flatnonzero(np.isnan(found)).tolist():
        found[place] = read(examples[int(rows[place])])
    return found


def numbers_in(meta: dict[Any, Any]) -> tuple[float, float]:
    """Return a row's label and its reward (its label, where it has no column `reward`); nan where it is no number."""
    return number_in(meta.get("label")), number_in(meta.get("reward", meta.get("label")))


def part_of(examples: Sequence[Any], row: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of a side of a row, or of its bare prompt (PROMPT), as arrays."""
    if hasattr(examples, "part"):
        return examples.part(row, side)
    example = examples[row]
    if side == PROMPT:
        return np.asarray(example.prompt, np.int32), np.zeros(len(example.prompt), np.bool_)
    return getattr(example, SIDES[side]).arrays()


def keys_from(parts: Callable[[int], tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
    """Hash `count` sequences, given as ids and masks, to keys [count, 16] uint8."""
    return np.frombuffer(b"".join(content_key(*parts(i)) for i in range(count)), np.uint8).reshape(-1, 16)


def taken(sides: Sides, slots: np.ndarray, rows: np.ndarray | None = None) -> Columns:
    """Return the columns of items that take the side `slots` [n, S] of the row of their number, or of `rows` [n];
    lengths are -1 where there is none.
    """
    at = np.arange(len(slots))[:, None] if rows is None else rows[:, None]
    return Columns(sides.lengths[at, slots], lambda: sides.keys[at, slots])


def side_numbers(count: int, *names: str) -> np.ndarray:
    """Return slots [count, S] that are the same sides in every row."""
    return np.tile([SIDES.index(name) for name in names], (count, 1))


def labeled(columns: Columns, labels: np.ndarray) -> Columns:
    """Return the columns of items that have a label or reward [n] and nothing else beside their sequences."""
    return columns.having(lambda number: repr(float(labels[number])).encode())


def either(sides: Sides, *names: str) -> np.ndarray:
    """Return of each row [n] the first of these sides that it has; PROMPT where it has none."""
    found = np.full(len(sides.lengths), PROMPT, np.int64)
    for name in reversed(names):
        side = SIDES.index(name)
        found[sides.lengths[:, side] >= 0] = side
    return found


def with_prompts(examples: Sequence[Any], sides: Sides, slots: np.ndarray, rows: np.ndarray) -> Columns:
    """Return the columns of items that take the side `slots` [n, S] of the rows [n], or the bare prompt (PROMPT)."""
    bare, at = slots == PROMPT, rows[:, None]
    lengths = sides.lengths[at, slots]
    lengths[bare] = np.broadcast_to(prompts_of(examples).lengths[at], slots.shape)[bare]

    def keys() -> np.ndarray:
        found = sides.keys[at, slots]
        places = np.argwhere(bare)
        found[bare] = keys_from(lambda i: part_of(examples, int(rows[places[i, 0]]), PROMPT), len(places))
        return found

    return Columns(lengths, keys)
