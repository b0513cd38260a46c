"""Pure tensor maths of the losses: token log-probabilities, top-k divergences, expected advantages.

Letters: N response tokens of a whole batch (flat), V vocabulary, K teacher entries, B rows. Logits come in the model's
dtype; maths is done in float32 (float64 stays float64), chunk by chunk, and each chunk is computed again in the
backward pass: no float32 [N, V] tensor is ever held.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # entries of one chunk of [n, V]: 128 MiB in float32, whatever the vocabulary


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Chunks(torch.autograd.Function):
    """Apply a function to chunks of rows; the backward pass runs each chunk again and writes its gradient in place.

    So beside logits and their one gradient nothing of size [N, V] is ever held (split and cat would hold it twice).
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], chunk: int, logits: Tensor, *others: Tensor) -> Tensor:
        """Return the joined results [N, ...]."""
        ctx.function, ctx.chunk = function, chunk
        ctx.save_for_backward(logits, *others)
        pieces = zip(logits.split(chunk), *(other.split(chunk) for other in others), strict=True)
        return torch.cat([function(*piece) for piece in pieces])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of logits [N, V]; the other inputs are data."""
        logits, *others = ctx.saved_tensors
        result = torch.empty_like(logits)
        tensors = (logits, gradients[0], result, *others)
        for part, gradient, into, *rest in zip(*(tensor.split(ctx.chunk) for tensor in tensors), strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(leaf, *rest)
            into.copy_(torch.autograd.grad(out, leaf, gradient)[0])
        return (None, None, result, *(None for _ in others))


def _chunked(
    function: Callable[..., Tensor], logits: Tensor, others: tuple[Tensor, ...], chunk: int | None, held: int = 1
) -> Tensor:
    """Apply function(logits [n, V], *others [n, ...]) -> [n, ...] to chunks of rows and join the results.

    `held` says how many tensors as large as the chunk the function needs at once: the chunk shrinks by it.
    """
    return _Chunks.apply(function, chunk or max(1, CHUNK_ELEMENTS // (held * logits.shape[-1])), logits, *others)


def token_logps(logits: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Return log pi(target) of each token [N], as gather minus logsumexp of logits [N, V]."""
    return gather_logps(logits, targets.unsqueeze(-1), chunk).squeeze(-1)


def _gather(logits: Tensor, ids: Tensor) -> Tensor:
    return _wide(logits.gather(-1, ids)) - _wide(logits).logsumexp(-1, keepdim=True)


def gather_logps(logits: Tensor, ids: Tensor, chunk: int | None = None) -> Tensor:
    """Return the full-softmax log-probabilities at ids [N, K]."""
    return _chunked(_gather, logits, (ids,), chunk)


def _normalizer(logits: Tensor) -> Tensor:
    return _wide(logits).logsumexp(-1)


def log_normalizers(logits: Tensor, chunk: int | None = None) -> Tensor:
    """Return log sum_v exp(logit_v) of each token [N]."""
    return _chunked(_normalizer, logits, (), chunk)


def _entropy(logits: Tensor) -> Tensor:
    logps = _wide(logits).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def entropies(logits: Tensor, chunk: int | None = None) -> Tensor:
    """Return the entropy in nats of each token's distribution [N]."""
    return _chunked(_entropy, logits, (), chunk)


def _log_collision(logits: Tensor) -> Tensor:
    wide = _wide(logits)
    return (2 * wide).logsumexp(-1) - 2 * wide.logsumexp(-1)


def log_collision(logits: Tensor, chunk: int | None = None) -> Tensor:
    """Return log sum_v pi(v)^2 of each token [N]: the log-probability that two draws are equal."""
    return _chunked(_log_collision, logits, (), chunk)


def log_ratios(logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return z = log pi_0 - log pi_theta and log pi_0, both [n, V], of a chunk of logits [n, V]."""
    reference = _wide(reference_logits).log_softmax(-1)
    return reference - _wide(logits).log_softmax(-1), reference


def _full_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    z, reference = log_ratios(logits, reference_logits)
    return (reference.exp() * z).sum(-1)


def full_kl(logits: Tensor, reference_logits: Tensor, chunk: int | None = None) -> Tensor:
    """Return KL(pi_0 || pi_theta) of each token [N] over the whole vocabulary, from logits [N, V] of both."""
    return _chunked(_full_kl, logits, (reference_logits,), chunk, held=4)


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
    logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of each token [N], from logits [N, V] of student and teacher.

    beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student. The ends are the KLs
    that the scaled divergence tends to: beta 0 is KL(teacher || student), 1 is KL(student || teacher). No factor
    temperature^2. Source: GKD, arXiv 2306.13649, section 3.
    """
    return _chunked(lambda part, other: _jsd(part, other, beta, temperature), logits, (teacher_logits,), chunk, held=8)


def mixed_logps(teachers: Sequence[Tensor]) -> Tensor:
    """Return the log of the teachers' average probabilities [N, V], from the logits [N, V] of each."""
    if len(teachers) == 1:
        return teachers[0]
    total = _wide(teachers[0]).log_softmax(-1)
    for logits in teachers[1:]:
        total = torch.logaddexp(total, _wide(logits).log_softmax(-1))
    return total - math.log(len(teachers))


def topk_logps(logits: Tensor, k: int, chunk: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k most probable ids [N, K], their log-probabilities [N, K] and the remaining mass [N]; no gradient."""
    if k > logits.shape[-1]:
        raise ValueError(f"top_k={k} is more than the vocabulary of {logits.shape[-1]}")
    with torch.no_grad():
        ids = _chunked(lambda part: part.topk(k, dim=-1).indices, logits, (), chunk)
        logps = gather_logps(logits, ids, chunk)
        tail = (1.0 - logps.exp().sum(-1)).clamp_min(0.0)
    return ids, logps, tail


def _log_rest(logps: Tensor) -> Tensor:
    """Return log(1 - sum exp(logps)) [n], bounded below where the entries hold all the mass.

    The bound is the precision of the sum: below it the remaining mass cannot be told from rounding.
    """
    rest = 1.0 - logps.exp().sum(-1)
    return rest.clamp_min(torch.finfo(logps.dtype).eps).log()


def topk_kl(
    logits: Tensor, ids: Tensor, teacher_logps: Tensor, tail: str = "bucket", chunk: int | None = None
) -> Tensor:
    """Return KL(teacher || student) of each token [N] on the teacher's entries ids, teacher_logps [N, K].

    An entry of -inf is none: its id is not looked at, on either side, so a token may have fewer than K entries.

    tail: `bucket` puts the remaining mass of both sides into one more entry; `renormalize` divides both sides by their
    mass in the support; `truncate` drops the rest (not a divergence: it can be negative). An entry with teacher_logps
    -inf is padding and counts nowhere.
    Source: ADPA, arXiv 2502.17927, section 3.1.
    """
    if tail == "renormalize" and ids.shape[-1] == 1:
        raise ValueError("tail='renormalize' with one entry is identically zero; use tail='bucket' or a larger top_k")
    if tail not in ("bucket", "renormalize", "truncate"):
        raise ValueError(f"tail={tail!r} is not known; choose bucket, renormalize or truncate")

    def kl(part: Tensor, part_ids: Tensor, teacher: Tensor) -> Tensor:
        student = _gather(part, part_ids)
        return _entries_kl(student, teacher.to(student.dtype), tail)

    return _chunked(kl, logits, (ids, teacher_logps), chunk)


def support_mass(logits: Tensor, ids: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return the mass of logits [N, V] at the teacher's entries [N, K]; those with teacher_logps -inf are padding."""
    return gather_logps(logits, ids).exp().masked_fill(teacher_logps == -torch.inf, 0.0).sum(-1)


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


def inside(ids: Tensor, values: Tensor, width: int, nothing: float = -math.inf) -> tuple[Tensor, Tensor]:
    """Return entries [N, K] for logits of `width` columns: an id beyond them becomes 0 with the value `nothing`."""
    beyond = ids >= width
    return ids.masked_fill(beyond, 0), values.masked_fill(beyond, nothing)


def event_kl(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return KL(teacher || student) of one event and its complement [M], from the log-probabilities [M] of the event.

    The event of a span is that a response goes on with its text; it may be of several tokens, others in each model.
    """
    return _entries_kl(logps.unsqueeze(-1), teacher_logps.to(logps.dtype).unsqueeze(-1), "bucket")


def sorted_distance(logits: Tensor, teacher_logps: Tensor, chunk: int | None = None) -> Tensor:
    """Return the universal logit distance of each token [N]: the L1 distance of sorted probabilities.

    teacher_logps [N, K] in any order, -inf where there is none. The K largest probabilities of both sides are compared
    rank by rank, and the mass that is left as one more rank; a vocabulary below K counts as filled with zeros. With K
    the teacher's whole vocabulary that is the distance itself; with fewer a lower bound of it (triangle inequality).
    Rows without any entry give 0. Source: ULD, arXiv 2402.12030, eq. 4.
    """

    def distance(part: Tensor, teacher: Tensor) -> Tensor:
        wide = _wide(part)
        size = min(teacher.shape[-1], wide.shape[-1])
        student = wide.log_softmax(-1).topk(size, dim=-1).values.exp()
        student = torch.nn.functional.pad(student, (0, teacher.shape[-1] - size))
        found = teacher.to(student.dtype).exp().sort(-1, descending=True).values
        student = torch.where(found > 0, student, 0.0)  # a rank that the teacher does not tell is in the rest
        rest = (found.sum(-1) - student.sum(-1)).abs()  # (1 - sum) of both, subtracted
        return torch.where((teacher == -math.inf).all(-1), 0.0, (student - found).abs().sum(-1) + rest)

    return _chunked(distance, logits, (teacher_logps,), chunk, held=3)


def expected_advantage(logits: Tensor, ids: Tensor, advantages: Tensor, chunk: int | None = None) -> Tensor:
    """Return sum_a pi_theta(a) A(a) of each token [N]: the full softmax gathered at ids, A = advantages [N, K].

    Source: ADPA, arXiv 2502.17927, eq. 11.
    """

    def expected(part: Tensor, part_ids: Tensor, values: Tensor) -> Tensor:
        probabilities = _gather(part, part_ids).exp()
        return (probabilities * values.to(probabilities.dtype)).sum(-1)

    return _chunked(expected, logits, (ids, advantages), chunk)


def chunked_risk(
    risk: Callable[[Tensor, Tensor], Tensor], logits: Tensor, reference_logits: Tensor, chunk: int | None = None
) -> Tensor:
    """Apply risk(z [n, V], log pi_0 [n, V]) -> [n] to chunks; z = log pi_0 - log pi_theta."""

    def of_chunk(part: Tensor, reference: Tensor) -> Tensor:
        return risk(*log_ratios(part, reference))

    return _chunked(of_chunk, logits, (reference_logits,), chunk, held=12)


def row_sums(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum values [N] by their row index [N] into [num_rows]."""
    return torch.zeros(num_rows, dtype=values.dtype, device=values.device).index_add(0, rows, values)


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


def tempered_token_logps(logits: Tensor, targets: Tensor, temperature: float, chunk: int | None = None) -> Tensor:
    """Return log of softmax(logits / temperature) at each token [N]."""
    if temperature == 1:
        return token_logps(logits, targets, chunk)
    ids = targets.unsqueeze(-1)
    return _chunked(lambda part, at: _gather(_wide(part) / temperature, at), logits, (ids,), chunk, held=2).squeeze(-1)


def tempered_jsd(
    logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float, teacher_temperature: float
) -> Tensor:
    """Return generalized_jsd [N] to softmax(teacher_logits / teacher_temperature); `temperature` divides both sides."""
    if teacher_temperature == 1:
        return generalized_jsd(logits, teacher_logits, beta, temperature)

    def jsd(part: Tensor, other: Tensor) -> Tensor:
        return _jsd(part, _wide(other) / teacher_temperature, beta, temperature)

    return _chunked(jsd, logits, (teacher_logits,), None, held=9)
