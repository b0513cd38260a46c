"""How the entries of a sequence are packed into bytes, and back: pure functions of numpy arrays, which know no files.

A token keeps its most probable entries until they hold `mass`, at most K. Letters: L response tokens of a sequence, K
entries a token at most, M entries of all tokens together, in the order of tokens and, in each, of ascending ids.

An entry has two or three numbers >= 0: the ids' gap (id - id before - 1; of the first: the id), the level of its
probability (round(LEVELS sqrt(p)), at least 1, less 1) and, of advantages, a step (of scale / STEPS; 2 |n| - 1 above 0,
2 |n| below). Each is cut into w low bits, w one for a token, and what is above them in unary (Rice's code). Sections:

    counts   uint8 [L], uint16 where K > 255    entries of each token
    widths   uint8 [L, 2 or 3]                  w of gaps, levels and steps
    held     float16 [L]                        log of the mass that the entries hold
    scales   float16 [L]                        the largest |advantage|, rounded up (advantages alone)
    lows     w bits each, to a whole byte       of all gaps, of all levels, of all steps; the highest bit first
    highs    unary, to the end                  likewise: as many zeros as the number says, then a one

Probabilities are scaled so that a token's hold exactly the mass stored: the levels' error is not in the sum.
"""

import numpy as np

LEVELS, STEPS = 2**8, 2**9
MAX_WIDTH = 16  # bits; gaps are below 2^24

Arrays = dict[str, np.ndarray]


def count_dtype(k: int) -> np.dtype:
    """Return the dtype of the counts of tokens with at most k entries."""
    return np.dtype("uint8" if k <= 255 else "<u2")


def kept(logps: np.ndarray, mass: float) -> np.ndarray:
    """Return how many of each token's entries [L, K], the most probable first, hold `mass`; 1 keeps all."""
    enough = (np.exp(logps).cumsum(axis=1) < mass).sum(axis=1) + 1 if mass < 1 else logps.shape[1]
    return np.maximum(1, np.minimum(enough, (logps > -np.inf).sum(axis=1)))


# ---- Rice's code


def packed_bits(values: np.ndarray, widths: np.ndarray) -> bytes:
    """Write the low bits [M] of numbers, so many of each, the highest first."""
    shifts = np.arange(MAX_WIDTH - 1, -1, -1)
    bits = ((values[:, None] >> shifts) & 1).astype(np.uint8)
    return np.packbits(bits[shifts < widths[:, None]]).tobytes()


def unpacked_bits(data: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Read numbers [M] of so many bits each (at most 24), the highest first."""
    first = widths.cumsum() - widths
    padded = np.concatenate([data, np.zeros(4, np.uint8)]).astype(np.int64)
    at = first >> 3
    word = (padded[at] << 24) | (padded[at + 1] << 16) | (padded[at + 2] << 8) | padded[at + 3]
    return (word >> (32 - (first & 7) - widths)) & ((1 << widths) - 1)


def best_widths(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the number of low bits of each token [L] with which its numbers take the fewest bits."""
    starts = starts_of(counts)
    sizes = [np.add.reduceat(numbers >> w, starts) + counts * w for w in range(MAX_WIDTH)]
    return np.argmin(sizes, axis=0)


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Return the place of each token's first entry among all M."""
    return counts.cumsum() - counts


# ---- one sequence


def encode(ids: np.ndarray, logps: np.ndarray, advantages: np.ndarray | None, mass: float) -> bytes:
    """Pack the entries [L, K] of a sequence: distinct ids, their log-probabilities and, where given, advantages."""
    length, k = ids.shape
    if length == 0:
        return b""
    order = np.argsort(-logps, axis=1, kind="stable")
    ranked = np.take_along_axis(logps, order, 1).astype(float)
    counts = kept(ranked, mass)
    there = np.arange(k) < counts[:, None]
    wide = np.where(there, np.take_along_axis(ids, order, 1).astype(np.int64), np.iinfo(np.int64).max)
    order = np.take_along_axis(order, np.argsort(wide, axis=1, kind="stable"), 1)
    ids = np.take_along_axis(ids, order, 1)[there].astype(np.int64)
    p = np.exp(np.take_along_axis(logps, order, 1)[there].astype(float))
    starts, row = starts_of(counts), np.repeat(np.arange(length), counts)
    gaps = np.diff(ids, prepend=-1) - 1
    gaps[starts] = ids[starts]
    if (gaps < 0).any():
        raise ValueError("the entries of a token name an id twice")
    held = np.minimum(np.log(np.add.reduceat(p, starts)), 0.0).astype("<f2")
    numbers, scales = [gaps, np.maximum(np.rint(LEVELS * np.sqrt(p)), 1).astype(np.int64) - 1], b""
    if advantages is not None:
        values = np.take_along_axis(advantages, order, 1)[there].astype(float)
        scale = rounded_up(np.maximum.reduceat(np.abs(values), starts))
        steps = np.rint(values * (STEPS / np.where(scale > 0, scale, 1).astype(float))[row]).astype(np.int64)
        numbers.append(np.where(steps > 0, 2 * steps - 1, -2 * steps))
        scales = scale.tobytes()
    widths = np.stack([best_widths(part, counts) for part in numbers], axis=1)
    values, low = np.concatenate(numbers), widths[row].T.ravel()
    ones = ((values >> low) + 1).cumsum() - 1
    unary = np.zeros(ones[-1] + 1, np.uint8)
    unary[ones] = 1
    head = [counts.astype(count_dtype(k)).tobytes(), widths.astype(np.uint8).tobytes(), held.tobytes(), scales]
    return b"".join([*head, packed_bits(values, low), np.packbits(unary).tobytes()])


def rounded_up(numbers: np.ndarray) -> np.ndarray:
    """Return the least float16 that is not below each of the numbers."""
    near = numbers.astype("<f2")
    return np.where(near < numbers, np.nextafter(near, np.float16(np.inf)), near).astype("<f2")


def decode(blob: bytes | np.ndarray, length: int, k: int, has_advantages: bool) -> Arrays:
    """Return ids int64 [L, k], logps and advantages float32 [L, k], the most probable first, and tail float32 [L].

    Where a token keeps fewer than k entries the rest has the id 0, the log-probability -inf and the advantage 0.
    """
    at, kinds = 0, 3 if has_advantages else 2
    found: Arrays = {"ids": np.zeros((length, k), np.int64), "logps": np.full((length, k), -np.inf, np.float32)}

    def section(count: int, dtype: np.dtype | str) -> np.ndarray:
        nonlocal at
        part = np.frombuffer(blob, dtype, count, at) if count else np.empty(0, dtype)
        at += part.nbytes
        return part

    counts = section(length, count_dtype(k)).astype(np.int64)
    widths = section(kinds * length, "u1").astype(np.int64).reshape(length, kinds)
    held = section(length, "<f2").astype(float)
    scales = section(length, "<f2").astype(float) if has_advantages else None
    row, starts = np.repeat(np.arange(length), counts), starts_of(counts)
    low = widths[row].T.ravel()
    numbers = unpacked_bits(section((int(low.sum()) + 7) // 8, "u1"), low)
    ones = np.flatnonzero(np.unpackbits(section(len(blob) - at, "u1")))
    numbers += (np.diff(ones, prepend=-1) - 1) << low
    gaps, levels, *steps = numbers.reshape(kinds, -1)
    ends = (gaps + 1).cumsum()
    ids = ends - np.concatenate([[0], ends])[starts][row] - 1
    p = ((levels + 1) / LEVELS) ** 2
    logps = np.log(p) + (held - np.log(np.add.reduceat(p, starts)) if length else held)[row]
    order = np.lexsort((-levels, row))
    place = row, np.arange(len(row)) - starts[row]
    found["ids"][place], found["logps"][place] = ids[order], logps[order]
    found["tail"] = -np.expm1(held).astype(np.float32)
    if scales is not None:
        n = np.where(steps[0] & 1, steps[0] + 1, -steps[0]) // 2
        found["advantages"] = np.zeros((length, k), np.float32)
        found["advantages"][place] = (n / STEPS * scales[row])[order]
    return found


def errors(ids: np.ndarray, logps: np.ndarray, advantages: np.ndarray | None, found: Arrays) -> dict[str, float]:
    """Compare what comes back with the entries [L, K] that were packed: entries kept, mean KL (nats), errors.

    The KL is that of the exact distribution from the stored one, over the entries kept and one more for the rest.
    """
    keys, there = (np.arange(len(ids))[:, None] << 32) + ids, found["logps"] > -np.inf
    if not there.any():
        return {}
    flat = np.argsort(keys.ravel(), kind="stable")
    wanted = ((np.arange(len(ids))[:, None] << 32) + found["ids"])[there]
    at = flat[np.searchsorted(keys.ravel()[flat], wanted)]
    exact, stored = logps.ravel()[at].astype(float), found["logps"][there].astype(float)
    row = np.nonzero(there)[0]
    p, q = (np.bincount(row, np.exp(part), len(ids)).clip(0, 1 - 1e-7) for part in (exact, stored))
    kl = np.bincount(row, np.exp(exact) * (exact - stored), len(ids)) + (1 - p) * np.log((1 - p) / (1 - q))
    off = np.abs(exact - stored)
    result = {"entries": len(row), "kl": kl.mean(), "logp_max": off.max(), "logp_mean": off.mean()}
    if advantages is not None:
        off = np.abs(advantages.ravel()[at].astype(float) - found["advantages"][there])
        result |= {"advantage_max": off.max(), "advantage_mean": off.mean()}
    return {name: float(value) for name, value in result.items()}
