"""Losses of pairs without a reference model: SLiC, SimPO, CPO, ORPO. [B] log-probabilities in, [B] losses out."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from settings.needs import Needs
from settings.schema import one_of, require
from trainers.batches import Batch
from trainers.paired import PairedConfig, PairedTrainer, Pairs, logistic_loss

# ---- the maths


def slic_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return max(0, beta - log pi(y_w) + log pi(y_l)) (2305.10425); its regularizer is the NLL term."""
    return F.relu(beta - chosen + rejected)


def simpo_loss(
    mean_chosen: Tensor,
    mean_rejected: Tensor,
    beta: float,
    gamma: float,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return -log s(beta (r_w - r_l) - gamma) of token-averaged log-probabilities (2405.14734).

    r = log p; with alpha (AlphaPO, 2501.03884) r = (1 - p^-alpha) / alpha.
    """
    if alpha:
        mean_chosen, mean_rejected = ((1 - torch.exp(-alpha * p)) / alpha for p in (mean_chosen, mean_rejected))
    return logistic_loss(beta * (mean_chosen - mean_rejected) - gamma, label_smoothing)


def orpo_loss(mean_chosen: Tensor, mean_rejected: Tensor) -> Tensor:
    """Return -log s(log odds of y_w - log odds of y_l), odds = p / (1 - p), p = exp(token mean of log pi)
    (2403.07691).
    """
    return logistic_loss(log_odds(mean_chosen) - log_odds(mean_rejected))


def log_odds(mean_logp: Tensor) -> Tensor:
    """Return log p - log(1 - p) of log p, bounded where p is 1 to the last digit."""
    bounded = mean_logp.clamp_max(-torch.finfo(mean_logp.dtype).eps)
    return bounded - torch.log(-torch.expm1(bounded))


# ---- the methods


def token_means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the token averages of log pi of chosen and rejected [B]."""
    return pairs.chosen / pairs.chosen_tokens.clamp_min(1), pairs.rejected / pairs.rejected_tokens.clamp_min(1)


class _ReferenceFree(PairedTrainer):
    """The policy's own log-probabilities are the rewards."""

    needs = Needs("pairs")

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return beta times the log-probabilities."""
        beta = getattr(self.config, "beta", 1.0)
        return beta * pairs.chosen, beta * pairs.rejected


@dataclass(frozen=True)
class SLiCConfig(PairedConfig):
    """Values of config/loss/slic.yaml."""

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")


class SLiC(_ReferenceFree):
    """Units: pairs (the NLL term: tokens). beta is the margin; rewards are plain log-probabilities."""

    config: SLiCConfig
    Config = SLiCConfig
    formula = "mean over pairs of max(0, {beta} − log π_θ(y_w) + log π_θ(y_l))"
    source = "2305.10425"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return slic_loss."""
        return slic_loss(pairs.chosen, pairs.rejected, self.config.beta)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities."""
        return pairs.chosen, pairs.rejected


@dataclass(frozen=True)
class SimPOConfig(PairedConfig):
    """Values of config/loss/simpo.yaml."""

    beta: float
    gamma: float
    alpha: float
    label_smoothing: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")
        require(0 <= self.label_smoothing < 0.5, f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5)")


class SimPO(_ReferenceFree):
    """Unit: pairs."""

    config: SimPOConfig
    Config = SimPOConfig
    formula = (
        "mean over pairs of −log σ({beta}(r_w − r_l) − {gamma}), r the token mean of log π_θ (alpha = "
        "{alpha}; smoothing {label_smoothing})"
    )
    source = "2405.14734; alpha: 2501.03884"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return simpo_loss of the token means."""
        config = self.config
        return simpo_loss(*token_means(pairs), config.beta, config.gamma, config.alpha, config.label_smoothing)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return beta times the token means."""
        chosen, rejected = token_means(pairs)
        return self.config.beta * chosen, self.config.beta * rejected


@dataclass(frozen=True)
class CPOConfig(PairedConfig):
    """Values of config/loss/cpo.yaml."""

    beta: float
    label_smoothing: float
    preference: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")
        require(0 <= self.label_smoothing < 0.5, f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        one_of("loss.preference", self.preference, ("sigmoid", "hinge"))


class CPO(_ReferenceFree):
    """Units: pairs (the NLL term: tokens)."""

    config: CPOConfig
    Config = CPOConfig
    formula = (
        "mean over pairs of the {preference} loss of {beta}(log π_θ(y_w) − log π_θ(y_l)) (smoothing {label_smoothing})"
    )
    source = "2401.08417"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the logistic (DPO with a uniform reference) or hinge loss of the log-probabilities' difference."""
        delta = self.config.beta * (pairs.chosen - pairs.rejected)
        return (
            F.relu(1 - delta)
            if self.config.preference == "hinge"
            else logistic_loss(delta, self.config.label_smoothing)
        )


@dataclass(frozen=True)
class ORPOConfig(PairedConfig):
    """Values of config/loss/orpo.yaml."""

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")


class ORPO(_ReferenceFree):
    """Units: pairs (the NLL term, which belongs to the method: tokens)."""

    config: ORPOConfig
    Config = ORPOConfig
    formula = (
        "mean over pairs of −{beta} log σ(log odds(y_w) − log odds(y_l)), odds = p/(1−p), p = exp(token mean "
        "of log π_θ)"
    )
    source = "2403.07691"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return beta times orpo_loss."""
        return self.config.beta * orpo_loss(*token_means(pairs))

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return beta times the token means."""
        chosen, rejected = token_means(pairs)
        return self.config.beta * chosen, self.config.beta * rejected
