"""Several teachers' entries as one teacher's: a mixture of their probabilities, or of their log-probabilities.

What a cache does not hold is never made up: an id outside a teacher's top k has a probability that nobody knows, so
it stays in that teacher's tail. Letters: L response tokens, K entries a token, U entries of a mixture (those of all
teachers together).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from settings.schema import require
from teacher.quantities import Entry

ABSENT = -np.inf
ONLY = ""  # the name of a teacher that stands alone
MIXTURES = ("probabilities", "log_probabilities")


def named(given: Any) -> dict[str, Any]:
    """Return teachers by their names; in a list the names are numbers."""
    if isinstance(given, list):
        return {str(i): one for i, one in enumerate(given)}
    return {str(name): one for name, one in given.items()} if isinstance(given, dict) else {ONLY: given}


def shares(names: Sequence[str], given: Any, of: str) -> dict[str, float]:
    """Return each teacher's share of a mixture, which sum to 1, from the given weights; `of`: the teachers' key."""
    if given is None:
        return dict.fromkeys(names, 1 / len(names))
    found = dict(zip(names, given, strict=False)) if isinstance(given, list) else given
    wrong = not isinstance(found, dict) or len(given) != len(names) or {str(name) for name in found} != set(names)
    key = f"loss.{'advantage' if of == 'loss.advantages' else 'teacher'}_weights={given}"
    require(not wrong, f"{key} must have one weight a teacher of {of}: {', '.join(names)}")
    numbers = {str(name): weight for name, weight in found.items()}
    fine = all(isinstance(w, (int, float)) and not isinstance(w, bool) and w > 0 for w in numbers.values())
    require(fine, f"{key} must be numbers above 0")
    return {name: float(numbers[name]) / sum(numbers.values()) for name in names}


def mixed(entries: Sequence[Entry], weights: Sequence[float], mixture: str) -> Entry:
    """Return the mixture [L, U] of teachers' top-k log-probabilities on the same L tokens; weights sum to 1.

    probabilities: log sum_i w_i p_i(v) over the ids of any teacher, a teacher without v adding nothing there: a lower
    bound, whose missing mass is in the tail. log_probabilities: sum_i w_i log p_i(v), normalized over the ids that
    all teachers hold and one event for the rest, whose mass each teacher's own tail says. Both are the dense mixture
    where each teacher's entries are its whole vocabulary.
    """
    ids, found = _side_by_side(entries)
    shares = np.asarray(weights)[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        if mixture == "probabilities":
            values = np.log((shares * np.exp(found)).sum(axis=0))
        else:
            common = ~np.isneginf(found).any(axis=0)
            known = np.where(common, found, ABSENT)
            rests = np.log(np.clip(1.0 - np.exp(known).sum(axis=-1), 0.0, None))  # [teachers, L]
            powers = np.where(common, (shares * np.where(common, found, 0.0)).sum(axis=0), ABSENT)
            rest = np.where(np.isneginf(rests).any(axis=0), ABSENT, (shares[..., 0] * rests).sum(axis=0))
            values = powers - np.logaddexp(np.logaddexp.reduce(powers, axis=-1), rest)[:, None]
    values = np.where(np.isnan(values), ABSENT, values)
    tail = np.clip(1.0 - np.exp(values).sum(axis=-1), 0.0, None)
    return Entry(np.where(np.isneginf(values), 0, ids), values.astype(np.float32), tail.astype(np.float32))


def _side_by_side(entries: Sequence[Entry]) -> tuple[np.ndarray, np.ndarray]:
    """Return the union's ids [L, U], each once a token, and each teacher's log-probabilities of them, ABSENT where it
    has none: [teachers, L, U]."""
    stacked = np.concatenate([entry.ids for entry in entries], axis=1).astype(np.int64)
    present = np.concatenate([~np.isneginf(entry.values) for entry in entries], axis=1)
    order = np.argsort(np.where(present, stacked, np.iinfo(np.int64).max), axis=1, kind="stable")
    ids, present = np.take_along_axis(stacked, order, axis=1), np.take_along_axis(present, order, axis=1)
    first = present.copy()
    first[:, 1:] &= (ids[:, 1:] != ids[:, :-1]) | ~present[:, :-1]
    found = np.full((len(entries), *ids.shape), ABSENT)
    for row, entry in zip(found, entries, strict=True):
        # [L, U, K]: which of a teacher's entries is this id
        same = (ids[:, :, None] == entry.ids[:, None, :]) & ~np.isneginf(entry.values)[:, None, :] & first[:, :, None]
        at = same.argmax(axis=-1)
        values = np.take_along_axis(entry.values.astype(np.float64), at, axis=1)
        row[...] = np.where(same.any(axis=-1), values, ABSENT)
    return ids, found


def summed(entries: Sequence[Entry], weights: Sequence[float]) -> Entry:
    """Return the weighted sum [L, U] of several caches' advantages on the same L tokens; weights sum to 1.

    It is at the ids of any of them; a cache that lacks an id adds nothing there. teacher_logps: the mixture of the
    aligned teachers' probabilities, by the same weights, a lower bound as that of `mixed`.
    """
    if len(entries) == 1:
        return entries[0]
    known = []
    for entry in entries:
        assert entry.teacher_logps is not None, "an advantage cache carries the aligned teacher's log-probs"
        known.append(Entry(entry.ids, entry.teacher_logps, entry.tail))
    together, (ids, found) = mixed(known, weights, "probabilities"), _side_by_side(known)
    total = np.zeros(ids.shape)
    for entry, logps, own, weight in zip(entries, known, found, weights, strict=True):
        same = (ids[:, :, None] == entry.ids[:, None, :]) & ~np.isneginf(logps.values)[:, None, :]
        advantages = np.take_along_axis(entry.values.astype(np.float64), same.argmax(axis=-1), axis=1)
        total += np.where(np.isneginf(own), 0.0, weight * advantages)
    return Entry(together.ids, total.astype(np.float32), together.tail, together.values)


def within(entry: Entry, size: int) -> Entry:
    """Drop entries whose id lies beyond a vocabulary of `size` ids; their mass goes to the tail."""
    beyond = entry.ids >= size
    if not beyond.any():
        return entry
    logps = entry.values if entry.teacher_logps is None else entry.teacher_logps
    tail = entry.tail + np.where(beyond, np.exp(logps), 0.0).sum(axis=-1).astype(np.float32)
    ids, nothing = np.where(beyond, 0, entry.ids), 0.0 if entry.teacher_logps is not None else ABSENT
    return entry._replace(
        ids=ids,
        values=np.where(beyond, nothing, entry.values).astype(np.float32),  # an advantage of 0 adds nothing
        tail=tail,
        teacher_logps=None if entry.teacher_logps is None else np.where(beyond, ABSENT, logps).astype(np.float32),
    )
