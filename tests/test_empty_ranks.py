"""A rank without a row asks every model as often as the others: a sharded one gathers its weights from all of them."""

from collections import Counter

import pytest
import torch

from tests.support.bigram import Bigram, items_of, trainer_of
from tests.test_losses import CASES
from trainers.basic import BasicTrainer
from trainers.batches import Item


def asked(trainer: BasicTrainer, items: list[Item]) -> Counter[str]:
    """Return how often a micro-batch of a training step asks each model."""
    found: Counter[str] = Counter()
    models = {"policy": trainer.policy, "reference": trainer.reference, **trainer.frozen_models}
    for name, model in models.items():
        assert isinstance(model, Bigram)
        model.register_forward_pre_hook(lambda *_, name=name: found.update([name]))
    batches = trainer.prepared([trainer.batch_of(items)], True)
    found["gradients"] = sum(
        bool(trainer.terms(batch, trainer.global_counts(batches))[0].requires_grad) for batch in batches
    )
    return found


@pytest.mark.parametrize("name, options", CASES)
def test_a_filler_asks_the_same_models_and_has_a_graph(name, options):
    items = items_of(trainer_of(name, *options.split()), name)
    with torch.random.fork_rng():
        full = asked(trainer_of(name, *options.split()), items[:2])
        empty = asked(trainer_of(name, *options.split()), [items[0].filler()])
    assert full == empty and full["policy"] >= 1 and full["gradients"] == 1
