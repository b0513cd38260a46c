"""Importance-weighted on-policy distillation (IW-OPD, arXiv 2606.22600): early tokens count more where a prefix drifts.

A token's advantage is A_t = log pi_teacher - log pi_old, as in loss=opd, times w_t = 1 + gamma (1 - sum_{s<t} |A_s| /
sum_s |A_s|): 1 + gamma at the first token, toward 1 as the disagreement is used up. No gradient goes through w.
The weights are those of TRL's trainer, whose golden numbers hold; the clipped ratio is ours (loss=opd has it).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from settings.schema import require
from trainers.opd import OPD, OPDConfig, distillation_advantages


@dataclass(frozen=True)
class IWOPDConfig(OPDConfig):
    """Values of config/loss/iw-opd.yaml."""

    amplification: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.amplification >= 0, f"loss.amplification={self.amplification} must not be negative")
        require(
            self.alignment == "ids",
            f"loss.alignment={self.alignment}: loss=iw-opd weighs a token by those before it, of one tokenizer. "
            "Use loss=opd",
        )
        require(
            self.discount == 0,
            f"loss.discount={self.discount}: loss=iw-opd weighs each token's own advantage. Leave it at 0, or "
            "use loss=opd",
        )


def prefix_weights(advantages: Tensor, amplification: float, epsilon: float = 1e-8) -> Tensor:
    """Return 1 + gamma (1 - share of sum |A| that lies before t) of rows [B, T]; zeros behind a row change nothing."""
    size = advantages.abs()
    before = size.cumsum(dim=1) - size
    return 1.0 + amplification * (1.0 - before / size.sum(dim=1, keepdim=True).clamp_min(epsilon))


class IWOPD(OPD):
    """Unit: tokens. Slot: the student's response."""

    config: IWOPDConfig
    Config = IWOPDConfig
    formula = (
        "mean over tokens of the student's responses of max(−wAρ, −wA·clip(ρ, 1 ± {clip})), ρ = π_θ/π_old, "
        "A_t = log π_teacher/π_old(y_t), w_t = 1 + {amplification}(1 − Σ_s<t |A_s| / Σ_s |A_s|)"
    )
    source = "2606.22600"

    def advantages(self, own: Tensor, teacher: Tensor) -> Tensor:
        """Return the weighted advantages of rows [B, T]."""
        with torch.no_grad():
            plain = distillation_advantages(own, teacher, 0.0)
            return prefix_weights(plain, self.config.amplification) * plain
