"""BCO, binary classifier optimization (2404.04656): rewards are compared with their running mean, not with each other.

MPO (2411.10442) adds it to DPO and to the chosen response's NLL: L = w_p L_DPO + w_q L_BCO + w_g NLL(y_w).
B pairs of a micro-batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from settings.schema import require
from trainers.batches import Batch
from trainers.paired import BetaConfig, Pairs, WholeBatchTrainer, logistic_loss


def bco_loss(u: Tensor, v: Tensor, beta: float, shift: Tensor | float) -> Tensor:
    """Return binary classifier optimization of a pair (2404.04656), rewards shifted by their running mean."""
    return -F.logsigmoid(beta * u - shift) - F.logsigmoid(-(beta * v - shift))


class BCO(WholeBatchTrainer):
    """Unit: pairs. The shift is the mean reward of all pairs seen so far, this global batch included."""

    config: BetaConfig
    Config: ClassVar[type] = BetaConfig
    formula = (
        "mean over pairs of −log σ({beta}u − δ) − log σ(δ − {beta}v), δ the running mean of the rewards "
        "{beta}u and {beta}v"
    )
    source = "2404.04656"

    def prepared(self, batches: list[Batch], training: bool) -> list[Batch]:
        """Update the running mean of rewards over the global batch (in training only) and hand it to every part."""
        total, count, scored = torch.zeros(()), torch.zeros(()), []
        for batch in batches:
            batch, pairs, real = self.ratios(batch)
            scored.append(batch)
            rewards = self.config.beta * 0.5 * (pairs.chosen_ratio + pairs.rejected_ratio)
            total, count = total + torch.where(real, rewards, 0.0).sum().double().cpu(), count + real.sum().cpu()
        batch_total, batch_count = self.global_sum(total, count)
        total_so_far = self.state.get("bco_total", 0.0) + batch_total * training
        count_so_far = self.state.get("bco_count", 0.0) + batch_count * training
        if training:
            self.state = {"bco_total": total_so_far, "bco_count": count_so_far}
        if not count_so_far:  # an evaluation before the first step
            total_so_far, count_so_far = batch_total, max(batch_count, 1.0)
        shift = torch.tensor(total_so_far / count_so_far)
        return [batch._replace(shared=shift.to(batch.sequences.ids.device)) for batch in scored]

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return bco_loss with the shared shift."""
        assert batch.shared is not None, "prepared() comes first"
        return bco_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta, batch.shared.to(pairs.chosen_ratio))


@dataclass(frozen=True)
class MPOConfig(BetaConfig):
    """Values of config/loss/mpo.yaml; nll_weight is w_g."""

    preference_weight: float
    quality_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("preference_weight", "quality_weight"):
            require(getattr(self, key) >= 0, f"loss.{key}={getattr(self, key)} must not be negative")
        require(
            self.preference_weight + self.quality_weight > 0,
            "loss.preference_weight and loss.quality_weight are both 0: loss=sft is what is left",
        )


def mpo_loss(
    u: Tensor, v: Tensor, beta: float, shift: Tensor | float, preference_weight: float, quality_weight: float
) -> Tensor:
    """Return w_p DPO + w_q BCO of each pair [B] (MPO, 2411.10442), from the log-ratios [B] of chosen and rejected."""
    return preference_weight * logistic_loss(beta * (u - v)) + quality_weight * bco_loss(u, v, beta, shift)


class MPO(BCO):
    """Mixed preference optimization: a preference, a quality and, by nll_weight, a generation term together.

    Unit: pairs (the NLL term: chosen tokens). Slots: chosen, rejected.
    """

    config: MPOConfig
    Config = MPOConfig
    formula = (
        "mean over pairs of {preference_weight}·(−log σ({beta}(u − v))) + {quality_weight}·(−log σ({beta}u − δ) − "
        "log σ(δ − {beta}v)), δ the running mean of the rewards {beta}u and {beta}v"
    )
    source = "2411.10442"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return mpo_loss with the shared shift."""
        assert batch.shared is not None, "prepared() comes first"
        config, shift = self.config, batch.shared.to(pairs.chosen_ratio)
        ratios = pairs.chosen_ratio, pairs.rejected_ratio
        return mpo_loss(*ratios, config.beta, shift, config.preference_weight, config.quality_weight)
