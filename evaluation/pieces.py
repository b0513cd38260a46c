"""Pieces of an evaluation that several processes share: each is asked for once, found again by what decides its answer.

A piece is a batch of prompts to answer, a batch of pairs to rank, or a benchmark. Whatever a killed run has answered is
taken, with whatever number of processes the same command goes on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tqdm import tqdm

from settings.parts import Parts, share_of, wait_for


class Piece(NamedTuple):
    """A piece of work: its name, and what gives its answer (anything that JSON holds)."""

    key: str
    work: Callable[[], Any]


def key_of(*facts: Any) -> str:
    """Name a piece by everything that decides its answer: digests, prompts, sampling, seed."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Ledger:
    """The answers that this process knows, and where it writes its own."""

    def __init__(self, parts: Parts, rank: int, world_size: int) -> None:
        self.parts, self.rank, self.world_size = parts, rank, world_size
        self.known: dict[str, Any] = {}
        self.dealt = 0
        self.look()

    def look(self) -> None:
        """Read what all processes have written so far."""
        self.known |= {row["key"]: row["answer"] for _, row in self.parts.rows()}

    def share(self, pieces: list[Piece], label: str = "") -> None:
        """Do this process's share of the pieces, where they are not known; deal on where the last list ended.

        label: of a bar that shows how far it is; empty for none.
        """
        first = (self.rank - self.dealt) % self.world_size
        self.dealt += len(pieces)
        share = share_of(pieces, first, self.world_size)
        for piece in tqdm(share, desc=label, mininterval=1, disable=not label):
            if piece.key not in self.known:
                self.known[piece.key] = piece.work()
                self.parts.append({"key": piece.key, "answer": self.known[piece.key]})

    def wait(self, pieces: Iterable[Piece]) -> None:
        """Return when all pieces are known, whoever does them."""
        keys = {piece.key for piece in pieces}

        def there() -> bool:
            if not keys <= self.known.keys():
                self.look()
            return keys <= self.known.keys()

        wait_for(there)

    def answers(self, pieces: list[Piece]) -> list[Any]:
        """Return the answers of pieces that are known, in their order."""
        return [self.known[piece.key] for piece in pieces]
