"""Pure tensor maths of the losses: token log-probabilities, top-k divergences, expected advantages.

Letters: N response tokens of a whole batch (flat), V vocabulary, K teacher entries, B rows. Logits come in the model's
dtype, as a tensor or as hidden states and the head's weight; maths is done in float32 (float64 stays float64), chunk by
chunk (forward/chunks.py): no float32 [N, V] tensor is ever held.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from forward.chunks import Logits, chunked, whole


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def token_logps(logits: Logits, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Return log pi(target) of each token [N], as gather minus logsumexp of logits [N, V]."""
    return gather_logps(logits, targets.unsqueeze(-1), chunk).squeeze(-1)


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    return _wide(logits.gather(-1, ids)) - _wide(logits).logsumexp(-1, keepdim=True)


def gather_logps(logits: Logits, ids: Tensor, chunk: int | None = None) -> Tensor:
    """Return the full-softmax log-probabilities at ids [N, K]."""
    return chunked(_gather, logits, (ids,), chunk)


def _normalizer(logits: Tensor) -> Tensor:
    return _wide(logits).logsumexp(-1)


def log_normalizers(logits: Logits, chunk: int | None = None) -> Tensor:
    """Return log sum_v exp(logit_v) of each token [N]."""
    return chunked(_normalizer, logits, (), chunk)


def _entropy(logits: Tensor) -> Tensor:
    logps = _wide(logits).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def entropies(logits: Logits, chunk: int | None = None) -> Tensor:
    """Return the entropy in nats of each token's distribution [N]."""
    return chunked(_entropy, logits, (), chunk)


def _log_collision(logits: Tensor) -> Tensor:
    wide = _wide(logits)
    return (2 * wide).logsumexp(-1) - 2 * wide.logsumexp(-1)


def log_collision(logits: Logits, chunk: int | None = None) -> Tensor:
    """Return log sum_v pi(v)^2 of each token [N]: the log-probability that two draws are equal."""
    return chunked(_log_collision, logits, (), chunk)


def log_ratios(logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return z = log pi_0 - log pi_theta and log pi_0, both [n, V], of a chunk of logits [n, V]."""
    reference = _wide(reference_logits).log_softmax(-1)
    return reference - _wide(logits).log_softmax(-1), reference


def _full_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    z, reference = log_ratios(logits, reference_logits)
    return (reference.exp() * z).sum(-1)


def full_kl(logits: Logits, reference_logits: Logits, chunk: int | None = None) -> Tensor:
    """Return KL(pi_0 || pi_theta) of each token [N] over the whole vocabulary, from logits [N, V] of both."""
    return chunked(_full_kl, logits, (reference_logits,), chunk, held=4)


def _parts_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return what each event adds to the generalized Jensen-Shannon divergence, from log-probabilities."""
    if beta == 0:
        return teacher.exp() * (teacher - student)
    if beta == 1:
        return student.exp() * (student - teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)


def _jsd(logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float) -> Tensor:
    student, teacher = ((_wide(x) / temperature).log_softmax(-1) for x in (logits, teacher_logits))
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * to_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)


def generalized_jsd(
    logits: Logits, teacher_logits: Logits, beta: float, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of each token [N], from logits [N, V] of student and teacher.

    beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student. The ends are the KLs
    that the scaled divergence tends to: beta 0 is KL(teacher || student), 1 is KL(student || teacher). No factor
    temperature^2. Source: GKD, arXiv 2306.13649, section 3.
    """
    return chunked(lambda part, other: _jsd(part, other, beta, temperature), logits, (teacher_logits,), chunk, held=8)


def mixed_logps(teachers: Sequence[Logits]) -> Logits:
    """Return the log of the teachers' average probabilities [N, V], from the logits [N, V] of each."""
    if len(teachers) == 1:
        return teachers[0]
    total = _wide(whole(teachers[0])).log_softmax(-1)
    for logits in teachers[1:]:
        total = torch.logaddexp(total, _wide(whole(logits)).log_softmax(-1))
    return total - math.log(len(teachers))


def chunked_risk(
    risk: Callable[[Tensor, Tensor], Tensor], logits: Logits, reference_logits: Logits, chunk: int | None = None
) -> Tensor:
    """Apply risk(z [n, V], log pi_0 [n, V]) -> [n] to chunks; z = log pi_0 - log pi_theta."""

    def of_chunk(part: Tensor, reference: Tensor) -> Tensor:
        return risk(*log_ratios(part, reference))

    return chunked(of_chunk, logits, (reference_logits,), chunk, held=12)


def row_sums(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum values [N] by their row index [N] into [num_rows]."""
    return torch.zeros(num_rows, dtype=values.dtype, device=values.device).index_add(0, rows, values)


def weighted_logps(teachers: Sequence[Logits], weights: Sequence[float], of_logps: bool) -> Tensor:
    """Return log sum_i w_i p_i [N, V] from the logits [N, V] of each teacher; weights sum to 1.

    of_logps: sum_i w_i log p_i, up to a constant a row.
    """
    total: Tensor | None = None
    for logits, weight in zip(teachers, weights, strict=True):
        logps = _wide(whole(logits)).log_softmax(-1)
        own = weight * logps if of_logps else logps + math.log(weight)
        total = own if total is None else total + own if of_logps else torch.logaddexp(total, own)
    assert total is not None, "there is a teacher"
    return total


def tempered_token_logps(logits: Logits, targets: Tensor, temperature: float, chunk: int | None = None) -> Tensor:
    """Return log of softmax(logits / temperature) at each token [N]."""
    if temperature == 1:
        return token_logps(logits, targets, chunk)
    ids = targets.unsqueeze(-1)
    return chunked(lambda part, at: _gather(_wide(part) / temperature, at), logits, (ids,), chunk, held=2).squeeze(-1)


def tempered_jsd(
    logits: Logits, teacher_logits: Logits, beta: float, temperature: float, teacher_temperature: float
) -> Tensor:
    """Return generalized_jsd [N] to softmax(teacher_logits / teacher_temperature); `temperature` divides both sides."""
    if teacher_temperature == 1:
        return generalized_jsd(logits, teacher_logits, beta, temperature)

    def jsd(part: Tensor, other: Tensor) -> Tensor:
        return _jsd(part, _wide(other) / teacher_temperature, beta, temperature)

    return chunked(jsd, logits, (teacher_logits,), None, held=9)
