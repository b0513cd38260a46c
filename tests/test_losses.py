"""Every loss of config/loss: equal to its slow twin, its gradient checked, and the same whatever the layout."""

import numpy as np
import pytest
import torch

from conversations import Conversation
from dataloader import Example
from tests.support.bigram import gradient_of, items_of, loss_of, tokens, trainer_of
from tests.support.helpers import ROOT
from tests.support.ranks import Ranks
from tests.support.twins import TWINS, World
from trainers.kto import mismatched, partners

LOSSES = sorted(path.stem for path in (ROOT / "config" / "loss").glob("*.yaml"))
# Options that change the numbers, each against the same twin.
BYTES = "loss.alignment=bytes loss.teacher_tokenizer=none"
REGULARIZED = "loss.objective=regularized"
OPTIONS = {
    "adpa": [
        REGULARIZED,
        f"{REGULARIZED} loss.rest_advantage=zero loss.advantage_floor=0.3 loss.kl_weight=0.7",
        f"{REGULARIZED} loss.kl_reference=teacher loss.sft_weight=0 loss.kl_weight=2.0",
        f"{REGULARIZED} loss.kl_reference=start loss.kl_weight=2.0 loss.target_temperature=0.3",
    ],
    "dckd": [
        BYTES,
        f"{BYTES} loss.span_loss=uld",
        f"{BYTES} loss.span_loss=gold loss.hybrid_weights=[1.0,0.5]",
        f"{BYTES} loss.span_loss=uld loss.span_merge=observed",
        f"{BYTES} loss.span_loss=gold loss.hybrid_weights=[1.0,0.5] loss.span_merge=bayesian",
        f"{BYTES} loss.span_loss=gold loss.hybrid_weights=[0.3,0.7] loss.span_merge=observed loss.hybrid_beta=0.2",
        "loss.teacher_temperature=0.3 loss.sft_weight=0",
        "loss.tail=renormalize loss.teacher_temperature=2.0",
    ],
    "dpo": [
        "loss.divergence=js",
        "loss.divergence=forward_kl",
        "loss.divergence=alpha loss.alpha=0.3",
        "loss.margin=0.4 loss.nll_weight=0.2",
        "loss.humanline=true loss.log_epsilon_P=-0.3 loss.log_epsilon_R=0.4",
        "loss.ld_alpha=0.4",
    ],
    "tvkd": [
        "loss.value=lse loss.shaping_weight=0.7 loss.value_temperature=2.0 loss.discount=0.9 loss.nll_weight=0.2",
        "loss.value=max loss.humanline=true loss.log_epsilon_P=-0.3 loss.log_epsilon_R=0.4",
        "loss.form=released loss.value=lse loss.student_weight=1.0 loss.discount=0.9",
        *(f"loss.form=released loss.value={kind}" for kind in ("logits", "margin", "student_entropy")),
        "loss.form=released loss.value=student_expectation",
    ],
    "dadpo": [
        "loss.teacher_weight=0.4 loss.nll_weight=0.2 loss.humanline=true loss.log_epsilon_P=-0.3",
        "loss.teacher_weight=0",
    ],
    "ctpd": [
        "loss.weight_exponent=0.7 loss.weight_scale=1.3 loss.clamp_low=-0.2 loss.clamp_high=0.6 loss.nll_weight=0.2"
    ],
    "pad": ["loss.n=3 loss.generations=none loss.beta=2.0"],
    "aligndistil": ["loss.adaptive=false loss.extrapolation=0.5", "loss.extrapolation=0.3 loss.target_temperature=0.5"],
    "online-adpa": [
        "loss.kl_reference=start loss.kl_weight=2.0 loss.target_temperature=0.3 loss.advantage_floor=0.1",
        "loss.kl_reference=teacher loss.kl_weight=0.7 loss.advantage_floor=0",
    ],
    "opsd": ["loss.beta=0 loss.temperature=1.3", "loss.beta=1", "loss.clip=0.03", "loss.beta=0 loss.clip=0.05"],
    "aot": ["loss.variant=unpaired", "loss.label_smoothing=0.2"],
    "tdpo": ["loss.variant=1"],
    "ra-dpo": ["loss.variant=1", "loss.confidence_level=0.3", "loss.confidence_level=1.0", "loss.risk=reference"],
    "kto": [
        "loss.desirable_weight=1.3 loss.undesirable_weight=0.7",
        "loss.frac_unique_desirable=0.5 loss.frac_unique_undesirable=0.5",
    ],
    "bradley-terry": ["loss.margin=0.5 loss.center_weight=0.1"],
    "simpo": ["loss.label_smoothing=0.1"],
    "ppo": [
        "loss.value_clip=null loss.drift_weight=0.3",
        "loss.humanline=true loss.log_epsilon_P=-0.3 loss.log_epsilon_R=0.4",
    ],
    "grpo": [
        "loss.reduction=token_mean loss.clip=0.5",
        "loss.humanline=true loss.log_epsilon_P=-0.3 loss.log_epsilon_R=0.4",
    ],
    "gkd": [
        "loss.teacher=[a,b] loss.teacher_weights=[3,1]",
        "loss.teacher={x:a,y:b} loss.mixture=log_probabilities loss.temperature=2.0",
        "loss.beta=0",
        "loss.beta=1",
        "loss.beta=0",
        "loss.beta=1",
        "loss.beta=0.3 loss.temperature=2.0",
        "loss.beta=0.4 loss.teacher_temperature=0.3",
    ],
    "distillm2": ["loss.alpha=0", "loss.alpha=0.6 loss.teacher_weight=0.2"],
    "reward-weighted-distill": [
        f"loss.teachers=[a,b] loss.kl_weight=0.7 loss.divergence={name}" for name in ("forward", "reverse", "jsd")
    ],
}
PLAIN = {"sppo-hard": "loss.beta=0.1"}  # its default asks for log-ratios of 500, where differences drown
CASES = [(name, PLAIN.get(name, "")) for name in LOSSES] + [
    (name, option) for name, options in OPTIONS.items() for option in options
]
LAID_OUT = (
    "adpa",
    "dpo",
    "tvkd",
    "dckd",
    "gkd",
    "ctpd",
    "pad",
    "opsd",
)  # whose options are held against other layouts, too
# Where a gradient is stopped, the slope of the value is not the gradient: tests of their own hold these.
STOPPED = [
    (n, o) for n, o in CASES if (n in ("tdpo", "ra-dpo") and "variant=1" not in o) or (n == "aot" and "unpaired" in o)
]


@pytest.mark.parametrize("name, options", CASES)
def test_a_loss_equals_its_twin(name, options):
    trainer = trainer_of(name, *options.split())
    items = items_of(trainer, name)
    teachers = [model.table.tolist() for model in trainer.frozen_models.values()]
    world = World(trainer.config, items, trainer.policy.table.tolist(), trainer.reference.table.tolist(), teachers)
    assert float(loss_of(trainer, items)) == pytest.approx(TWINS[name](world), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name, options", [case for case in CASES if case not in STOPPED])
def test_the_gradient_is_the_slope(name, options):
    """Central differences at every entry of the table; AOT and BCO look at the batch without gradient, so do these."""
    trainer = trainer_of(name, *options.split())
    items = items_of(trainer, name)
    _, gradient = gradient_of(trainer, items)
    assert gradient.abs().max() > 1e-4
    table, step = trainer.policy.table, 1e-6
    generator = torch.Generator().manual_seed(0)
    frozen = trainer.prepared([trainer.batch_of(items)], True)

    def loss() -> float:
        counts = trainer.global_counts(frozen)
        return float(sum(trainer.terms(batch, counts)[0] for batch in frozen))

    with torch.no_grad():
        for index in torch.randperm(table.numel(), generator=generator)[:25].tolist():
            entry = table.view(-1)[index]
            kept = float(entry)
            ends = []
            for sign in (1, -1):
                table.view(-1)[index] = kept + sign * step
                ends.append(loss())
            table.view(-1)[index] = kept
            assert float(gradient.view(-1)[index]) == pytest.approx(
                (ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-7
            )


@pytest.mark.parametrize("name", ["tdpo", "ra-dpo"])
def test_variant_2_stops_the_gradient_of_the_chosen_divergence(name):
    """With alpha = 1 the values of both variants agree, the gradients do not; with alpha = 0 it is plain DPO."""
    one, two = trainer_of(name, "loss.variant=1"), trainer_of(name, "loss.variant=2", "loss.alpha=1.0")
    items = items_of(one, name)
    (loss_1, gradient_1), (loss_2, gradient_2) = gradient_of(one, items), gradient_of(two, items)
    assert float(loss_1) == pytest.approx(float(loss_2), rel=1e-12)
    assert (gradient_1 - gradient_2).abs().max() > 1e-5
    plain, none = trainer_of("dpo"), trainer_of(name, "loss.variant=2", "loss.alpha=0.0")
    torch.testing.assert_close(gradient_of(none, items)[1], gradient_of(plain, items)[1])


def test_unpaired_aot_has_the_gradient_of_the_sorted_loss():
    trainer = trainer_of("aot", "loss.variant=unpaired")
    items = items_of(trainer, "aot")
    loss, gradient = gradient_of(trainer, items)
    batch = trainer.batch_of(items)
    out = trainer.forward(trainer.policy, batch.sequences)
    pairs = trainer.pairs(out.logits.log_softmax(-1).gather(1, out.targets[:, None])[:, 0], out.rows, batch)
    delta = trainer.config.beta * (pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values)
    plain = -torch.nn.functional.logsigmoid(delta).mean()
    assert float(plain) == pytest.approx(float(loss), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(plain, trainer.policy.table)[0], gradient)


def test_ra_dpo_at_level_1_is_tdpo():
    risk, mean = trainer_of("ra-dpo", "loss.confidence_level=1.0"), trainer_of("tdpo")
    items = items_of(risk, "ra-dpo")
    torch.testing.assert_close(gradient_of(risk, items)[1], gradient_of(mean, items)[1])


@pytest.mark.parametrize("name, options", [*((name, "") for name in LOSSES), *(c for c in CASES if c[0] in LAID_OUT)])
def test_accumulation_order_and_fillers_change_nothing(name, options):
    trainer = trainer_of(name, *options.split())
    items = items_of(trainer, name)
    loss, gradient = gradient_of(trainer, items)
    for other, parts in ((items, len(items)), (items[::-1], 2), ([*items, items[0].filler(), items[1].filler()], 1)):
        other_loss, other_gradient = gradient_of(trainer, other, parts)
        assert float(other_loss) == pytest.approx(float(loss), rel=1e-6)  # log-ratios of a teacher are float32
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["dpo", "cdpo"])
def test_dpo_starts_at_ln_2(name):
    trainer = trainer_of(name, "loss.label_smoothing=0.2")
    trainer.reference = trainer.policy
    assert float(loss_of(trainer, items_of(trainer, name))) == pytest.approx(0.6931471805599453, abs=1e-12)


def test_kto_keeps_shares_from_opposite_ends():
    trainer = trainer_of("kto", "loss.frac_unique_desirable=0.5", "loss.frac_unique_undesirable=0.5")
    items = items_of(trainer, "kto")
    assert sorted(item.label for item in items) == [0, 0, 0, 1, 1, 1]
    assert len({tuple(item.sequences[0].ids[:2]) for item in items}) == 6  # no prompt with both of its responses
    for item in items:
        response = item.scored[0].ids[2:]
        assert item.scored[0].ids[:2] == item.sequences[0].ids[:2] and response != item.sequences[0].ids[2:]


def many_pairs(count: int) -> list[Example]:
    """Pairs with prompts of their own; chosen responses are fives, rejected ones sevens."""
    nothing = Conversation([], None, None, None, {})
    prompts = [[1 + i // 10, 1 + i % 10] for i in range(count)]
    return [Example(p, tokens(p, [5] * 3), tokens(p, [7] * 3), None, nothing) for p in prompts]


def test_z_0_of_kto_is_that_of_a_mix_of_chosen_and_rejected():
    """A policy that raised chosen responses by as much as it lowered rejected ones is as far from the start as before.

    With the response of the next row with another prompt, always a chosen one, z_0 would be 3 times what it learned.
    """
    trainer = trainer_of("kto")
    items = trainer.items(many_pairs(40), "train")
    used = [item.scored[0].ids[-1] for item in items]
    assert abs(used.count(7) - 40) <= 2  # each response once, but where a prompt's two follow each other
    assert all(item.scored[0].ids[:2] == item.sequences[0].ids[:2] for item in items)
    row = torch.zeros(11, dtype=torch.float64)
    row[5], row[7] = 0.1, -0.1
    with torch.no_grad():
        trainer.policy.table.copy_(row.expand(11, 11))
        trainer.reference.table.zero_()
    shift = float(row.logsumexp(0) - torch.zeros(11).logsumexp(0))  # of the normalizer, on every token
    gains = [3 * (0.1 - shift), 3 * (-0.1 - shift)]
    batch = trainer.prepared([trainer.batch_of(items)], True)[0]
    assert float(batch.shared) == pytest.approx(
        max(0.0, (used.count(5) * gains[0] + used.count(7) * gains[1]) / 80), abs=1e-9
    )
    assert float(batch.shared) < 0.02 and gains[0] > 0.29
    # Also a batch of ten pairs, as they come in the data, sees both kinds.
    kinds = [set(used[start : start + 20]) for start in range(0, 80, 20)]
    assert kinds == [{5, 7}] * 4


def test_kto_pairs_by_the_seed_alone():
    def others(*overrides: str) -> list[list[int]]:
        trainer = trainer_of("kto", *overrides)
        return [item.scored[0].ids for item in trainer.items(many_pairs(12), "train")]

    assert others("seed=1") == others("seed=1") != others("seed=2")


def test_kto_pairs_a_response_with_another_prompt_wherever_two_prompts_are():
    pairs = many_pairs(2)
    rows = [(pairs[0].prompt, pairs[0].chosen)] * 5 + [(pairs[1].prompt, pairs[1].rejected)]
    prompts = np.array([0] * 5 + [1])
    for seed in range(4):
        others = partners(prompts, seed)
        joined = [
            mismatched(np.array(prompt), rows[j][1].arrays(), 99) for (prompt, _), j in zip(rows, others, strict=True)
        ]
        assert [int(ids[-1]) for ids, _ in joined] == [7] * 5 + [5]
        assert [mask.tolist() for _, mask in joined] == [[False] * 2 + [True] * (len(ids) - 2) for ids, _ in joined]
    with pytest.raises(ValueError, match="two different prompts"):
        partners(prompts[:5], 0)


def test_the_running_mean_of_bco_goes_on_from_step_to_step():
    trainer = trainer_of("bco")
    items = items_of(trainer, "bco")
    first = trainer.prepared([trainer.batch_of(items[:3])], True)[0].shared
    second = trainer.prepared([trainer.batch_of(items[3:])], True)[0].shared
    trainer.state = {}
    both = trainer.prepared([trainer.batch_of(items)], True)[0].shared
    assert float(second) == pytest.approx(float(both), rel=1e-6) and abs(float(first) - float(both)) > 1e-4


@pytest.mark.distributed
def test_two_processes_give_the_loss_and_gradient_of_one(tmp_path):
    printed = Ranks(folder=tmp_path, program="tests/support/two_ranks.py").output()
    assert sorted(line.split()[1] for line in printed.splitlines() if line.startswith("equal")) == LOSSES
