"""Relatives of on-policy distillation.

IW-OPD's weights: 1 + gamma at the first token, toward 1 as the disagreement before a token grows. G-OPD's reward: the
teacher's against a reference teacher's.
"""

import pytest
import torch

from tests.support.bigram import items_of, trainer_of
from trainers.opd import prefix_weights


def test_weights_fall_with_the_share_of_the_disagreement_that_lies_before():
    advantages = torch.tensor([[1.0, -2.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    wanted = [[1.5, 1.375, 1.125, 1.0], [1.5, 1.0, 1.0, 1.0], [1.5, 1.5, 1.5, 1.5]]
    torch.testing.assert_close(prefix_weights(advantages, 0.5), torch.tensor(wanted))


def test_without_amplification_it_is_opd_and_with_it_the_notes_are_weighted():
    plain, none, half = (
        trainer_of("opd"),
        trainer_of("iw-opd", "loss.amplification=0"),
        trainer_of("iw-opd", "loss.amplification=0.5"),
    )
    items = [item._replace(notes=None, label=None) for item in items_of(plain, "opd")]
    with torch.no_grad():  # as in a rollout
        noted = [[torch.from_numpy(i.notes) for i in trainer.noted(items)] for trainer in (plain, none, half)]
    for one, two, weighted in zip(*noted, strict=True):
        torch.testing.assert_close(one, two)
        advantages = one[:, 1]
        share = torch.cat([torch.zeros(1), advantages.abs().cumsum(0)[:-1]]) / advantages.abs().sum()
        torch.testing.assert_close(weighted[:, 1], (1.5 - 0.5 * share) * advantages)
        torch.testing.assert_close(weighted[:, 0], one[:, 0])


def test_the_reward_of_gopd_is_scaled_against_the_reference_teacher():
    one, two = trainer_of("gopd", "loss.reward_scale=1"), trainer_of("gopd", "loss.reward_scale=1.6")
    plain = trainer_of("opd")
    items = [item._replace(notes=None, label=None) for item in items_of(plain, "opd")]
    with torch.no_grad():  # as in a rollout
        noted = [[torch.from_numpy(i.notes) for i in trainer.noted(items)] for trainer in (plain, one, two)]
    teacher, reference = (two.frozen_models[name].table.detach() for name in ("teacher", "reference_teacher"))
    for item, opd, same, scaled in zip(items, *noted, strict=True):
        torch.testing.assert_close(opd, same)
        ids = item.sequences[0].ids
        places = [t for t, on in enumerate(item.sequences[0].response) if on]
        theirs = [(teacher[ids[t - 1]].log_softmax(-1) - reference[ids[t - 1]].log_softmax(-1))[ids[t]] for t in places]
        wanted = opd[:, 1].double() + 0.6 * torch.stack(theirs)
        torch.testing.assert_close(scaled[:, 1].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.discount=0.9"], "loss.discount"),
        (["loss.alignment=bytes"], "loss.alignment"),
        (["loss.amplification=-1"], "loss.amplification"),
    ],
)
def test_what_iw_opd_does_not_define_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        trainer_of("iw-opd", *overrides)
