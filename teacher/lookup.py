"""What methods with a teacher share: a verified cache whose entries are read when a batch is made, and generations
found by their prompt's ids.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from dataloader import Example, Tokens
from models import tokenizer_digest
from teacher.cache import IDENTITY, Reader
from teacher.hub import cache_folder
from teacher.mixture import summed
from teacher.quantities import Entry
from tokens.columns import groups_of, prompts_of
from tokens.generations import GeneratedSequences


def open_cache(folder: str, quantity: str, tokenizer: Any) -> Reader:
    """Open a teacher cache; ValueError if it holds another quantity or was made with another tokenizer."""
    expected: dict[str, object] = {"quantity": quantity, "tokenizer_digest": tokenizer_digest(tokenizer)}
    return Reader(cache_folder(folder), expected, decode=tokenizer.decode)


@lru_cache(maxsize=8)
def identity_of(reader: Reader) -> bytes:
    """Hash what decides a sequence's entries: teachers, quantity, K, precision; not which others the cache holds."""
    stored = {key: getattr(reader.meta, key) for key in IDENTITY if key != "data_digest"}
    return hashlib.sha256(json.dumps(stored, sort_keys=True, default=str).encode()).digest()[:16]


class Stored(Protocol):
    """A sequence's entries where they lie."""

    def read(self) -> Entry:
        """Read them."""

    def identity(self) -> bytes:
        """Return what tells them from another teacher's, without reading them."""


class StoredEntry(NamedTuple):
    """A sequence's entries in a cache of log-probabilities or advantages."""

    reader: Reader
    tokens: Tokens

    def read(self) -> Entry:
        """Read ids, values and tail (and teacher_logps) of every response token."""
        return entry_of(self.reader, self.tokens)

    def identity(self) -> bytes:
        """Return the cache's identity."""
        return identity_of(self.reader)


def stored_entry(reader: Reader, tokens: Tokens) -> StoredEntry:
    """Find a sequence's entries, by its key alone; ValueError shows the nearest sequence where there are none."""
    check_held(reader, tokens)
    return StoredEntry(reader, tokens)


def check_held(reader: Reader, tokens: Tokens) -> None:
    """ValueError shows the nearest sequence where a cache has no entries for this one; only keys are looked at."""
    if not reader.holds(tokens.key):
        raise ValueError(reader.explain(tokens.ids, tokens.response))


def entry_of(reader: Reader, tokens: Tokens) -> Entry:
    """Read the K entries a token that a cache of log-probabilities or advantages holds of a sequence."""
    return Entry(**reader.get(tokens.ids, tokens.response))


class StoredSum(NamedTuple):
    """A sequence's advantages in several caches, as one weighted sum."""

    parts: tuple[StoredEntry, ...]
    weights: tuple[float, ...]

    def read(self) -> Entry:
        """Read what each cache says, and sum it up."""
        return summed([part.read() for part in self.parts], self.weights)

    def identity(self) -> bytes:
        """Return the caches' identities and their weights."""
        return b"".join(part.identity() for part in self.parts) + repr(self.weights).encode()


class StoredLogps(NamedTuple):
    """A sequence's log-probabilities under the reference, in a cache of quantity token_logp."""

    reader: Reader
    tokens: Tokens

    def read(self) -> np.ndarray:
        """Read one number a response token [L] float32."""
        return self.reader.get(self.tokens.ids, self.tokens.response)["logps"]


class StoredColumns(NamedTuple):
    """A sequence's numbers in one cache or several of one number a token, as K = len(readers) entries with the id 0."""

    readers: tuple[Reader, ...]
    tokens: Tokens
    array: str  # which array of the quantity

    def read(self) -> Entry:
        """Read the numbers [L, K] of every response token."""
        found = [reader.get(self.tokens.ids, self.tokens.response)[self.array] for reader in self.readers]
        values = np.stack(found, axis=1)
        return Entry(np.zeros(values.shape, np.int64), values, np.zeros(len(values), np.float32))

    def identity(self) -> bytes:
        """Return the caches' identities."""
        return b"".join(map(identity_of, self.readers))


def stored_columns(readers: tuple[Reader, ...], tokens: Tokens, array: str) -> StoredColumns:
    """Find a sequence's numbers, by its key alone; ValueError shows the nearest sequence where a cache has none."""
    for reader in readers:
        check_held(reader, tokens)
    return StoredColumns(readers, tokens, array)


def check_generated(generations: GeneratedSequences, examples: Sequence[Example], source: str) -> None:
    """Refuse rows whose prompt has no generation; the first of them is shown.

    Rows are joined by content, never by position: another template, truncation or data set has other ids.
    """
    rows, answered = prompts_of(examples).keys, generations.prompt_keys()
    groups = groups_of(np.concatenate([rows, answered]))
    missing = np.flatnonzero(~np.isin(groups[: len(rows)], groups[len(rows) :]))
    if len(missing):
        first = examples[int(missing[0])]
        raise ValueError(
            f"{source}: {len(missing)} of {len(examples)} prompts have no generation. The first: "
            f"{first.conversation.prompt[-1]['content'][:120]!r} ({len(first.prompt)} tokens). Generate for the same "
            "data, template, model.max_prompt_length and n_examples"
        )
