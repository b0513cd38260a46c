"""Reward-weighted distillation: learn a teacher's rollouts, each with a weight that grows with its reward.

L = mean_i w_i (nll_weight NLL_i + kl_weight D_i), w_i = exp(r_i / tau) / mean_j exp(r_j / tau) over the global batch;
NLL_i and D_i are means over the tokens of response i (the softmax weights of reward-weighted regression, Peters and
Schaal 2007). D is a divergence from one or several live teachers, averaged in probability. Letters: B responses, N
tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloader import Example
from engine.metrics import Mean
from forward.chunks import Logits
from functional import generalized_jsd, mixed_logps, row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from settings.typed import Place
from teacher.precision import teacher_logits
from tokens.columns import labeled, numbers_of, side_numbers, sides_of, taken
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, Items, checked, supervised_sequence
from trainers.rollouts import reward_of

BETAS = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # of the generalized JSD


@dataclass(frozen=True)
class RewardWeightedConfig:
    """Values of config/loss/reward-weighted-distill.yaml."""

    reward_temperature: float
    nll_weight: float
    kl_weight: float
    teachers: list[Place]
    divergence: str

    def __post_init__(self) -> None:
        one_of("loss.divergence", self.divergence, tuple(BETAS))
        require(self.reward_temperature > 0, f"loss.reward_temperature={self.reward_temperature} must be above 0")
        for key in ("nll_weight", "kl_weight"):
            require(getattr(self, key) >= 0, f"loss.{key}={getattr(self, key)} must not be negative")
        require(
            self.nll_weight + self.kl_weight > 0,
            "loss.nll_weight and loss.kl_weight are both 0: nothing would be learned",
        )
        require(
            (self.kl_weight > 0) == bool(self.teachers),
            f"loss.kl_weight={self.kl_weight} and loss.teachers={self.teachers}: a divergence needs both, without one "
            "leave both out",
        )


class RewardWeighted(BasicTrainer):
    """Unit: responses. Slot: the teacher's response; label: its reward; shared: its weight."""

    config: RewardWeightedConfig
    Config = RewardWeightedConfig
    needs = Needs("rewards", teacher="live")
    formula = (
        "mean over responses of w(y)·({nll_weight}·NLL(y) + {kl_weight}·D(y)), both means over tokens, w ∝ "
        "exp(reward/{reward_temperature}) with "
        "mean 1 over the global batch, D: {divergence} divergence from the teachers"
    )
    source = "Peters and Schaal 2007"

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the teachers."""
        return {f"teacher_{i}": (folder, "lm") for i, folder in enumerate(self.config.teachers)}

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take each response with its reward."""
        name = "reward-weighted-distill"

        def item(number: int) -> Item:
            example = examples[number]
            tokens = supervised_sequence(example.response, "teacher_response", name, example)
            return Item((tokens,), label=reward_of(example), source=number)

        sides = sides_of(examples)
        columns = taken(sides, side_numbers(len(examples), "response"))
        items = checked(len(examples), item, columns)
        rewards = numbers_of(examples, "reward", np.arange(len(examples)), reward_of)
        return Items(len(items), item, labeled(columns, rewards))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count responses."""
        number = batch.num_supervised(0)
        return {"nll": number, "divergence": number}

    def prepared(self, batches: list[Batch], training: bool) -> list[Batch]:
        """Weigh every response of the global batch: exp(reward / temperature), divided by the mean."""
        scaled = [self._scaled(batch) for batch in batches]
        # all ranks subtract the same maximum: no weight overflows
        top = max(self.gathered([max((float(x.max()) for x in scaled), default=-math.inf)]))
        weights = [(x - top).exp() for x in scaled]
        total, number = self.global_sum(
            torch.stack([w.sum() for w in weights]).sum(),
            torch.tensor(float(sum(self.counts(batch)["nll"] for batch in batches))),
        )
        return [
            batch._replace(shared=(w * (number / total)).to(batch.sequences.ids.device))
            for batch, w in zip(batches, weights, strict=True)
        ]

    def _scaled(self, batch: Batch) -> Tensor:
        """Return reward / temperature of each response [B] in float64; -inf for a filler."""
        assert batch.labels is not None
        scaled = batch.labels.double() / self.config.reward_temperature
        return scaled.masked_fill(~batch.supervised(0), -math.inf).cpu()

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the weighted sums, and what tells how uneven the weights are."""
        assert batch.shared is not None and batch.labels is not None
        config, size = self.config, batch.num_items
        nll = -token_logps(out.logits, out.targets)
        weights, lengths = batch.shared.to(nll), row_sums(torch.ones_like(nll), out.rows, size).clamp_min(1)
        of_response = lambda values: weights * row_sums(values, out.rows, size) / lengths  # noqa: E731
        sums = {"nll": config.nll_weight * of_response(nll).sum(), "divergence": nll.sum() * 0}
        if config.kl_weight:
            divergence = generalized_jsd(out.logits, self._teacher_logits(batch), BETAS[config.divergence])
            sums["divergence"] = config.kl_weight * of_response(divergence).sum()
        real = batch.supervised(0)  # a filler weighs 0
        return sums, {
            "reward": Mean(torch.where(real, batch.labels, 0.0).sum(), real.sum()),
            "weighted_reward": Mean((weights * batch.labels.to(weights)).sum(), real.sum()),
            "nll": Mean(nll.detach().sum(), len(nll)),
            "squared_weight": Mean((weights**2).sum(), real.sum()),  # 1: all alike; n: one response has it all
        }

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Logits:
        """Return the log of the teachers' average probabilities [N, V], up to a constant a row."""
        teachers = self.frozen_models.values()
        return mixed_logps([teacher_logits(model, batch.sequences, self.vocab_size).logits for model in teachers])
