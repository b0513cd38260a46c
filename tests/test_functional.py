"""The maths against slow float64 twins written by another route, gradcheck, chunks, and what stays in memory."""

import math

import pytest
import torch

from functional import entropies, gather_logps, row_sums, token_logps
from teacher.entries import expected_advantage, topk_kl, topk_logps
from trainers.adpa import floored

N, V, K = 7, 11, 4


@pytest.fixture
def logits():
    return torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher():
    return topk_logps(torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2, K)


def twin_probabilities(row):
    """Softmax by plain Python, without a shift by the maximum."""
    weights = [math.exp(float(x)) for x in row]
    return [w / sum(weights) for w in weights]


def twin_kl(row, ids, logps, tail):
    student = [twin_probabilities(row)[int(i)] for i in ids]
    target = [math.exp(float(x)) for x in logps]
    if tail == "renormalize":
        student, target = [s / sum(student) for s in student], [t / sum(target) for t in target]
    if tail == "bucket":
        student, target = [*student, 1 - sum(student)], [*target, 1 - sum(target)]
    return sum(t * math.log(t / s) for t, s in zip(target, student, strict=True))


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_topk_kl_equals_its_twin_and_its_gradient_checks(logits, teacher, tail):
    ids, logps, _ = teacher
    ours = topk_kl(logits, ids, logps, tail, chunk=3)
    expected = [twin_kl(logits[n], ids[n], logps[n], tail) for n in range(N)]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: topk_kl(x, ids, logps, tail, chunk=3), logits.requires_grad_())


def test_bucket_kl_is_zero_against_itself_and_positive_otherwise(logits, teacher):
    ids, logps, _ = topk_logps(logits, K)
    assert topk_kl(logits, ids, logps).abs().max() < 1e-12
    assert (topk_kl(logits, teacher[0], teacher[1]) > 0).all()


def test_renormalised_top_1_is_refused(logits):
    with pytest.raises(ValueError, match="identically zero"):
        topk_kl(logits, torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1), "renormalize")


def test_expected_advantage_equals_its_twin(logits, teacher):
    ids, values, _ = teacher
    ours = expected_advantage(logits, ids, values, chunk=2)
    for n in range(N):
        p = twin_probabilities(logits[n])
        assert float(ours[n]) == pytest.approx(
            sum(p[int(i)] * float(v) for i, v in zip(ids[n], values[n], strict=True)), abs=1e-12
        )
    assert torch.autograd.gradcheck(lambda x: expected_advantage(x, ids, values, chunk=2), logits.requires_grad_())


def test_token_logps_and_entropies_equal_their_twins(logits):
    targets = torch.arange(N) % V
    for n in range(N):
        p = twin_probabilities(logits[n])
        assert float(token_logps(logits, targets, 2)[n]) == pytest.approx(math.log(p[int(targets[n])]), abs=1e-12)
        assert float(entropies(logits, 2)[n]) == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: token_logps(x, targets, 2), logits.requires_grad_())


def test_chunks_change_nothing_and_an_empty_batch_is_empty(logits, teacher):
    ids, logps, _ = teacher
    assert torch.equal(topk_kl(logits, ids, logps, chunk=1), topk_kl(logits, ids, logps, chunk=100))
    assert torch.equal(gather_logps(logits, ids, 2), gather_logps(logits, ids, 100))
    assert topk_kl(logits[:0], ids[:0], logps[:0]).shape == (0,)


def test_no_float32_copy_of_all_logits_is_kept_for_the_backward_pass():
    logits = torch.randn(64, 50, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_logps(logits, torch.zeros(64, dtype=torch.int64), chunk=8)
    assert all(t.numel() < logits.numel() for t in kept if t.dtype == torch.float32)


def test_row_sums_add_by_row():
    assert row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4).tolist() == [1, 0, 6, 0]


def test_the_floor_removes_positive_advantages_of_improbable_tokens_only():
    advantages = torch.tensor([[3.0, -3.0, 1.0]])
    logps = torch.tensor([[0.001, 0.001, 0.5]]).log()
    assert floored(advantages, logps, 0.01).tolist() == [[0.0, -3.0, 1.0]]
