"""A teacher at another temperature: exact where its whole distribution is known, a bound where it was truncated."""

import math

import pytest
import torch

from functional import tempered_token_logps
from teacher.entries import tempered_entries
from tests.support.bigram import items_of, trainer_of
from trainers.opd import distillation_advantages


def drawn(vocab: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [40, V] of distributions, and the K largest [40, K]."""
    logits = 2 * torch.randn(40, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(vocab))
    logps = logits.log_softmax(-1)
    return logps, logps.sort(-1, descending=True).values[:, :k]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
def test_the_tempered_rest_holds_at_least_what_the_exact_one_does(temperature):
    """So each kept entry is a lower bound; the bound is off by less, the sharper the teacher is made."""
    gaps = []
    for k in (4, 8, 16):
        logps, top = drawn(30, k)
        exact = (logps / temperature).log_softmax(-1).sort(-1, descending=True).values[:, :k]
        found = tempered_entries(top, temperature, "bucket")
        assert (found <= exact + 1e-9).all() and (found.exp().sum(-1) <= 1 + 1e-12).all()
        gaps.append(float((exact.exp() - found.exp()).sum(-1).mean()))
    assert gaps[2] < 0.02
    if temperature == 1:
        assert max(gaps) < 1e-12
    else:
        assert gaps[0] > gaps[1] > gaps[2]


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_whole_distribution_is_tempered_exactly(tail):
    logps, top = drawn(9, 9)
    found = tempered_entries(top, 0.5, tail)
    torch.testing.assert_close(found, (top / 0.5).log_softmax(-1), atol=1e-9, rtol=1e-9)
    two = torch.cat([top, torch.full_like(top[:, :1], -math.inf)], dim=1)  # an entry that is none
    padded = tempered_entries(two, 0.5, tail)
    torch.testing.assert_close(padded[:, :-1], found)
    assert (padded[:, -1] == -math.inf).all()
    nothing = tempered_entries(torch.full_like(top, -math.inf), 0.5, tail)
    assert (nothing == -math.inf).all()


def test_where_the_rest_is_one_token_the_bucket_is_exact():
    logps, top = drawn(9, 8)
    exact = (logps / 0.4).log_softmax(-1).sort(-1, descending=True).values[:, :8]
    torch.testing.assert_close(tempered_entries(top, 0.4, "bucket"), exact)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.teacher_temperature=2"], "loss.tail=renormalize"),
        (["loss.teacher_temperature=0.5", "loss.tail=truncate"], "nobody knows the sum"),
        (["loss.teacher_temperature=0.5", "loss.alignment=bytes", "loss.teacher_tokenizer=none"], "of a span"),
        (["loss.teacher_temperature=0"], "above 0"),
    ],
)
def test_what_cannot_be_tempered_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        trainer_of("dckd", *overrides)


def test_the_objective_says_what_was_done():
    said = trainer_of("dckd", "loss.teacher_temperature=0.3").objective()
    assert "π_dpo^(1/0.3)" in said and "the rest as if" in said
    assert "π_dpo^" not in trainer_of("dckd").objective()
    assert "divided by 0.3" in trainer_of("opd", "loss.teacher_temperature=0.3").objective()
    assert "its logits over 0.3" in trainer_of("gkd", "loss.teacher_temperature=0.3").objective()


def test_the_reward_of_opd_is_that_of_the_tempered_teacher():
    plain, sharp = trainer_of("opd"), trainer_of("opd", "loss.teacher_temperature=0.3")
    items = [item._replace(notes=None, label=None) for item in items_of(plain, "opd")]
    teacher, policy = (model.table.detach() for model in (sharp.frozen_models["teacher"], sharp.policy))
    with torch.no_grad():  # as in a rollout
        found = sharp.noted(items)
    for item, noted in zip(items, found, strict=True):
        ids = torch.tensor(item.sequences[0].ids)
        places = [t for t, on in enumerate(item.sequences[0].response) if on]
        before, after = ids[[t - 1 for t in places]], ids[places]
        at = torch.arange(len(places))
        own, theirs = policy[before].log_softmax(-1)[at, after], (teacher[before] / 0.3).log_softmax(-1)[at, after]
        wanted = distillation_advantages(own[None], theirs[None], sharp.config.discount)[0]
        torch.testing.assert_close(torch.from_numpy(noted.notes[:, 1]).double(), wanted, atol=1e-5, rtol=1e-5)
    logits, targets = policy[:5], torch.arange(5)
    torch.testing.assert_close(
        tempered_token_logps(logits, targets, 0.5, chunk=2), (2 * logits).log_softmax(-1)[targets, targets]
    )
