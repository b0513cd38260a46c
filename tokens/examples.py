"""A tokenized row and its sequences: the one form in which data reaches a method, wherever it lies.

What a method sees are Python lists. Where rows lie in a token store (tokens/store.py) they are made when they are asked
for, and a sequence knows its key, its length and how much of it is supervised without being read.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conversations import Conversation


def content_key(ids: Sequence[int] | np.ndarray, response: Sequence[bool] | np.ndarray) -> bytes:
    """Hash token ids and response mask to 16 bytes: the same text under another template or cut has another key."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.asarray(ids, dtype=np.int32).tobytes())
    digest.update(np.asarray(response, dtype=np.bool_).tobytes())
    return digest.digest()


def number_in(value: object) -> float:
    """Return a number as a float; nan for what is none, or is too large."""
    try:
        return float(value) if isinstance(value, (bool, int, float)) else float("nan")
    except OverflowError:
        return float("nan")


@dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenized conversation: ids, and True where a token is supervised (the end of turn included)."""

    ids: list[int]
    response: list[bool]

    def __iter__(self) -> Iterator[list[int] | list[bool]]:
        return iter((self.ids, self.response))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and self.ids == other.ids and self.response == other.response

    __hash__ = None  # type: ignore[assignment]  # lists: `key` names a sequence

    @property
    def key(self) -> bytes:
        """Return the content key."""
        return content_key(self.ids, self.response)

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        return sum(self.response)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [T] int32 and mask [T] bool."""
        return np.asarray(self.ids, np.int32), np.asarray(self.response, np.bool_)


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenized row: the prompt's ids (generation prompt included), the sequences that continue it, and its place."""

    prompt: list[int]
    chosen: Tokens | None
    rejected: Tokens | None
    response: Tokens | None
    conversation: Conversation
    where: str = ""


def held(example: Example) -> str:
    """Say what a row gives to learn from, and which columns it has beside that."""
    found = [name for name in ("chosen", "rejected", "response") if getattr(example, name) is not None]
    others = ", ".join(map(str, example.conversation.meta))
    return " and ".join(["a prompt", *found]) + (f" (other columns: {others})" if others else "")
