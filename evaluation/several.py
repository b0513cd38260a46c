"""Several responses to each prompt: pass@k, and how much the right ones differ.

Sharper sampling raises the score of one response, but hardly pass@k, and it lowers the diversity: both stand beside
the score. Letters: P prompts, n responses to each.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evaluation.intervals import score_interval

RIGHT = 1.0  # a response with such a score, or a higher one, is right
GRAM = 2  # words


def pass_at(n: int, right: int, k: int) -> float:
    """Return the chance that k of n responses, drawn without repetition, hold a right one: 1 - C(n-c, k) / C(n, k).

    It is without bias in n (Chen et al. 2021, 2107.03374, equation 1); computed as their product, which cannot
    overflow. ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"n={n}, right={right}, k={k}: needs 1 <= k <= n and 0 <= right <= n")
    if n - right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - right + 1, n + 1)))


def powers(n: int) -> list[int]:
    """Return 2, 4, 8, ... up to n: the k of which pass@k is told (k = 1 is the mean score of right and wrong)."""
    return [2**i for i in range(1, n.bit_length()) if 2**i <= n]


def grams(text: str) -> frozenset[tuple[str, ...]]:
    """Return the 2-grams of a text's words; of a single word the word alone."""
    words = text.split()
    if len(words) < GRAM:
        return frozenset([tuple(words)])
    return frozenset(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def differing(texts: Sequence[str]) -> tuple[float, float]:
    """Return the chance that two responses drawn without repetition differ, and how far they are apart on average.

    The distance is 1 - Jaccard of their 2-grams of words, 0 for equal words. White space does not count. ValueError
    for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} response: two are needed to differ")
    counts = Counter(" ".join(text.split()) for text in texts)
    pairs = len(texts) * (len(texts) - 1) / 2
    parts = {text: grams(text) for text in counts}
    differ, distance = 0.0, 0.0
    for first, second in combinations(counts, 2):
        times, a, b = counts[first] * counts[second], parts[first], parts[second]
        differ += times
        distance += times * (1 - len(a & b) / len(a | b))
    return differ / pairs, distance / pairs


def several_metrics(texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return pass@k and the diversity of right responses with 95 % intervals over prompts; texts and scores [n][P].

    The diversity is a mean over the prompts with at least two right responses (`diverse_prompts` counts them; null
    where there are none): models that solve other prompts are compared on other prompts.
    """
    n, per_prompt = len(scores), list(zip(*scores, strict=True))
    right = [sum(score >= RIGHT for score in row) for row in per_prompt]
    found: dict[str, Any] = {"n": n, "pass_at": {}, "pass_at_ci95": {}}
    for k in powers(n):
        values = [pass_at(n, count, k) for count in right]
        found["pass_at"][str(k)] = float(np.mean(values))
        found["pass_at_ci95"][str(k)] = list(score_interval(values))
    pairs = [
        differing([text for text, score in zip(said, row, strict=True) if score >= RIGHT])
        for said, row, count in zip(zip(*texts, strict=True), per_prompt, right, strict=True)
        if count >= 2
    ]
    found["diverse_prompts"] = len(pairs)
    for place, name in enumerate(("distinct_right", "distance_right")):
        values = [pair[place] for pair in pairs]
        found[name] = float(np.mean(values)) if values else None
        found[f"{name}_ci95"] = list(score_interval(values)) if values else None
    return found
