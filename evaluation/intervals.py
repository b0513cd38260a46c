"""95 % intervals of reported scores, in plain numpy.

Two kinds of chance are kept apart: over prompts (another draw of held-out prompts, the same models) and over seeds
(other data, initialization and sampling). The second is usually the wider, and is what a claim about a method needs.
"""

import math
from collections.abc import Sequence

import numpy as np

Interval = tuple[float, float]

NORMAL_975 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution

# The 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom.
STUDENT_975 = (
    12.7062,
    4.3027,
    3.1824,
    2.7764,
    2.5706,
    2.4469,
    2.3646,
    2.3060,
    2.2622,
    2.2281,
    2.2010,
    2.1788,
    2.1604,
    2.1448,
    2.1314,
    2.1199,
    2.1098,
    2.1009,
    2.0930,
    2.0860,
    2.0796,
    2.0739,
    2.0687,
    2.0639,
    2.0595,
    2.0555,
    2.0518,
    2.0484,
    2.0452,
    2.0423,
)


def student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; past 30 degrees by the expansion in 1/degrees (error below 1e-5)."""
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: an interval over seeds needs at least two of them")
    if degrees <= len(STUDENT_975):
        return STUDENT_975[degrees - 1]
    z = NORMAL_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def proportion_interval(successes: float, n: int) -> Interval:
    """Return Wilson's interval of a binomial proportion; it stays inside [0, 1] and is no point at 0 or n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: needs n >= 1 and 0 <= successes <= n")
    share, z = successes / n, NORMAL_975
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


def bootstrap_interval(values: Sequence[float], resamples: int = 2_000, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of the mean of values, one for each prompt."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError("no values: an interval needs at least one")
    rng = np.random.default_rng(seed)
    means = [numbers[rng.integers(numbers.size, size=numbers.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def score_interval(values: Sequence[float]) -> Interval:
    """Return the interval of a mean score over prompts: Wilson's where every score is 0 or 1, else the bootstrap."""
    if all(value in (0.0, 1.0) for value in values):
        return proportion_interval(sum(values), len(values))
    return bootstrap_interval(values)


def seed_interval(scores: Sequence[float], bounds: Interval | None = None) -> Interval | None:
    """Return the Student-t interval of the mean over seeds, one score a seed; None for fewer than two seeds.

    With bounds it is taken on the logit of the mean's place between them (delta method) and transformed back: it never
    leaves them, and far from them it is the plain one. ValueError for a score outside.
    """
    if len(scores) < 2:
        return None
    numbers = np.asarray(scores, dtype=np.float64)
    mean = float(numbers.mean())
    half = student_quantile(len(scores) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(scores))
    if bounds is None:
        return mean - half, mean + half
    low, high = bounds
    if numbers.min() < low or numbers.max() > high:
        raise ValueError(f"scores={list(scores)}: each must be in [{low}, {high}]")
    place, width = (mean - low) / (high - low), half / (high - low)
    if half == 0 or not 0 < place < 1:  # then all scores are equal
        return mean, mean
    center, reach = math.log(place / (1 - place)), width / (place * (1 - place))
    ends = (0.5 + 0.5 * math.tanh((center + sign * reach) / 2) for sign in (-1, 1))  # the logistic function
    first, second = (low + (high - low) * end for end in ends)
    return first, second


def paired_difference(
    first: Sequence[float], second: Sequence[float], resamples: int = 2_000, seed: int = 0
) -> tuple[float, Interval]:
    """Return the mean of first - second over the same prompts, and its bootstrap interval over prompts."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores: a paired difference needs the same prompts in both")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(differences.mean()), bootstrap_interval(differences.tolist(), resamples, seed)


def paired_p_values(differences: np.ndarray, resamples: int = 9_999, seed: int = 0) -> list[float]:
    """Return the two-sided p-value of each row of paired differences [C, P] by the sign-flip test (Fisher 1935).

    Where two models are alike every difference could as well have the other sign. The flips are the same for all
    rows; no p-value is below 1 / (resamples + 1).
    """
    values = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    if values.size == 0:
        raise ValueError(f"differences of shape {values.shape}: a test needs at least one comparison and one prompt")
    observed, rng = np.abs(values.sum(axis=1)), np.random.default_rng(seed)
    slack = 1e-9 * np.abs(values).sum(axis=1)  # equal sums in another order of addition count as equal
    reached, done = np.zeros(len(values)), 0
    while done < resamples:  # in blocks: [1_000, P] signs at a time
        count = min(1_000, resamples - done)
        signs = rng.integers(2, size=(count, values.shape[1]), dtype=np.int8) * 2.0 - 1.0
        reached += (np.abs(signs @ values.T) >= observed - slack).sum(axis=0)
        done += count
    return ((reached + 1) / (resamples + 1)).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for as many tests as there are, in their order (Holm 1979, step-down).

    A test counts where its adjusted value is below the level; then the chance of any false claim is below it, too.
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p_values={list(p_values)}: each must be in [0, 1]")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for position, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[i]))
        adjusted[i] = highest
    return adjusted
