"""What can be said of responses without judging them: refusals, lengths, repetition.

Words are what stands between white space; a phrase is sought in lower case, with plain apostrophes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.intervals import proportion_interval

OPENING = 150  # characters of a response in which a refusal is sought: later on the same words are mostly quoted
GRAM = 4  # words
TURNS = 3  # a loop says its unit at least so often
LONGEST_WORDS, SHORTEST_WORDS = 32, 8  # the longest unit of a loop, and the shortest loop, in words
LONGEST_CHARACTERS, SHORTEST_CHARACTERS = 24, 48  # the same in characters: text without spaces


def plain(text: str) -> str:
    """Return a text in lower case, with plain apostrophes and single spaces."""
    return " ".join(text.lower().replace("\u2019", "'").split())


def refuses(text: str, phrases: Sequence[str]) -> bool:
    """Tell whether one of the phrases stands in the opening of a response."""
    opening = plain(text)[:OPENING]
    return any(plain(phrase) in opening for phrase in phrases)


def repeated_grams(text: str) -> float:
    """Return the share of a response's 4-grams of words that stood in it before; 0 for less than two of them."""
    words = text.split()
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _periodic_end(items: Sequence[str], longest: int, shortest: int) -> bool:
    """Tell whether the end repeats a unit of at most `longest` items three times or more, over `shortest` items."""
    for unit in range(1, longest + 1):
        span = max(TURNS * unit, shortest)
        tail = items[-span:]
        if len(tail) == span and tail[unit:] == tail[:-unit]:
            return True
    return False


def ends_in_loop(text: str) -> bool:
    """Tell whether a response ends by saying the same words, or characters, over and over.

    The last turn of the loop may be cut.
    """
    return _periodic_end(text.split(), LONGEST_WORDS, SHORTEST_WORDS) or _periodic_end(
        text.strip(), LONGEST_CHARACTERS, SHORTEST_CHARACTERS
    )


def text_metrics(texts: Sequence[str], num_tokens: Sequence[int], phrases: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of one model's responses; rates are shares of responses, with Wilson's 95 % interval.

    num_tokens: of each response, its end-of-turn token included. ValueError without responses.
    """
    if not texts:
        raise ValueError("no responses: text statistics need at least one")
    refused, looped = sum(refuses(text, phrases) for text in texts), sum(map(ends_in_loop, texts))
    median, p95 = np.quantile(num_tokens, [0.5, 0.95])
    return {
        "mean_response_tokens": float(np.mean(num_tokens)),
        "p50_response_tokens": float(median),
        "p95_response_tokens": float(p95),
        "mean_response_words": float(np.mean([len(text.split()) for text in texts])),
        "refusal_rate": refused / len(texts),
        "refusal_rate_ci95": list(proportion_interval(refused, len(texts))),
        "repeated_4grams": float(np.mean([repeated_grams(text) for text in texts])),
        "loop_rate": looped / len(texts),
        "loop_rate_ci95": list(proportion_interval(looped, len(texts))),
        "empty_rate": sum(not text.strip() for text in texts) / len(texts),
    }
