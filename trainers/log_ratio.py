"""Losses of a pair's two log-ratios u = log pi_theta/pi_0 of y_w and v of y_l: each a line of maths, in one module.

[B] in, [B] out. The two that look at the whole global batch are in aot.py and bco.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from settings.schema import require
from trainers.batches import Batch
from trainers.paired import BetaConfig, PairedTrainer, Pairs, RatioConfig, SmoothedConfig

# ---- the maths


def robust_dpo_loss(u: Tensor, v: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return DPO debiased for labels flipped with probability e (2403.00409)."""
    delta, e = beta * (u - v), label_smoothing
    return (-(1 - e) * F.logsigmoid(delta) + e * F.logsigmoid(-delta)) / (1 - 2 * e)


def ipo_loss(mean_u: Tensor, mean_v: Tensor, tau: float) -> Tensor:
    """Return (d - 1/(2 tau))^2, d the difference of token-averaged log-ratios (2310.12036)."""
    return (mean_u - mean_v - 1 / (2 * tau)) ** 2


def hinge_loss(u: Tensor, v: Tensor, beta: float) -> Tensor:
    """Return max(0, 1 - D) (RSO, 2309.06657)."""
    return F.relu(1 - beta * (u - v))


def exo_loss(u: Tensor, v: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return the reverse KL between the policy's preference and the smoothed label (2402.00856)."""
    delta = beta * (u - v)
    win = F.logsigmoid(delta) - math.log(1 - label_smoothing)
    lose = F.logsigmoid(-delta) - math.log(label_smoothing)
    return delta.sigmoid() * win + (-delta).sigmoid() * lose


def nca_loss(u: Tensor, v: Tensor, beta: float) -> Tensor:
    """Return noise-contrastive alignment of a pair (2402.05369): the chosen reward itself is held up."""
    return -F.logsigmoid(beta * u) - 0.5 * F.logsigmoid(-beta * u) - 0.5 * F.logsigmoid(-beta * v)


def sppo_loss(u: Tensor, v: Tensor, beta: float) -> Tensor:
    """Return self-play preference optimization with hard labels (2405.00675)."""
    return (u - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2


def apo_zero_loss(u: Tensor, v: Tensor, beta: float) -> Tensor:
    """Return anchored preference optimization that pushes chosen up and rejected down (2408.06266)."""
    return 1 - (beta * u).sigmoid() + (beta * v).sigmoid()


def apo_down_loss(u: Tensor, v: Tensor, beta: float) -> Tensor:
    """Return anchored preference optimization that pushes both down, rejected further (2408.06266)."""
    return (beta * u).sigmoid() + 1 - (beta * (u - v)).sigmoid()


def discopop_loss(u: Tensor, v: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the log-ratio modulated blend of logistic and exponential loss (2406.08414)."""
    delta = beta * (u - v)
    modulation = delta / temperature
    exponential = torch.exp(F.logsigmoid(modulation) - delta)  # a product of the two could be 0 times infinity
    return (-modulation).sigmoid() * -F.logsigmoid(delta) + exponential


# ---- the methods


class RobustDPO(PairedTrainer):
    """Unit: pairs."""

    config: SmoothedConfig
    Config = SmoothedConfig
    formula = (
        "mean over pairs of (−(1−{label_smoothing}) log σ(Δ) + {label_smoothing} log σ(−Δ)) / (1 − "
        "2·{label_smoothing}), Δ = {beta}(u − v)"
    )
    source = "2403.00409"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return robust_dpo_loss."""
        return robust_dpo_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta, self.config.label_smoothing)


@dataclass(frozen=True)
class IPOConfig(RatioConfig):
    """Values of config/loss/ipo.yaml."""

    tau: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau > 0, f"loss.tau={self.tau} must be above 0")


class IPO(PairedTrainer):
    """Unit: pairs. No beta: tau says how far the averaged log-ratios shall part."""

    config: IPOConfig
    Config = IPOConfig
    formula = "mean over pairs of (ū − v̄ − 1/(2·{tau}))², ū and v̄ averaged over response tokens"
    source = "2310.12036"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return ipo_loss of the token means."""
        mean_u = pairs.chosen_ratio / pairs.chosen_tokens.clamp_min(1)
        return ipo_loss(mean_u, pairs.rejected_ratio / pairs.rejected_tokens.clamp_min(1), self.config.tau)


class Hinge(PairedTrainer):
    """Unit: pairs."""

    config: BetaConfig
    Config = BetaConfig
    formula = "mean over pairs of max(0, 1 − {beta}(u − v))"
    source = "2309.06657"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return hinge_loss."""
        return hinge_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta)


@dataclass(frozen=True)
class EXOConfig(SmoothedConfig):
    """Values of config/loss/exo.yaml."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.label_smoothing > 0, "loss.label_smoothing=0 makes the loss of EXO infinite: use e.g. 0.001")


class EXO(PairedTrainer):
    """Unit: pairs."""

    config: EXOConfig
    Config = EXOConfig
    formula = (
        "mean over pairs of σ(Δ)(log σ(Δ) − log(1−{label_smoothing})) + σ(−Δ)(log σ(−Δ) − log "
        "{label_smoothing}), Δ = {beta}(u − v)"
    )
    source = "2402.00856"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return exo_loss."""
        return exo_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta, self.config.label_smoothing)


class NCA(PairedTrainer):
    """Unit: pairs."""

    config: BetaConfig
    Config = BetaConfig
    formula = "mean over pairs of −log σ({beta}u) − ½ log σ(−{beta}u) − ½ log σ(−{beta}v)"
    source = "2402.05369"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return nca_loss."""
        return nca_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta)


class SPPOHard(PairedTrainer):
    """Unit: pairs."""

    config: BetaConfig
    Config = BetaConfig
    formula = "mean over pairs of (u − 1/(2·{beta}))² + (v + 1/(2·{beta}))²"
    source = "2405.00675"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return sppo_loss."""
        return sppo_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta)


class APOZero(PairedTrainer):
    """Unit: pairs. For chosen responses that are better than what the policy writes."""

    config: BetaConfig
    Config = BetaConfig
    formula = "mean over pairs of 1 − σ({beta}u) + σ({beta}v)"
    source = "2408.06266"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return apo_zero_loss."""
        return apo_zero_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta)


class APODown(PairedTrainer):
    """Unit: pairs. For chosen responses that are worse than what the policy writes."""

    config: BetaConfig
    Config = BetaConfig
    formula = "mean over pairs of σ({beta}u) + 1 − σ({beta}(u − v))"
    source = "2408.06266"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return apo_down_loss."""
        return apo_down_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta)


@dataclass(frozen=True)
class DiscoPOPConfig(BetaConfig):
    """Values of config/loss/discopop.yaml."""

    temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"loss.temperature={self.temperature} must be above 0")


class DiscoPOP(PairedTrainer):
    """Unit: pairs."""

    config: DiscoPOPConfig
    Config = DiscoPOPConfig
    formula = "mean over pairs of (1−w)(−log σ(Δ)) + w e^(−Δ), w = σ(Δ/{temperature}), Δ = {beta}(u − v)"
    source = "2406.08414"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return discopop_loss."""
        return discopop_loss(pairs.chosen_ratio, pairs.rejected_ratio, self.config.beta, self.config.temperature)
