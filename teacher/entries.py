"""Maths of a teacher's entries: divergences from its top k, distances across vocabularies, expected advantages.

Letters: N response tokens of a whole batch (flat), V vocabulary, K teacher entries. Logits come whole or by chunks, as
in functional.py. An entry with a log-probability of -inf is none.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from forward.chunks import Logits, chunked
from functional import _entropy, _gather, _parts_jsd, _wide, gather_logps


def inside(ids: Tensor, values: Tensor, width: int, nothing: float = -math.inf) -> tuple[Tensor, Tensor]:
    """Return entries [N, K] for logits of `width` columns: an id beyond them becomes 0 with the value `nothing`."""
    beyond = ids >= width
    return ids.masked_fill(beyond, 0), values.masked_fill(beyond, nothing)


def topk_logps(logits: Logits, k: int, chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k most probable ids [N, K], their log-probabilities [N, K] and the remaining mass [N]; no gradient."""
    if k > logits.shape[-1]:
        raise ValueError(f"top_k={k} is more than the vocabulary of {logits.shape[-1]}")
    with torch.no_grad():
        ids = chunked(lambda part: part.topk(k, dim=-1).indices, logits, (), chunk)
        logps = gather_logps(logits, ids, chunk)
        tail = (1.0 - logps.exp().sum(-1)).clamp_min(0.0)
    return ids, logps, tail


BLOCK = 64  # columns: what _topk_entries looks into only if its largest entry is among the K largest of all blocks
CACHED_ELEMENTS = 2**20  # entries of a piece that a processor's caches hold


def _topk_entries(logits: Tensor, k: int) -> Tensor:
    """Return [n, 2 K + 1] of a chunk: ids, log-probabilities, and the mass that is left; ids are exact below 2^24.

    The K largest are looked for in the K blocks with the largest maxima alone, which hold them all; the maximum of the
    row, which the log-sum-exp starts from, is the largest of those maxima. So each entry is read twice, not five times.
    """
    wide = _wide(logits)
    if wide.device.type != "cpu" or wide.shape[-1] < 4 * k * BLOCK:
        logps, ids = wide.topk(k, dim=-1)
        logps = logps - wide.logsumexp(-1, keepdim=True)
    else:
        logps, ids = _topk_of_blocks(wide, k)
    tail = (1.0 - logps.exp().sum(-1, keepdim=True)).clamp_min(0.0)
    return torch.cat([ids.to(logps.dtype), logps, tail], dim=-1)


def _topk_of_blocks(wide: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [n, K] and ids [n, K] of the K largest of [n, V]; which of equals is as it comes."""
    whole = wide.shape[-1] // BLOCK * BLOCK
    blocks = wide[:, :whole].unflatten(-1, (-1, BLOCK))
    maxima = blocks.amax(-1)
    best = maxima.topk(k, dim=-1, sorted=False).indices
    found = blocks[torch.arange(len(wide), device=wide.device).unsqueeze(1), best].flatten(1)
    columns = torch.arange(wide.shape[-1], device=wide.device)
    ids = columns[:whole].view(-1, BLOCK)[best].flatten(1)
    highest = maxima.amax(-1, keepdim=True)
    if whole < wide.shape[-1]:
        rest = wide[:, whole:]
        found = torch.cat([found, rest], dim=-1)
        ids = torch.cat([ids, columns[whole:].expand(len(wide), -1)], dim=-1)
        highest = torch.maximum(highest, rest.amax(-1, keepdim=True))
    largest, places = found.topk(k, dim=-1)
    normalizer = (wide - highest).exp_().sum(-1, keepdim=True).log_() + highest
    return largest - normalizer, ids.gather(-1, places)


def topk_entries(logits: Logits, k: int, chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return what topk_logps does, in one pass over the logits [N, V] instead of two; no gradient."""
    if k > logits.shape[-1]:
        raise ValueError(f"top_k={k} is more than the vocabulary of {logits.shape[-1]}")
    rows = max(1, CACHED_ELEMENTS // logits.shape[-1])

    def entries(part: Tensor) -> Tensor:
        pieces = part.split(rows) if part.device.type == "cpu" else (part,)
        return torch.cat([_topk_entries(piece, k) for piece in pieces])

    with torch.no_grad():
        ids, logps, tail = chunked(entries, logits, (), chunk, held=2).split((k, k, 1), dim=-1)
    return ids.long(), logps, tail.squeeze(-1)


def tempered_entries(teacher_logps: Tensor, temperature: float, tail: str) -> Tensor:
    """Return a teacher's entries [N, K] at another temperature, of log-probabilities [N, K] with -inf where there is
    none.

    tail `renormalize`: p_i^(1/T) over their sum, exact. `bucket`: the rest is one event of which nobody knows how it is
    shared out. It is taken to be made of tokens as probable as the least one kept (or to be one token, where it holds
    less): the most that it can have at T < 1, so that each entry is a lower bound. At T = 1 nothing changes; at T > 1
    the rest would be bounded from nowhere above, which is refused.
    """
    if tail not in ("bucket", "renormalize") or (tail == "bucket" and temperature > 1):
        raise ValueError(f"entries cannot be tempered by {temperature} with tail={tail!r}")
    power, absent = 1.0 / temperature, teacher_logps == -math.inf
    wide = teacher_logps.double()
    raised = wide * power
    if tail == "bucket":
        rest = (1.0 - wide.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()
        least = wide.masked_fill(absent, math.inf).amin(-1, keepdim=True)
        raised = torch.cat([raised, rest + (power - 1.0) * torch.minimum(rest, least)], dim=-1)
    else:
        raised = raised.masked_fill(absent.all(-1, keepdim=True), 0.0)  # no entry: no number to divide by
    normalized = raised - raised.logsumexp(-1, keepdim=True)
    return normalized[:, : teacher_logps.shape[-1]].masked_fill(absent, -math.inf)


def check_tail(tail: str, k: int) -> None:
    """Refuse a way with the remaining mass that is none, or that makes the divergence of K entries nothing."""
    if tail == "renormalize" and k == 1:
        raise ValueError("tail='renormalize' with one entry is identically zero; use tail='bucket' or a larger top_k")
    if tail not in ("bucket", "renormalize", "truncate"):
        raise ValueError(f"tail={tail!r} is not known; choose bucket, renormalize or truncate")


def _log_rest(logps: Tensor) -> Tensor:
    """Return log(1 - sum exp(logps)) [n], bounded below where the entries hold all the mass.

    The bound is the precision of the sum: below it the remaining mass cannot be told from rounding.
    """
    rest = 1.0 - logps.exp().sum(-1)
    return rest.clamp_min(torch.finfo(logps.dtype).eps).log()


def _entries_kl(student: Tensor, teacher: Tensor, tail: str) -> Tensor:
    """Return the divergence [n] of log-probabilities [n, K] of the same events; a teacher's -inf is no event."""
    absent = teacher == -math.inf
    student = student.masked_fill(absent, -math.inf)
    if tail == "renormalize":
        empty = absent.all(-1, keepdim=True)  # their log-sum-exp would be -inf, and its gradient not a number
        student = student - student.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
        teacher = teacher - teacher.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    total = torch.where(absent, 0.0, teacher.exp() * (teacher - student)).sum(-1)
    if tail == "bucket":
        log_rest = _log_rest(teacher)
        total = total + log_rest.exp() * (log_rest - _log_rest(student))
    return total


def topk_kl(
    logits: Logits, ids: Tensor, teacher_logps: Tensor, tail: str = "bucket", chunk: int | None = None
) -> Tensor:
    """Return KL(teacher || student) of each token [N] on the teacher's entries ids, teacher_logps [N, K].

    An entry of -inf is none: its id is not looked at, on either side, so a token may have fewer than K entries.

    tail: `bucket` puts the remaining mass of both sides into one more entry; `renormalize` divides both sides by their
    mass in the support; `truncate` drops the rest (not a divergence: it can be negative). An entry with teacher_logps
    -inf is padding and counts nowhere.
    Source: ADPA, arXiv 2502.17927, section 3.1.
    """
    check_tail(tail, ids.shape[-1])

    def kl(part: Tensor, part_ids: Tensor, teacher: Tensor) -> Tensor:
        student = _gather(part, part_ids)
        return _entries_kl(student, teacher.to(student.dtype), tail)

    return chunked(kl, logits, (ids, teacher_logps), chunk)


def support_mass(logits: Logits, ids: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return the mass of logits [N, V] at the teacher's entries [N, K]; those with teacher_logps -inf are padding."""
    return gather_logps(logits, ids).exp().masked_fill(teacher_logps == -torch.inf, 0.0).sum(-1)


def event_kl(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return KL(teacher || student) of one event and its complement [M], from the log-probabilities [M] of the event.

    The event of a span is that a response goes on with its text; it may be of several tokens, others in each model.
    """
    return _entries_kl(logps.unsqueeze(-1), teacher_logps.to(logps.dtype).unsqueeze(-1), "bucket")


class Factors(NamedTuple):
    """Log-probabilities [N] that multiply the distributions at each token, of the student and of the teacher: those of
    the other tokens of a span of several (0 at any other token).
    """

    own: Tensor
    theirs: Tensor


def _plain(logits: Logits) -> Tensor:
    return torch.zeros(len(logits), 2, dtype=torch.float64, device=logits.device)


def _of_merged(
    distance: Callable[..., Tensor], logits: Logits, data: Sequence[Tensor], factors: Factors, chunk: int | None
) -> Tensor:
    """Return distance(log-probabilities [n, V], *data, factors [n, 2]) of merged distributions, with its gradient also
    by the student's factors, which are functions of other rows of the logits.

    A chunk knows its own rows alone. So it also gives the slope by its factors, and a term of the value 0 carries that
    slope to them.
    """

    def both(part: Tensor, *rows: Tensor) -> Tensor:
        logps = _wide(part).log_softmax(-1)

        @torch.enable_grad()
        def slope() -> Tensor:
            own = rows[-1][:, :1].detach().requires_grad_()
            scales = torch.cat([own, rows[-1][:, 1:]], dim=-1)
            return torch.autograd.grad(distance(logps.detach(), *rows[:-1], scales).sum(), own)[0].squeeze(-1)

        found = distance(logps, *rows)
        return torch.stack([found, _watched(slope, found)], dim=-1)

    table = torch.stack([factors.own.detach(), factors.theirs], dim=-1)
    value, slope = chunked(both, logits, (*data, table), chunk, held=8).unbind(-1)
    return value + slope.detach() * (factors.own - factors.own.detach())


def sorted_distance(
    logits: Logits, teacher_logps: Tensor, chunk: int | None = None, factors: Factors | None = None
) -> Tensor:
    """Return the universal logit distance of each token [N]: the L1 distance of sorted probabilities.

    teacher_logps [N, K] in any order, -inf where there is none. The K largest probabilities of both sides are compared
    rank by rank, and the mass that is left as one more rank; a vocabulary below K counts as filled with zeros. With K
    the teacher's whole vocabulary that is the distance itself; with fewer a lower bound of it (triangle inequality).
    Rows without any entry give 0. factors: of merged spans, whose teacher_logps have the teacher's factor in them.
    Source: ULD, arXiv 2402.12030, eq. 4.
    """

    def distance(logps: Tensor, teacher: Tensor, scales: Tensor) -> Tensor:
        """Return the distances of a chunk [n]."""
        own, theirs = scales.to(logps.dtype).unbind(-1)
        size = min(teacher.shape[-1], logps.shape[-1])
        student = (logps.topk(size, dim=-1).values + own.unsqueeze(-1)).exp()
        student = torch.nn.functional.pad(student, (0, teacher.shape[-1] - size))
        found = teacher.to(student.dtype).exp().sort(-1, descending=True).values
        student = torch.where(found > 0, student, 0.0)  # a rank that the teacher does not tell is in the rest
        rest = (found.sum(-1) - student.sum(-1) - (theirs.exp() - own.exp())).abs()  # what is left of both, subtracted
        return torch.where((teacher == -math.inf).all(-1), 0.0, (student - found).abs().sum(-1) + rest)

    if factors is not None:
        return _of_merged(distance, logits, (teacher_logps,), factors, chunk)
    plain = lambda part, *rows: distance(_wide(part).log_softmax(-1), *rows)  # noqa: E731
    return chunked(plain, logits, (teacher_logps, _plain(logits)), chunk, held=3)


def hybrid_distance(
    logits: Logits,
    ids: Tensor,
    teacher_logps: Tensor,
    shared: Tensor | None,
    beta: float,
    weights: tuple[float, float],
    chunk: int | None = None,
    factors: Factors | None = None,
) -> Tensor:
    """Return GOLD's hybrid of each token [N]: weights[0] times a divergence at the ids that both vocabularies have.

    Added is weights[1] times the L1 distance of all other probabilities, sorted.

    ids [N, K] are the student's, below 0 for a token that it lacks; teacher_logps [N, K] -inf where there is no entry.
    shared [V]: which of the student's ids the teacher has, entries or not; those of the entries always count. The
    divergence is generalized_jsd's, of parts that do not sum to 1, so it may be negative. With the teacher's whole
    vocabulary this is GOLD's; with fewer entries the mass of both sides that is in neither part is one more rank.
    Rows without any entry give 0. factors: as sorted_distance's. Source: TRL's GOLD trainer (use_uld_loss,
    uld_use_hybrid_loss).
    """

    def distance(logps: Tensor, part_ids: Tensor, teacher: Tensor, scales: Tensor) -> Tensor:
        """Return the hybrid of a chunk [n]."""
        mine, theirs = scales.to(logps.dtype).unbind(-1)
        logps = logps + mine.unsqueeze(-1)
        there = teacher > -math.inf
        both, width = there & (part_ids >= 0), logps.shape[-1]
        known = torch.zeros(len(logps), width + 1, dtype=torch.bool, device=logps.device)
        known = known.scatter_(-1, part_ids.where(both, width), True)[:, :width]
        known = known if shared is None else known | shared.to(logps.device)
        target = teacher.to(logps.dtype).where(there, 0.0)
        student = logps.gather(-1, part_ids.where(both, 0))
        together = _parts_jsd(student, target, beta).where(both, 0.0).sum(-1)
        others = target.exp().masked_fill(both | ~there, 0.0).sort(-1, descending=True).values
        size = min(teacher.shape[-1], width)
        own = logps.exp().masked_fill(known, 0.0).topk(size, dim=-1).values
        own = torch.nn.functional.pad(own, (0, teacher.shape[-1] - size)).where(others > 0, 0.0)
        seen = student.exp().where(both, 0.0).sum(-1) + own.sum(-1)
        # what is left of both, subtracted
        rest = (target.exp().where(there, 0.0).sum(-1) - seen - (theirs.exp() - mine.exp())).abs()
        total = weights[0] * together + weights[1] * ((own - others).abs().sum(-1) + rest)
        return total.where(there.any(-1), 0.0)

    if factors is not None:
        return _of_merged(distance, logits, (ids, teacher_logps), factors, chunk)
    plain = lambda part, *rows: distance(_wide(part).log_softmax(-1), *rows)  # noqa: E731
    return chunked(plain, logits, (ids, teacher_logps, _plain(logits)), chunk, held=4)


def expected_advantage(logits: Logits, ids: Tensor, advantages: Tensor, chunk: int | None = None) -> Tensor:
    """Return sum_a pi_theta(a) A(a) of each token [N]: the full softmax gathered at ids, A = advantages [N, K].

    Source: ADPA, arXiv 2502.17927, eq. 11.
    """

    def expected(part: Tensor, part_ids: Tensor, values: Tensor) -> Tensor:
        probabilities = _gather(part, part_ids).exp()
        return (probabilities * values.to(probabilities.dtype)).sum(-1)

    return chunked(expected, logits, (ids, advantages), chunk)


def _watched(function: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Return what is only looked at, without gradient; a backward pass, which runs a chunk again, gets zeros."""
    return torch.zeros_like(like) if torch.is_grad_enabled() else function()


def distillation_scores(
    logits: Logits,
    targets: Tensor,
    ids: Tensor,
    teacher_logps: Tensor,
    tail: str = "bucket",
    chunk: int | None = None,
) -> Tensor:
    """Return token_logps, topk_kl and support_mass of each token [N, 3] in one pass over the logits.

    The mass has no gradient.
    """
    check_tail(tail, ids.shape[-1])

    def scores(part: Tensor, part_targets: Tensor, part_ids: Tensor, teacher: Tensor) -> Tensor:
        found = _gather(part, torch.cat([part_targets.unsqueeze(-1), part_ids], dim=-1))
        student = found[:, 1:]
        kl = _entries_kl(student, teacher.to(student.dtype), tail)
        mass = _watched(lambda: student.exp().masked_fill(teacher == -math.inf, 0.0).sum(-1), kl)
        return torch.stack([found[:, 0], kl, mass], dim=-1)

    return chunked(scores, logits, (targets, ids, teacher_logps), chunk)


def advantage_scores(
    logits: Logits, ids: Tensor, advantages: Tensor, present: Tensor, chunk: int | None = None
) -> Tensor:
    """Return expected_advantage, the mass at the entries that are `present` [N, K], and the entropy of each token.

    [N, 3], in one pass over the logits; mass and entropy have no gradient.
    """

    def scores(part: Tensor, part_ids: Tensor, values: Tensor, there: Tensor) -> Tensor:
        probabilities = _gather(part, part_ids).exp()
        expected = (probabilities * values.to(probabilities.dtype)).sum(-1)
        mass = _watched(lambda: probabilities.masked_fill(~there, 0.0).sum(-1), expected)
        return torch.stack([expected, mass, _watched(lambda: _entropy(part), expected)], dim=-1)

    return chunked(scores, logits, (ids, advantages, present), chunk, held=2)
