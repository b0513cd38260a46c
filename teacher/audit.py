"""What a cache keeps of a teacher: pure figures of stored entries beside the whole distribution, and their summary.

A figure is a number a token; sums over tokens and what follows from them are made in `summary`. Letters: N tokens, K
entries, V vocabulary. An entry whose log-probability is below NO_ENTRY fills a row that has fewer than K: it counts
nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from teacher.cache import Arrays

NO_ENTRY = -99.0  # nats: e^-99 is no probability that a float32 sum can see
FLOAT16_STEPS = 2048  # float16 rounds a value v by at most |v| / 2048
SIGN_NOISE = 1e-6  # nats
POSITIONS = (1, 2, 4, 16, 64, 256, 1024)  # a bin begins at each of these places of the response
Figures = dict[str, Tensor]


class Stored(NamedTuple):
    """Entries of N tokens: ids [N, K], log-probabilities [N, K], which of them are entries [N, K], the mass outside
    [N], and advantages [N, K] where the cache has them.
    """

    ids: Tensor
    logps: Tensor
    kept: Tensor
    tail: Tensor
    advantages: Tensor | None = None

    def part(self, start: int, stop: int) -> "Stored":
        """Return some of the tokens."""
        return Stored(*(None if array is None else array[start:stop] for array in self))  # type: ignore[arg-type]


def stored_of(arrays: Arrays, device: torch.device | str = "cpu") -> Stored:
    """Take what a Reader returns of a sequence; the aligned teacher's log-probabilities stand beside advantages."""
    found = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
    has_advantages = "teacher_logps" in found
    logps = found["teacher_logps"] if has_advantages else found["values"]
    kept = logps.isfinite() & (logps > NO_ENTRY)
    ids = torch.where(kept, found["ids"], 0)
    return Stored(ids, logps, kept, found["tail"], found["values"] if has_advantages else None)


# ---- a number a token


def mass_kept(teacher: Tensor, stored: Stored) -> Tensor:
    """Return the teacher's probability [N] of the stored ids, from its log-probabilities [N, V]."""
    return (teacher.gather(-1, stored.ids).exp() * stored.kept).sum(-1)


def best_mass(teacher: Tensor, stored: Stored) -> Tensor:
    """Return the largest probability [N] that so many ids can have: less was kept where they are not the top ones."""
    ranked = teacher.exp().topk(min(stored.ids.shape[1], teacher.shape[1]), dim=-1).values.cumsum(-1)
    count = stored.kept.sum(-1).clamp_min(1)
    return ranked.gather(-1, (count - 1).unsqueeze(-1)).squeeze(-1)


def entry_errors(teacher: Tensor, stored: Stored) -> Tensor:
    """Return stored minus exact log-probability [N, K]; 0 where there is no entry."""
    return torch.where(stored.kept, stored.logps - teacher.gather(-1, stored.ids), 0.0)


def beyond_stated(teacher: Tensor, stored: Stored, root_error: float | None) -> Tensor:
    """Return by how many nats an entry [N, K] is further off than its codec states; 0 where it is not.

    float16 moves a log-probability by 2^-11 of itself. A codec of roots moves sqrt(p) by root_error, and then all
    entries of a token together, so that they hold their mass: by at most 2 sqrt(K) root_error + K root_error^2.
    """
    exact = teacher.gather(-1, stored.ids)
    if root_error is None:
        excess = (stored.logps - exact).abs() - stored.logps.abs() / FLOAT16_STEPS
    else:
        root, k = (exact / 2).exp(), stored.ids.shape[1]
        together = 2 * k**0.5 * root_error + k * root_error**2
        above = stored.logps - 2 * (root + root_error).log()
        below = 2 * (root - root_error).clamp_min(0.0).log() - stored.logps  # -inf: it may have become anything small
        excess = torch.maximum(above, below) - together
    return torch.where(stored.kept, excess, 0.0).clamp_min(0.0)


def overlap(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Return the share [N] of the teacher's k most probable ids that are the student's, too; both [N, V]."""
    theirs = teacher.topk(k, dim=-1).indices
    ours = torch.zeros_like(student, dtype=torch.bool).scatter(-1, student.topk(k, dim=-1).indices, True)
    return ours.gather(-1, theirs).to(student.dtype).mean(-1)


def _rest(logps: Tensor, kept: Tensor) -> Tensor:
    """Return the probability outside the entries [N], bounded below by rounding as functional.topk_kl bounds it."""
    inside = (logps.exp() * kept).nan_to_num().sum(-1)
    return (1.0 - inside).clamp_min(torch.finfo(logps.dtype).eps)


def bucket_kl(student: Tensor, stored: Stored) -> Tensor:
    """Return KL(teacher || student) [N] on the stored entries and one bucket for the rest (loss.tail=bucket)."""
    own = student.gather(-1, stored.ids)
    logps = stored.logps.to(student.dtype)
    inside = torch.where(stored.kept, logps.exp() * (logps - own), 0.0).sum(-1)
    rest, rest_own = _rest(logps, stored.kept), _rest(own, stored.kept)
    return inside + rest * (rest.log() - rest_own.log())


def dense(stored: Stored, values: Tensor, vocab_size: int) -> Tensor:
    """Write values of entries [N, K] at their ids, 0 elsewhere: [N, V]."""
    empty = torch.zeros(len(values), vocab_size, dtype=values.dtype, device=values.device)
    return empty.scatter_add(-1, stored.ids, torch.where(stored.kept, values, 0.0))


def bucket_gradient(student: Tensor, stored: Stored) -> Tensor:
    """Return the gradient [N, V] of bucket_kl by the student's logits, from its log-probabilities [N, V].

    s - p at the entries, s - s p_rest / s_rest elsewhere: the bucket's mass is dealt out as the student deals it.
    """
    logps = stored.logps.to(student.dtype)
    probabilities = student.exp()
    support = dense(stored, torch.ones_like(logps), student.shape[-1]) > 0
    ratio = _rest(logps, stored.kept) / _rest(student.gather(-1, stored.ids), stored.kept)
    target = torch.where(support, dense(stored, logps.exp(), student.shape[-1]), probabilities * ratio.unsqueeze(-1))
    return probabilities * target.sum(-1, keepdim=True) - target


def advantage_gradient(student: Tensor, advantages: Tensor) -> Tensor:
    """Return the gradient [N, V] of sum_a pi(a) A(a) by the student's logits; both [N, V]."""
    probabilities = student.exp()
    return probabilities * (advantages - (probabilities * advantages).sum(-1, keepdim=True))


def _compared(name: str, stored: Tensor, exact: Tensor) -> Figures:
    """Return what the angle and the lengths of two gradients [N, V] are made from, per token."""
    return {
        f"{name}_dot": (stored * exact).sum(-1),
        f"{name}_stored": stored.square().sum(-1),
        f"{name}_exact": exact.square().sum(-1),
    }


def sign_errors(advantages: Tensor, exact: Tensor, teacher: Tensor, kept: Tensor) -> Figures:
    """Compare advantages [N, K] with exact ones at the same ids, whose log-probabilities [N, K] weigh them.

    A sign is wrong where the two differ by more than SIGN_NOISE: near certain tokens have advantages of 1e-8.
    """
    gap = torch.where(kept, (advantages - exact).abs(), 0.0)
    wrong = (advantages.sign() != exact.sign()) & (gap > SIGN_NOISE)
    mass = teacher.exp() * kept
    return {
        "wrong_signs": wrong.sum(-1).to(exact.dtype),
        "wrong_sign_mass": (wrong * mass).sum(-1),
        "advantage_gap": gap.sum(-1),
        "advantage_gap_max": gap.amax(-1),
        "advantage_size": torch.where(kept, exact.abs(), 0.0).sum(-1),
    }


def temperature_sums(teacher: Tensor, stored: Stored) -> Figures:
    """Return the sums of the line through stored and exact log-probabilities, each less its mean over the token's
    entries: at temperature T the stored differences are the exact ones divided by T.
    """
    count = stored.kept.sum(-1, keepdim=True).clamp_min(1)

    def centered(values: Tensor) -> Tensor:
        values = torch.where(stored.kept, values, 0.0)
        return torch.where(stored.kept, values - values.sum(-1, keepdim=True) / count, 0.0)

    exact, found = centered(teacher.gather(-1, stored.ids)), centered(stored.logps)
    return {
        "line_exact": exact.square().sum(-1),
        "line_both": (exact * found).sum(-1),
        "line_stored": found.square().sum(-1),
    }


def token_figures(
    teacher: Tensor,
    stored: Stored,
    student: Tensor | None = None,
    reference: Tensor | None = None,
    beta: float = 1.0,
    root_error: float | None = None,
) -> Figures:
    """Return every figure [N] of the stored entries, from log-probabilities [N, V] of the models asked again.

    root_error: what the codec may change of a probability's root; None: float16 log-probabilities.
    """
    errors = entry_errors(teacher, stored)
    mass = mass_kept(teacher, stored)
    found = {
        "entries": stored.kept.sum(-1).to(teacher.dtype),
        "mass": mass,
        "best_mass": best_mass(teacher, stored),
        "tail_error": (stored.tail - (1.0 - mass)).abs(),
        "error_max": errors.abs().amax(-1),
        "error_excess": beyond_stated(teacher, stored, root_error).amax(-1),
        "error_weighted": (teacher.gather(-1, stored.ids).exp() * errors.abs()).sum(-1),
        **temperature_sums(teacher, stored),
    }
    if student is not None:
        found["overlap"] = overlap(student, teacher, min(stored.ids.shape[1], teacher.shape[1]))
        found["kl_truncated"] = bucket_kl(student, stored)
        found["kl_exact"] = (teacher.exp() * (teacher - student)).sum(-1)
        found |= _compared("dckd", bucket_gradient(student, stored), student.exp() - teacher.exp())
    if reference is not None and stored.advantages is not None:
        whole = beta * (teacher - reference)
        at_ids = teacher.gather(-1, stored.ids)
        found |= sign_errors(stored.advantages, whole.gather(-1, stored.ids), at_ids, stored.kept)
        if student is not None:
            given = dense(stored, stored.advantages, teacher.shape[-1])
            found |= _compared("adpa", advantage_gradient(student, given), advantage_gradient(student, whole))
    return found


# ---- over tokens


def _ratio(top: float, below: float) -> float | None:
    return top / below if below > 0 else None


def signs_summary(figures: Mapping[str, np.ndarray], num_entries: float) -> dict[str, float | None]:
    """Sum sign errors up: the share of the entries, and of the teacher's probability; mean and largest difference."""
    return {
        "wrong_signs": _ratio(float(figures["wrong_signs"].sum()), num_entries),
        "wrong_sign_mass": float(figures["wrong_sign_mass"].mean()),
        "mean_error": _ratio(float(figures["advantage_gap"].sum()), num_entries),
        "max_error": float(figures["advantage_gap_max"].max()),
        "mean_size": _ratio(float(figures["advantage_size"].sum()), num_entries),
    }


def gradient_summary(figures: Mapping[str, np.ndarray], name: str) -> dict[str, float | None]:
    """Return the angle and lengths of the whole sample's gradient, and the token whose angle is worst.

    Tokens whose exact gradient is nearly nothing have no direction: they count in the whole, not in the worst one.
    """
    dot, stored, exact = (figures[f"{name}_{part}"].astype(np.float64) for part in ("dot", "stored", "exact"))
    both = np.sqrt(stored.sum() * exact.sum())
    clear = exact > 1e-4 * exact.max(initial=0.0)
    each = dot[clear] / np.sqrt(np.maximum(stored[clear] * exact[clear], 1e-300))
    difference = max(0.0, float(stored.sum() + exact.sum() - 2 * dot.sum()))
    return {
        "cosine": _ratio(float(dot.sum()), float(both)),
        "relative_norm": None if not exact.sum() else float(np.sqrt(stored.sum() / exact.sum())),
        "relative_error": None if not exact.sum() else float(np.sqrt(difference / exact.sum())),
        "worst_token_cosine": float(each.min()) if len(each) else None,
    }


def temperature_of(figures: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Return the temperature that the stored entries look like, and how well a line fits (1: exactly)."""
    exact, both, stored = (
        float(figures[f"line_{name}"].astype(np.float64).sum()) for name in ("exact", "both", "stored")
    )
    fit = None if not exact * stored else both**2 / (exact * stored)
    return {"temperature": _ratio(exact, both), "fit": fit}


def by_position(figures: Mapping[str, np.ndarray], positions: np.ndarray) -> list[dict[str, float]]:
    """Return mean and least mass kept of the tokens in each bin of places in the response (the first is 1)."""
    bins = []
    for start, stop in zip(POSITIONS, (*POSITIONS[1:], np.inf), strict=True):
        inside = figures["mass"][(positions >= start) & (positions < stop)]
        if len(inside):
            bins.append(
                {"from": start, "tokens": len(inside), "mean": float(inside.mean()), "min": float(inside.min())}
            )
    return bins


def summary(figures: Mapping[str, np.ndarray], positions: np.ndarray) -> dict[str, Any]:
    """Sum the figures [N] of all tokens up, at their places in the response [N]."""
    mass = figures["mass"]
    found: dict[str, Any] = {
        "num_tokens": len(mass),
        "entries_per_token": float(figures["entries"].mean()),
        "mass": {"mean": float(mass.mean()), "min": float(mass.min()), "by_position": by_position(figures, positions)},
        "mass_missed": float((figures["best_mass"] - mass).clip(0).mean()),
        "error": {
            "max": float(figures["error_max"].max()),
            "beyond_stated": float(figures["error_excess"].max()),
            "weighted": float(figures["error_weighted"].mean()),
            "tail": float(figures["tail_error"].max()),
        },
        **temperature_of(figures),
    }
    if "overlap" in figures:
        gap = figures["kl_truncated"] - figures["kl_exact"]
        found["overlap"] = float(figures["overlap"].mean())
        found["kl"] = {
            "truncated": float(figures["kl_truncated"].mean()),
            "exact": float(figures["kl_exact"].mean()),
            "gap": float(gap.mean()),
            "largest_gap": float(np.abs(gap).max()),
        }
        found["dckd_gradient"] = gradient_summary(figures, "dckd")
    if "wrong_signs" in figures:
        found["advantages"] = {"stored": signs_summary(figures, float(figures["entries"].sum()))}
    if "adpa_dot" in figures:
        found["adpa_gradient"] = gradient_summary(figures, "adpa")
    return found


# ---- drift


def first_difference(ids: Sequence[int], again: Sequence[int]) -> int | None:
    """Return the first place at which two lists of ids part; None where they are equal."""
    for place, (one, other) in enumerate(zip(ids, again, strict=False)):
        if one != other:
            return place
    return None if len(ids) == len(again) else min(len(ids), len(again))


def worst_tokens(figures: Mapping[str, np.ndarray], count: int) -> list[tuple[int, str]]:
    """Return up to `count` tokens, each with what is worst about it: the largest wrong entry, the least mass kept, the
    largest difference of truncated and exact KL, in turn.
    """
    reasons = {"error": -figures["error_max"], "mass": figures["mass"]}
    if "kl_exact" in figures:
        reasons["kl"] = -np.abs(figures["kl_truncated"] - figures["kl_exact"])
    if "wrong_sign_mass" in figures:
        reasons["signs"] = -figures["wrong_sign_mass"]
    orders = {name: np.argsort(badness, kind="stable") for name, badness in reasons.items()}
    found: dict[int, str] = {}
    for rank in range(len(figures["mass"])):
        for name, order in orders.items():
            if len(found) < count:
                found.setdefault(int(order[rank]), name)
    return list(found.items())
