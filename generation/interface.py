"""What every backend takes and gives: prompts as token ids in, responses as token ids out.

A backend is an object with `answers(prompts, wanted, seed)` and `close()`. The first yields an Answer for each wanted
prompt as soon as it is there. Everything else (order on disk, resume, rows) is the task's.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from templates import special_ids

Response = tuple[list[int], str]  # response ids with the end-of-turn token, and "stop" or "length"


class Answer(NamedTuple):
    """The response to prompt `number`, and what its backend knows of it.

    `logps`: log-probability of each response id under the full softmax at temperature 1; None where the backend does
    not say. `from_text`: a server gave no ids, so they were made from its text.
    """

    number: int
    ids: list[int]
    finish_reason: str
    logps: list[float] | None = None
    from_text: bool = False


class Backend(Protocol):
    """A generator of responses."""

    def answers(self, prompts: Sequence[list[int]], wanted: Collection[int], seed: int) -> Iterator[Answer]:
        """Yield the response to every prompt whose index is wanted, in any order."""

    def close(self) -> None:
        """Free what the backend holds (memory of a GPU, connections)."""


def cut(ids: list[int], stop: Sequence[int]) -> Response:
    """Cut after the first stop id; without one the response ran into max_new_tokens."""
    for i, token in enumerate(ids):
        if token in stop:
            return ids[: i + 1], "stop"
    return ids, "length"


def forbidden_ids(tokenizer: Any, stop: Sequence[int], vocab_size: int, width: int) -> Tensor:
    """Mark what no response may hold, [width] bool: padding of the vocabulary, and special tokens that end no turn."""
    forbidden = torch.zeros(width, dtype=torch.bool)
    forbidden[vocab_size:] = True
    special = {tokenizer.pad_token_id, *special_ids(tokenizer)} - set(stop)
    forbidden[sorted(i for i in special if i is not None and i < width)] = True
    return forbidden


def derived_seed(seed: int, index: int) -> int:
    """Return the seed of one request or batch, below 2**62: a function of the run's seed and its index alone."""
    return int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(seed * 1_000_003 + index)))


def length_batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Return the indices of each batch: longest prompts first, so that little is padding and memory runs out early."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Progress:
    """A progress bar over responses that shows tokens per second."""

    def __init__(self, total: int, done: int) -> None:
        self.bar = tqdm(total=total, initial=done, desc="generate", unit="response", mininterval=1)
        self.tokens, self.start = 0, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def tokens_per_second(self) -> float:
        """Return generated tokens per second so far."""
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    def add(self, ids: list[int]) -> None:
        """Count one response."""
        self.tokens += len(ids)
        self.bar.set_postfix_str(f"{self.tokens_per_second:.0f} tokens/s", refresh=False)
        self.bar.update()
