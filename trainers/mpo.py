"""Mixed preference optimization (MPO, arXiv 2411.10442): a preference, a quality and a generation term together.

L = w_p L_DPO + w_q L_BCO + w_g NLL(y_w); the quality term is that of loss=bco, its shift the running mean of rewards.
"""

from dataclasses import dataclass

from torch import Tensor

from settings.schema import require
from trainers.batches import Batch
from trainers.bco import BCO, bco_loss
from trainers.dpo import dpo_loss
from trainers.paired import BetaConfig, Pairs


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
    """Return w_p DPO + w_q BCO of each pair [B], from the log-ratios [B] of chosen and rejected."""
    return preference_weight * dpo_loss(u, v, beta) + quality_weight * bco_loss(u, v, beta, shift)


class MPO(BCO):
    """Unit: pairs (the NLL term: chosen tokens). Slots: chosen, rejected."""

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
