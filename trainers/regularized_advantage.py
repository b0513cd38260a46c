"""The regularized advantage of loss=adpa: the expected advantage with a KL to a base and an entropy, per token.

J = sum_e pi(e) [A(e) + tau log b(e)] + tau T H(pi) over the events e of a token: the K entries that the cache holds and
one bucket for the rest. With target temperature T = 1 that is E_pi[A] - tau KL(pi || b). Its maximum over distributions
is at pi* = (b exp(A / tau))^(1/T) / Z; J = tau T (log Z - KL(pi || pi*)). Toward tau = 0 it is the linear objective of
the paper. Sources: ADPA, arXiv 2502.17927; a KL to a base beside the log-ratio reward: G-OPD, arXiv 2602.12125.
Letters: N tokens, K entries, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from forward.chunks import Logits, chunked
from functional import _gather

CACHE_REST = 1e-3  # least mass outside of stored entries: what a cache's rounding (and cache.mass) cannot tell from 0


BASES = ("start", "reference_teacher", "teacher")


class Regularizer(NamedTuple):
    """tau, whose distribution b is, T, the factor that the cache's advantages carry, the floor on the teacher's
    probability, and whether the rest's advantage is the ratio of the teachers' masses there (else 0).
    """

    kl_weight: float
    base: str
    target_temperature: float = 1.0
    beta: float = 1.0
    floor: float = 0.0
    rest_by_tails: bool = False


class Regularized(NamedTuple):
    """Of each token [N]: J (with gradient), and without one E_pi[A], KL(pi || pi*), KL(pi || b), the mass of the
    entries, the entropy.
    """

    objective: Tensor
    advantage: Tensor
    to_target: Tensor
    to_base: Tensor
    mass: Tensor
    entropy: Tensor


def reference_teacher_logps(advantages: Tensor, teacher_logps: Tensor, beta: float) -> Tensor:
    """Return log pi_ref [N, K] at the entries: A = beta (log pi_dpo - log pi_ref) solved for it; -inf stays -inf."""
    return (teacher_logps - advantages / beta).clamp_max(0.0)


def log_rest(logps: Tensor, least: float) -> Tensor:
    """Return log of the mass [N] outside of entries [N, K], at least log `least`."""
    return (1.0 - logps.exp().sum(-1)).clamp_min(max(least, torch.finfo(logps.dtype).eps)).log()


def rest_advantages(advantages: Tensor, teacher_logps: Tensor, how: Regularizer) -> Tensor:
    """Return the advantage of the rest [N]: 0, or beta log of the ratio of both teachers' masses there."""
    if not how.rest_by_tails:
        return torch.zeros_like(advantages[:, 0])
    theirs = log_rest(reference_teacher_logps(advantages, teacher_logps, how.beta), CACHE_REST)
    own = log_rest(teacher_logps, CACHE_REST)
    value = how.beta * (own - theirs)
    return value.masked_fill((own.exp() < how.floor) & (value > 0), 0.0)


def _events(
    ids_logps: Tensor, advantages: Tensor, teacher_logps: Tensor, start_logps: list[Tensor], how: Regularizer
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of K + 1 events [N, K + 1], the rest last: log pi, A, log b, and which are none."""
    absent = teacher_logps == -torch.inf
    if how.base == "start":
        base, least = start_logps[0], 0.0
    elif how.base == "teacher":
        base, least = teacher_logps, CACHE_REST
    else:
        base, least = reference_teacher_logps(advantages, teacher_logps, how.beta), CACHE_REST
    base, own = base.masked_fill(absent, -torch.inf), ids_logps.masked_fill(absent, -torch.inf)
    kept = advantages.masked_fill((teacher_logps.exp() < how.floor) & (advantages > 0), 0.0)
    advantage = torch.cat([kept, rest_advantages(advantages, teacher_logps, how)[:, None]], dim=1)
    none = torch.cat([absent, torch.zeros_like(absent[:, :1])], dim=1)
    # What is no event is 0 everywhere: -inf times a probability of 0 would be no number.
    logps = torch.cat([own, log_rest(own, 0.0)[:, None]], dim=1).masked_fill(none, 0.0)
    log_base = torch.cat([base, log_rest(base, least)[:, None]], dim=1).masked_fill(none, 0.0)
    return logps, advantage.masked_fill(none, 0.0), log_base, none


def _objective(
    logits: Tensor, ids: Tensor, advantages: Tensor, teacher_logps: Tensor, *start: Tensor, how: Regularizer
) -> Tensor:
    at_ids = _gather(logits, ids)
    wide = [values.to(at_ids.dtype) for values in (advantages, teacher_logps, *start)]
    logps, advantage, log_base, none = _events(at_ids, wide[0], wide[1], wide[2:], how)
    p = logps.exp().masked_fill(none, 0.0)
    scale = how.kl_weight * how.target_temperature
    score = advantage + how.kl_weight * log_base
    objective = (p * (score - scale * logps)).sum(-1)
    with torch.no_grad():
        log_z = (score / scale).masked_fill(none, -torch.inf).logsumexp(-1)
        whole = logits.to(at_ids.dtype).log_softmax(-1)
        figures = [
            (p * advantage).sum(-1),
            log_z - objective / scale,
            (p * (logps - log_base)).sum(-1),
            p[:, :-1].sum(-1),
            -(whole.exp() * whole).sum(-1),
        ]
    return torch.stack([objective, *figures], dim=1)


def regularized_advantage(
    logits: Logits,
    ids: Tensor,
    advantages: Tensor,
    teacher_logps: Tensor,
    start_logps: Tensor | None,
    how: Regularizer,
    chunk: int | None = None,
) -> Regularized:
    """Return J and what tells a collapse, of logits [N, V] and entries ids, A, log pi_dpo [N, K].

    start_logps [N, K]: the start's full-vocabulary log-probabilities at the ids, where it is the base. An entry with
    teacher_logps -inf is none. A base that comes from the cache has at least CACHE_REST outside of its entries.
    """
    assert (how.base == "start") == (start_logps is not None), "only the start's log-probabilities are not in the cache"
    data = (ids, advantages, teacher_logps, *(() if start_logps is None else (start_logps,)))
    found = chunked(lambda *parts: _objective(*parts, how=how), logits, data, chunk, held=3)
    return Regularized(found[:, 0], *found[:, 1:].detach().unbind(dim=1))
