"""AOT, alignment by optimal transport (2406.05882): quantiles of two samples are compared, not the sides of a pair.

B pairs of a micro-batch, M pairs of the global batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from settings.schema import one_of
from trainers.batches import Batch
from trainers.paired import Pairs, SmoothedConfig, WholeBatchTrainer, logistic_loss


@dataclass(frozen=True)
class AOTConfig(SmoothedConfig):
    """Values of config/loss/aot.yaml."""

    variant: str

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.variant", self.variant, ("paired", "unpaired"))


class AOT(WholeBatchTrainer):
    """Unit: pairs. Quantiles are those of the whole global batch, whatever its layout."""

    config: AOTConfig
    Config = AOTConfig
    formula = (
        "mean over ranks r of −(1−{label_smoothing}) log σ({beta}(a₍r₎ − b₍r₎)) − {label_smoothing} log σ(−{beta}(a₍r₎ "
        "− b₍r₎)), "
        "sorted over the global batch; {variant}: paired a = log π_θ(y_w) − log π_θ(y_l), b the same of π_0; unpaired "
        "a = u, b = v"
    )
    source = "2406.05882"

    def compared(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the two samples [B] whose quantiles are compared."""
        if self.config.variant == "unpaired":
            return pairs.chosen_ratio, pairs.rejected_ratio
        policy = pairs.chosen - pairs.rejected
        return policy, policy.detach() - (pairs.chosen_ratio - pairs.rejected_ratio).detach()

    def prepared(self, batches: list[Batch], training: bool) -> list[Batch]:
        """Give each pair the value of the other sample that has the same rank in the global batch: shared [2, B]."""
        samples, scored = [], []
        for batch in batches:
            batch, pairs, real = self.ratios(batch)
            samples.append((*self.compared(pairs), real))
            scored.append(batch)
        mine = [[(float(a), float(b)) for a, b, r in zip(*sample, strict=True) if r] for sample in samples]
        everyone = self.gathered([value for part in mine for value in part])
        a_sorted, b_sorted = (
            torch.tensor([value[i] for value in everyone], dtype=torch.float64).sort().values for i in (0, 1)
        )
        return [
            batch._replace(
                shared=torch.stack([partners(a, real, a_sorted, b_sorted), partners(b, real, b_sorted, a_sorted)])
            )
            for batch, (a, b, real) in zip(scored, samples, strict=True)
        ]

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the logistic cost of a against its rank's b.

        Unpaired, b learns from its rank's a, too; that part has a gradient and the value zero.
        """
        a, b = self.compared(pairs)
        assert batch.shared is not None, "prepared() comes first"
        partner_of_a, partner_of_b = batch.shared.to(a)
        beta, smoothing = self.config.beta, self.config.label_smoothing
        losses = logistic_loss(beta * (a - partner_of_a), smoothing)
        if self.config.variant == "paired":
            return losses
        other = logistic_loss(beta * (partner_of_b - b), smoothing)
        return losses + other - other.detach()


def partners(own: Tensor, real: Tensor, own_sorted: Tensor, other_sorted: Tensor) -> Tensor:
    """Return the entry of other_sorted [M] at the rank that each of own [B] has in own_sorted [M]; 0 for fillers."""
    if len(own_sorted) == 0:
        return torch.zeros_like(own)
    ranks = torch.searchsorted(own_sorted, own.double().cpu()).clamp_max(len(own_sorted) - 1)
    return torch.where(real.cpu(), other_sorted[ranks], 0.0).to(own)
