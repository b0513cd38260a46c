"""Several cached teachers as one: exact where their entries are whole, and nothing made up where they are not."""

import numpy as np
import pytest
import torch

from dataloader import TopK
from functional import token_logps
from teacher.entries import Factors, event_kl, hybrid_distance, sorted_distance, topk_kl, topk_logps
from teacher.mixture import ABSENT, mixed, summed, within
from teacher.quantities import Entry
from tests.support.bigram import examples, trainer_of
from trainers.batches import Item
from trainers.dckd import factors_of

V, L = 9, 5


def dense(seed: int) -> torch.Tensor:
    return torch.randn(L, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5


def entry(logits: torch.Tensor, k: int) -> Entry:
    ids, logps, tail = topk_logps(logits, k)
    return Entry(ids.numpy(), logps.float().numpy(), tail.float().numpy())


def as_dense(found: Entry) -> np.ndarray:
    """Spread entries over the vocabulary; every id at most once a token."""
    table = np.full((len(found.ids), V), ABSENT)
    for row, ids, values in zip(table, found.ids, found.values, strict=True):
        for i, value in zip(ids, values, strict=True):
            if value > ABSENT:
                assert row[i] == ABSENT
                row[i] = value
    return table


WEIGHTS = [0.5, 0.2, 0.3]
TEACHERS = [dense(seed) for seed in (1, 2, 3)]
LOGPS = torch.stack([logits.log_softmax(-1) for logits in TEACHERS])
SHARES = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
TRUTH = {
    "probabilities": (SHARES * LOGPS.exp()).sum(0).log(),
    "log_probabilities": (SHARES * LOGPS).sum(0).log_softmax(-1),
}


@pytest.mark.parametrize("kind", TRUTH)
def test_with_whole_vocabularies_a_mixture_is_the_dense_one(kind):
    found = mixed([entry(logits, V) for logits in TEACHERS], WEIGHTS, kind)
    np.testing.assert_allclose(as_dense(found), TRUTH[kind].numpy(), atol=2e-6)  # float32 log-probabilities
    student = dense(7).requires_grad_()
    kl = topk_kl(student, torch.from_numpy(found.ids), torch.from_numpy(found.values))
    exact = (TRUTH[kind].exp() * (TRUTH[kind] - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl, exact, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (kl, exact)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_what_a_teachers_top_k_lacks_stays_in_its_tail():
    k = 3
    parts = [entry(logits, k) for logits in TEACHERS]
    found = as_dense(mixed(parts, WEIGHTS, "probabilities"))
    for t in range(L):
        for v in range(V):
            holders = [(w, p[t, v]) for w, p, e in zip(WEIGHTS, LOGPS.exp(), parts, strict=True) if v in e.ids[t]]
            known = sum(w * float(p) for w, p in holders)
            assert np.exp(found[t, v]) == pytest.approx(known, abs=1e-6)
            assert np.exp(found[t, v]) <= float(TRUTH["probabilities"].exp()[t, v]) + 1e-6
    tails = sum(w * e.tail for w, e in zip(WEIGHTS, parts, strict=True))
    np.testing.assert_allclose(1 - np.exp(found).sum(-1), tails, atol=1e-6)


def test_log_probabilities_are_mixed_over_the_ids_of_all_and_one_event_for_the_rest():
    parts = [entry(logits, 6) for logits in TEACHERS]
    found = as_dense(mixed(parts, WEIGHTS, "log_probabilities"))
    for t in range(L):
        common = [v for v in range(V) if all(v in e.ids[t] for e in parts)]
        powers = np.array([sum(w * float(p[t, v]) for w, p in zip(WEIGHTS, LOGPS, strict=True)) for v in common])
        rests = [1 - float(p[t, common].exp().sum()) for p in LOGPS]
        rest = np.prod([r**w for r, w in zip(rests, WEIGHTS, strict=True)])
        total = np.exp(powers).sum() + rest
        np.testing.assert_allclose(found[t, common], powers - np.log(total), atol=2e-5)
        assert np.isneginf(np.delete(found[t], common)).all()


@pytest.mark.parametrize("kind", TRUTH)
def test_teachers_without_a_common_id_and_teachers_that_agree(kind):
    one, other = (Entry(np.array([[i]]), np.array([[-0.1]], np.float32), np.array([0.1])) for i in (3, 4))
    apart = mixed([one, other], [0.5, 0.5], kind)
    mass = np.exp(apart.values).sum()
    assert mass == pytest.approx(np.exp(-0.1) if kind == "probabilities" else 0.0, abs=1e-6)
    assert apart.tail[0] == pytest.approx(1 - mass, abs=1e-6)
    same = mixed([one, one], [0.3, 0.7], kind)
    assert same.ids[same.values > ABSENT].tolist() == [3]
    np.testing.assert_allclose(same.values[same.values > ABSENT], [-0.1], atol=1e-6)


# ---- ids beyond the student's vocabulary


def test_ids_beyond_a_vocabulary_go_to_the_tail_and_are_never_looked_up():
    whole = entry(dense(1), V)
    cut = within(whole, 6)
    assert cut.ids.max() < 6 and within(whole, V) is whole
    kept = whole.ids < 6
    np.testing.assert_allclose(cut.tail, np.where(kept, 0, np.exp(whole.values)).sum(-1), atol=1e-6)
    student = dense(7)[:, :6].clone().requires_grad_()
    kl = topk_kl(student, torch.from_numpy(cut.ids), torch.from_numpy(cut.values), "truncate")
    teacher = dense(1).log_softmax(-1)[:, :6]
    torch.testing.assert_close(kl, (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1), atol=1e-6, rtol=1e-6)
    bucket = topk_kl(
        student, torch.from_numpy(cut.ids), torch.from_numpy(cut.values)
    )  # all the student's mass is below
    assert torch.autograd.grad(bucket.sum(), student)[0].isfinite().all()


def test_an_advantage_beyond_a_vocabulary_adds_nothing():
    whole = entry(dense(1), V)
    advantages = whole._replace(values=whole.values + 1, teacher_logps=whole.values)
    cut = within(advantages, 6)
    assert (cut.values[advantages.ids >= 6] == 0).all() and (cut.ids[advantages.ids >= 6] == 0).all()
    assert np.isneginf(cut.teacher_logps[advantages.ids >= 6]).all()


# ---- the losses on such entries


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_absent_entries_are_as_if_they_were_not_there(tail):
    ids, logps, _ = topk_logps(dense(1), 4)
    padded_ids = torch.cat([torch.zeros(L, 1, dtype=torch.int64), ids, torch.full((L, 1), V - 1)], dim=1)
    absent = torch.full((L, 1), ABSENT, dtype=torch.float64)
    student, other = dense(7).requires_grad_(), dense(7).requires_grad_()
    plain = topk_kl(student, ids, logps, tail, chunk=2)
    padded = topk_kl(other, padded_ids, torch.cat([absent, logps, absent], dim=1), tail, chunk=2)
    torch.testing.assert_close(padded, plain)
    gradients = torch.autograd.grad(plain.sum(), student)[0], torch.autograd.grad(padded.sum(), other)[0]
    torch.testing.assert_close(*gradients)
    empty = topk_kl(other, padded_ids[:, :3], torch.full((L, 3), ABSENT, dtype=torch.float64), tail)
    assert (empty == 0).all() and (torch.autograd.grad(empty.sum(), other)[0] == 0).all()


def test_the_divergence_of_an_event_and_its_slope():
    own = torch.tensor([-0.3, -2.0, -7.0], dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([-1.0, -0.5, -7.0], dtype=torch.float64)
    s, t = own.exp(), teacher.exp()
    exact = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    torch.testing.assert_close(event_kl(own, teacher), exact)
    assert torch.autograd.gradcheck(lambda x: event_kl(x, teacher), (own,))


def test_the_distance_of_sorted_probabilities_and_what_a_cut_teacher_bounds():
    student, teacher = dense(7).requires_grad_(), dense(1).log_softmax(-1)
    p, q = (x.sort(-1, descending=True).values for x in (student.softmax(-1), teacher.exp()))
    whole = sorted_distance(student, teacher, chunk=2)
    torch.testing.assert_close(whole, (p - q).abs().sum(-1))
    for k in (1, 4, 8):
        assert (sorted_distance(student, teacher.topk(k).values) <= whole + 1e-12).all()
    wide = torch.nn.functional.pad(p, (0, 4))  # a teacher with more words than the student
    more = torch.randn(L, V + 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).log_softmax(-1)
    exact = (wide - more.exp().sort(-1, descending=True).values).abs().sum(-1)
    torch.testing.assert_close(sorted_distance(student, more), exact)
    assert torch.autograd.gradcheck(lambda x: sorted_distance(x, teacher.topk(4).values), (student,))
    assert (sorted_distance(student, torch.full((L, 3), ABSENT, dtype=torch.float64)) == 0).all()


# ---- live teachers


@pytest.mark.parametrize("mixture", ["probabilities", "log_probabilities"])
def test_on_policy_distillation_is_rewarded_by_the_mixture_of_its_teachers(mixture: str) -> None:
    trainer = trainer_of("opd", "loss.teacher={x:a,y:b}", "loss.teacher_weights={x:3,y:1}", f"loss.mixture={mixture}")
    assert f"the mixture of {mixture} (0.75 x, 0.25 y)" in trainer.objective()
    items = [Item((e.chosen,)) for e in examples()]
    tables = [trainer.frozen_models[name].table.log_softmax(-1) for name in ("teacher_x", "teacher_y")]
    if mixture == "probabilities":
        mean = (0.75 * tables[0].exp() + 0.25 * tables[1].exp()).log()
    else:
        mean = (0.75 * tables[0] + 0.25 * tables[1]).log_softmax(-1)
    own = trainer.policy.table.log_softmax(-1)
    with torch.no_grad():  # as rollouts ask
        noted = trainer.noted(items)
    for item in noted:
        ids, mask = item.sequences[0]
        steps = [(ids[t - 1], ids[t]) for t in range(1, len(ids)) if mask[t]]
        wanted = [float(mean[step] - own[step]) for step in steps]  # with discount 0 a token's own reward
        assert item.notes[:, 1] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.teacher=a", "loss.teacher_weights=[1]"], "mixes several teachers"),
        (["loss.teacher=[a,b]", "loss.teacher_weights=[1]"], "one weight a teacher of loss.teacher: 0, 1"),
        (["loss.teacher=[a,b]", "loss.teacher_weights=[1,0]"], "must be numbers above 0"),
        (["loss.teacher=[]"], "must be a model folder, a list or a mapping"),
        (["loss.teacher=[a,b]", "loss.mixture=mean"], "loss.mixture"),
        (["loss.teacher=[a,b]", "loss.alignment=bytes"], "asks one teacher"),
    ],
)
def test_live_teachers_that_contradict_each_other_are_refused(overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of("opd", *overrides)


# ---- several caches of advantages


def test_advantages_of_several_caches_are_summed_at_the_ids_of_any():
    rng = np.random.default_rng(0)
    parts = []
    for logits, k in zip(TEACHERS, (4, 3, 6), strict=True):
        known = entry(logits, k)
        advantages = rng.normal(size=known.ids.shape).astype(np.float32)
        parts.append(Entry(known.ids, advantages, known.tail, known.values))
    parts[0].teacher_logps[:, -1], parts[0].values[:, -1] = ABSENT, 7.0  # padding counts nowhere, whatever it says
    found = summed(parts, WEIGHTS)
    for t in range(L):
        there = found.teacher_logps[t] > ABSENT
        held = dict(zip(found.ids[t][there].tolist(), found.values[t][there].tolist(), strict=True))
        wanted: dict[int, float] = {}
        for weight, part in zip(WEIGHTS, parts, strict=True):
            for i, value, logp in zip(part.ids[t], part.values[t], part.teacher_logps[t], strict=True):
                if logp > ABSENT:
                    wanted[int(i)] = wanted.get(int(i), 0.0) + weight * float(value)
        assert held == pytest.approx(wanted, abs=1e-6)
        assert (found.values[t][~there] == 0).all()
        assert found.tail[t] == pytest.approx(1 - np.exp(found.teacher_logps[t]).sum(), abs=1e-6)
    assert summed(parts[:1], [1.0]) is parts[0]


# ---- spans that are merged into one distribution


@pytest.mark.parametrize(("merge", "wanted"), [("observed", [0.3, 0.15, 0.05]), ("bayesian", [0.12, 0.3, 0.18])])
def test_two_tokens_are_merged_as_in_trls_own_example(merge, wanted):
    """Of TRL's tests of GOLD: P(y) = [.6, .3, .1] then [.2, .5, .3], the tokens 0 and 1, is P_0(y) P_1(1) = .5 P_0(y)
    where the first distribution is kept, and P_0(0) P_1(y) where the last one is."""
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    logits, targets = probs.log().requires_grad_(), torch.tensor([0, 1])
    teacher = TopK(torch.zeros(2, 3), torch.zeros(2, 3), None, torch.tensor([0, 0]), torch.tensor([-0.4]))
    factors = factors_of(token_logps(logits, targets), teacher, merge)
    base = 0 if merge == "observed" else 1
    torch.testing.assert_close(
        probs[base] * factors.own[base].exp(), torch.tensor(wanted, dtype=torch.float64), check_dtype=False
    )
    assert float(factors.own[1 - base]) == float(factors.theirs[1 - base]) == 0.0
    assert float(factors.theirs[base]) == pytest.approx(-0.4)


@pytest.mark.parametrize("kind", ["uld", "gold"])
def test_the_distance_of_merged_distributions_is_that_of_the_products(kind):
    """With the teacher's whole vocabulary: L1 of both products, sorted, and the divergence of matching ids."""
    student, teacher = dense(7), dense(8).log_softmax(-1)
    own = torch.linspace(-2, 0, L, dtype=torch.float64).requires_grad_()
    theirs = torch.linspace(0, -1, L, dtype=torch.float64)
    scaled = teacher + theirs[:, None]
    factors = Factors(own, theirs)
    ids = torch.arange(V).expand(L, V)
    ids = ids.masked_fill(ids >= 4, -1)

    def direct(logits: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        p, q = (logits.log_softmax(-1) + factor[:, None]).exp(), scaled.exp()
        if kind == "uld":
            return (p.sort(-1).values - q.sort(-1).values).abs().sum(-1)
        mean = 0.5 * (p + q)
        parts = 0.5 * (q * (q / mean).log() + p * (p / mean).log())
        return 0.3 * parts[:, :4].sum(-1) + 0.7 * (p[:, 4:].sort(-1).values - q[:, 4:].sort(-1).values).abs().sum(-1)

    def found(logits: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        with_factor = factors._replace(own=factor)
        if kind == "uld":
            return sorted_distance(logits, scaled, chunk=2, factors=with_factor)
        return hybrid_distance(logits, ids, scaled, None, 0.5, (0.3, 0.7), chunk=2, factors=with_factor)

    logits = student.requires_grad_()
    torch.testing.assert_close(found(logits, own), direct(logits, own))
    for one, other in zip(
        torch.autograd.grad(found(logits, own).sum(), (logits, own)),
        torch.autograd.grad(direct(logits, own).sum(), (logits, own)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
