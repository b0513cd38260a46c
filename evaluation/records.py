"""What is known of a model after it was asked: its responses by temperature, and its metrics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from conversations import Conversation


class Responses(NamedTuple):
    """One response to each held-out prompt, in their order; scores are empty without a verifier."""

    texts: list[str]
    num_tokens: list[int]
    ended: list[bool]
    scores: list[float]


class Evaluated(NamedTuple):
    """All that is known of one model: its responses by temperature, and its metrics on the pairs."""

    prompts: list[str]
    conversations: list[Conversation]
    responses: dict[float, Responses]
    pair_metrics: dict[str, Any]
    majority_scores: list[float] = []  # of the most frequent answer to each prompt, where it was asked for
    latency: list[dict[str, Any]] = []  # a row a backend and batch size
    benchmarks: dict[str, Any] = {}  # metrics of lm-evaluation-harness by task


def main_temperature(temperatures: Sequence[float]) -> float | None:
    """Return the temperature of the top-level score: 1 where it was asked for, else the first; None without any."""
    return 1.0 if 1.0 in temperatures else next(iter(temperatures), None)
