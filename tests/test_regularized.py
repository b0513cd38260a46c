"""The regularized advantage: golden reverse KLs, its optimum in closed form, its limits, its bases, its defaults."""

from pathlib import Path

import pytest
import torch

import launch
from teacher.entries import expected_advantage
from tests.golden.cases_io import load
from tests.support.bigram import trainer_of
from tests.support.helpers import composed
from trainers.regularized_advantage import CACHE_REST, Regularizer, reference_teacher_logps, regularized_advantage

CASES = sorted((Path(__file__).parent / "golden" / "cases").glob("D_opd_minillm_*.json"))


def drawn(tokens: int = 7, vocab: int = 9, k: int = 6, seed: int = 0):
    """Logits of a student, the ids of a teacher's top k, advantages and both teachers' log-probabilities, float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, reference = (
        torch.randn(tokens, vocab, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    logps, reference = teacher.log_softmax(-1), reference.log_softmax(-1)
    ids = logps.topk(k, dim=-1).indices
    own, theirs = logps.gather(1, ids), reference.gather(1, ids)
    return student, ids, own - theirs, own, theirs


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_with_the_reference_teacher_as_base_it_is_the_golden_reverse_kl_to_the_aligned_teacher(path):
    case = load(path)
    variant = next(v for v in case["variants"] if v["name"] == "exact_per_token_reverse_kl")
    student, teacher = (variant["inputs"][f"{who}_logits"].double().flatten(0, 1) for who in ("student", "teacher"))
    logps, vocab = teacher.log_softmax(-1), teacher.shape[-1]
    ids = torch.arange(vocab).expand(len(logps), vocab)
    advantages = torch.randn(logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    advantages -= (logps - advantages).logsumexp(-1, keepdim=True)  # of a reference teacher that is a distribution
    advantages = logps - (logps - advantages).log_softmax(-1)
    how = Regularizer(1.0, "reference_teacher", rest_by_tails=True)
    found = regularized_advantage(student, ids, advantages, logps, None, how, chunk=3)
    wanted = variant["outputs"]["reverse_kl"].double().flatten()
    torch.testing.assert_close(-found.objective, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tails", [False, True])
def test_with_tails_the_optimum_on_a_part_of_the_vocabulary_is_the_aligned_teacher(tails):
    student, ids, advantages, own, theirs = drawn()
    torch.testing.assert_close(reference_teacher_logps(advantages * 0.5, own, 0.5), theirs)
    how = Regularizer(1.0, "reference_teacher", rest_by_tails=tails)
    found = regularized_advantage(student, ids, advantages, own, None, how)
    p = student.softmax(-1).gather(1, ids)
    p, teacher = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=1) for x in (p, own.exp()))
    reverse_kl = (p * (p.log() - teacher.log())).sum(-1)
    assert torch.allclose(-found.objective, reverse_kl, rtol=1e-12) == tails
    assert (found.to_target >= 0).all()


@pytest.mark.parametrize("base", ["start", "reference_teacher", "teacher"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_optimum_is_the_base_times_exp_of_the_advantage(base, temperature):
    student, ids, advantages, own, theirs = drawn(tokens=3, vocab=7, k=6)  # one token outside: the bucket is that token
    start = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    at_ids = {"start": start.gather(1, ids), "reference_teacher": theirs, "teacher": own}[base]
    how, given = Regularizer(2.0, base, temperature), at_ids if base == "start" else None
    events = torch.cat([at_ids, torch.log1p(-at_ids.exp().sum(-1, keepdim=True))], dim=1)
    target = ((events + torch.cat([advantages, torch.zeros_like(events[:, :1])], dim=1) / 2.0) / temperature).softmax(
        -1
    )
    outside = torch.tensor([sorted(set(range(7)) - set(row))[0] for row in ids.tolist()])
    best = torch.empty(3, 7, dtype=torch.float64).scatter_(1, torch.cat([ids, outside[:, None]], dim=1), target.log())
    best.requires_grad_()
    found = regularized_advantage(best, ids, advantages, own, given, how)
    gradient = torch.autograd.grad(found.objective.sum(), best)[0]
    assert gradient.abs().max() < 1e-12 and found.to_target.abs().max() < 1e-12
    other = regularized_advantage(student, ids, advantages, own, given, how)
    torch.testing.assert_close(found.objective - other.objective, 2.0 * temperature * other.to_target)
    assert (other.to_target > 0.01).all()


def test_toward_kl_weight_0_it_is_the_papers_objective_and_its_gradient():
    student, ids, advantages, own, _ = drawn()
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    regularized_advantage(
        leaves[0], ids, advantages, own, None, Regularizer(1e-10, "reference_teacher")
    ).objective.sum().backward()
    expected_advantage(leaves[1], ids, advantages).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-8, rtol=1e-8)


def test_an_entry_that_is_none_counts_nowhere_and_gives_numbers():
    student, ids, advantages, own, _ = drawn()
    padded = [
        torch.cat([x, x[:, :1] * 0 + fill], dim=1) for x, fill in ((ids, 0), (advantages, 0.0), (own, -torch.inf))
    ]
    for how in (Regularizer(1.0, "teacher"), Regularizer(1.0, "reference_teacher", 0.5, rest_by_tails=True)):
        leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
        one = regularized_advantage(leaf, ids, advantages, own, None, how).objective
        two = regularized_advantage(other, *padded, None, how).objective
        torch.testing.assert_close(one, two)
        one.sum().backward(), two.sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad)


def test_a_cache_that_holds_all_the_mass_pulls_no_mass_to_minus_infinity():
    """float16 log-probabilities of a whole vocabulary add up to more than 1: the rest of the base is CACHE_REST."""
    student, ids, advantages, own, _ = drawn(vocab=6, k=6)
    leaf = student.float().requires_grad_()
    found = regularized_advantage(leaf, ids, advantages.half(), own.half() + 1e-3, None, Regularizer(1.0, "teacher"))
    found.objective.sum().backward()
    assert leaf.grad.isfinite().all() and found.to_target.isfinite().all()
    assert CACHE_REST == 1e-3


def test_by_default_what_the_aligned_teacher_left_to_the_reference_alone_is_not_asked_for():
    """The reference teacher has 30 % of its mass outside of the aligned teacher's entries, which hold 99.8 %."""
    own = torch.tensor([[0.90, 0.098]], dtype=torch.float64).log()
    theirs = torch.tensor([[0.40, 0.30]], dtype=torch.float64).log()
    asked = {}
    for options in ((), ("loss.rest_advantage=zero",)):
        config = trainer_of("adpa", "loss.objective=regularized", "loss.target_temperature=0.3", *options).config
        tails = config.rest_advantage == "tails"
        how = Regularizer(
            config.kl_weight, config.kl_reference, config.target_temperature, 1.0, config.floor, rest_by_tails=tails
        )
        student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        for _ in range(500):
            found = regularized_advantage(student, torch.tensor([[0, 1]]), own - theirs, own, None, how)
            student.data += 8 * torch.autograd.grad(found.objective.sum(), student)[0]
        assert found.to_target < 1e-3
        asked[options] = 1 - float(found.mass)
    assert asked[()] < 1e-3 < 0.02 < asked["loss.rest_advantage=zero",]


def test_the_floor_is_on_by_default_where_it_helped_and_off_in_the_papers_objective():
    assert trainer_of("adpa").config.floor == 0
    regularized = trainer_of("adpa", "loss.objective=regularized")
    assert regularized.config.floor == 0.01 and "π_dpo(a) < 0.01" in regularized.objective()
    assert trainer_of("adpa", "loss.objective=regularized", "loss.advantage_floor=0").config.floor == 0
    student, ids, advantages, own, _ = drawn()
    own = own - 9  # everything is improbable: positive advantages go, negative ones stay
    how = Regularizer(1.0, "teacher", floor=0.01)
    found = regularized_advantage(student, ids, advantages, own, None, how)
    assert (advantages > 0).any()
    wanted = (student.softmax(-1).gather(1, ids) * advantages.clamp_max(0)).sum(-1)
    torch.testing.assert_close(found.advantage, wanted)


def test_a_reference_model_is_needed_by_the_base_start_alone():
    assert trainer_of("adpa").needs.reference == ""
    assert trainer_of("adpa", "loss.objective=regularized").needs.reference == ""
    assert trainer_of("adpa").needs.reference == ""  # the paper's objective has no base
    live = ["loss.objective=regularized", "loss.kl_reference=start"]
    assert trainer_of("adpa", *live).needs.reference == "distributions"
    run = ["loss=adpa", "model=tiny", "loss.generations=g", "loss.advantages=a", "cache_reference_logprobs=true"]
    with pytest.raises(ValueError, match="whole distributions"):
        launch.settings_of(composed(*run, *live))
    with pytest.raises(ValueError, match="no reference model"):
        launch.settings_of(composed(*run))


@pytest.mark.parametrize(
    "override, message",
    [
        ("loss.kl_weight=0", "loss.objective=expected"),
        ("loss.target_temperature=0", "loss.target_temperature"),
        ("loss.kl_reference=student", "loss.kl_reference"),
        ("loss.rest_advantage=mean", "loss.rest_advantage"),
        ("loss.objective=linear", "loss.objective"),
    ],
)
def test_impossible_values_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        trainer_of("adpa", override)
