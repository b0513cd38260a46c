"""BCO, binary classifier optimization (2404.04656): rewards are compared with their running mean, not with each other.

B pairs of a micro-batch.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.batches import Batch
from trainers.paired import BetaConfig, Pairs, WholeBatchTrainer


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
