"""Success at matched entropy: each model at the temperature at which its tokens are as uncertain as a reference's.

A sharper model scores higher at temperature 1 and has learned nothing by it. So the temperature of each model is chosen
on prompts of their own, where no response is scored, such that its mean token entropy equals that of
evaluation.match_entropy at the main temperature.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MATCHED = "matched"  # the pass at matched entropy in results.json and scores.json
LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are tried
TOLERANCE = 0.01  # of the wanted entropy
SMALLEST = 0.002  # nats: no closer than this, however small the wanted entropy is
NARROW = 1.001  # ratio of the last two temperatures: sampling makes the entropy jump, so it may never be closer
STEPS = 40


class Matched(NamedTuple):
    """What the search found: the temperature (None: none gives the entropy), the entropy there, the one wanted, nats.

    trials: (temperature, entropy), in the order tried.
    """

    temperature: float | None
    entropy: float
    target: float
    trials: list[tuple[float, float]]


def matched_temperature(entropy_at: Callable[[float], float], target: float) -> Matched:
    """Find the temperature whose entropy is the target: doubled or halved from 1 until it is passed, then bisected.

    entropy_at [nats] is expected to rise with the temperature. Where it is not passed between LOWEST and HIGHEST there
    is no temperature, and the entropy is that at the end.
    """
    trials: list[tuple[float, float]] = []
    close = max(TOLERANCE * target, SMALLEST)

    def tried(temperature: float) -> float:
        trials.append((temperature, entropy_at(temperature)))
        return trials[-1][1] - target

    temperature, off = 1.0, tried(1.0)
    low = high = temperature
    while abs(off) > close and LOWEST < temperature < HIGHEST:
        rising = off < 0
        other = temperature
        temperature = min(2 * temperature, HIGHEST) if rising else max(temperature / 2, LOWEST)
        off = tried(temperature)
        low, high = min(other, temperature), max(other, temperature)
        if (off >= 0) == rising:
            break
    else:
        if abs(off) > close:
            return Matched(None, off + target, target, trials)
    for _ in range(STEPS):
        if abs(off) <= close or high / low < NARROW:
            break
        middle = math.sqrt(low * high)
        off = tried(middle)
        low, high = (middle, high) if off < 0 else (low, middle)
    temperature, entropy = min(trials, key=lambda trial: abs(trial[1] - target))
    return Matched(temperature, entropy, target, trials)


def split_off(count: int, size: int, seed: int) -> tuple[list[int], list[int]]:
    """Return which of `count` held-out prompts are scored and which `size` of them, at most half, choose temperatures.

    ValueError where none would choose.
    """
    if count < 2:
        raise ValueError(
            f"evaluation.match_entropy with {count} held-out prompt: some must choose the temperatures and some must "
            "be left to score"
        )
    if size > count // 2:
        print(
            f"evaluation.match_prompts={size} is more than half of {count} held-out prompts: {count // 2} choose the "
            "temperatures"
        )
        size = count // 2
    chosen = set(np.random.default_rng(seed).permutation(count)[:size].tolist())
    return [i for i in range(count) if i not in chosen], sorted(chosen)


def mean_entropy(answers: Sequence[tuple[list[int], str, float]]) -> float:
    """Return nats a token of responses with the sum of each one's entropies."""
    return sum(nats for _, _, nats in answers) / sum(len(ids) for ids, _, _ in answers)


def matched_entry(matched: Matched, reference: str) -> dict[str, Any]:
    """Return what results.json says of the search, beside the metrics at the temperature that it found."""
    return {
        "reference": reference,
        "temperature": matched.temperature,
        "chosen_entropy": matched.entropy,
        "wanted_entropy": matched.target,
        "trials": [list(trial) for trial in matched.trials],
    }
