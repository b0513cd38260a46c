"""Token-level preference optimization: TDPO (arXiv 2404.11999) and risk-aware DPO (2505.20359).

D(y) sums a divergence of the policy from the reference over the response's positions, on the full vocabulary: the KL
(TDPO), or a tail mean of z(a) = log pi_0(a|s) - log pi_theta(a|s) under a ~ pi_0 (Ra-DPO), whose mean is the KL.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from engine.metrics import Mean
from forward.chunks import Logits
from functional import chunked_risk, full_kl, row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from trainers.batches import Batch
from trainers.paired import PairedTrainer, logistic_loss, pairs_of


@dataclass(frozen=True)
class TDPOConfig:
    """Values of config/loss/tdpo.yaml."""

    beta: float
    variant: int
    alpha: float
    nll_weight: float

    def __post_init__(self) -> None:
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")
        require(self.variant in (1, 2), f"loss.variant={self.variant} must be 1 or 2")
        require(self.alpha >= 0, f"loss.alpha={self.alpha} must not be negative")
        require(self.nll_weight >= 0, f"loss.nll_weight={self.nll_weight} must not be negative")


def tdpo_loss(
    u: Tensor,
    v: Tensor,
    chosen_divergence: Tensor,
    rejected_divergence: Tensor,
    beta: float,
    variant: int,
    alpha: float,
) -> Tensor:
    """Return -log s(beta (u - v - d)) per pair [B]; d = D(y_l) - D(y_w) (variant 1) or alpha (D(y_l) - sg D(y_w))
    (2).
    """
    if variant == 1:
        difference = rejected_divergence - chosen_divergence
    else:
        difference = alpha * (rejected_divergence - chosen_divergence.detach())
    return logistic_loss(beta * (u - v - difference))


class TDPO(PairedTrainer):
    """Unit: pairs. Needs the reference's whole distributions, so a live reference."""

    config: TDPOConfig
    Config: ClassVar[type] = TDPOConfig
    needs = Needs("pairs", reference="distributions")
    formula = (
        "mean over pairs of −log σ({beta}(u − v − d)), variant {variant}: 1: d = D(y_l) − D(y_w); 2: d = "
        "{alpha}(D(y_l) − sg D(y_w)); "
        "D(y) = Σ_t KL(π_0‖π_θ)"
    )
    source = "2404.11999"

    def divergences(self, logits: Logits, reference_logits: Logits) -> Tensor:
        """Return the divergence at each response token [N]."""
        return full_kl(logits, reference_logits)

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the preference sum (and the NLL sum), rewards, and the divergences a response."""
        config, size = self.config, batch.num_items
        logps, reference_logits = token_logps(out.logits, out.targets), self.reference_logits(batch)
        ratios = logps - token_logps(reference_logits, out.targets).to(logps)
        pairs = pairs_of(logps, ratios, out.rows, size)
        divergence = row_sums(self.divergences(out.logits, reference_logits), out.rows, 2 * size)
        chosen, rejected = divergence.split(size)
        losses = tdpo_loss(
            pairs.chosen_ratio, pairs.rejected_ratio, chosen, rejected, config.beta, config.variant, config.alpha
        )
        real = batch.supervised(0).to(losses)
        sums = {"preference": (losses * real).sum()}
        if config.nll_weight:
            sums["nll"] = -config.nll_weight * logps[: batch.num_tokens(0)].sum()
        metrics = self.metrics(pairs, real)
        for name, value in (("divergence/chosen", chosen), ("divergence/rejected", rejected)):
            metrics[name] = Mean((value.detach() * real).sum(), real.sum())
        return sums, metrics


@dataclass(frozen=True)
class RaDPOConfig(TDPOConfig):
    """Values of config/loss/ra-dpo.yaml."""

    confidence_level: float
    risk: str

    def __post_init__(self) -> None:
        super().__post_init__()
        level = self.confidence_level
        require(0 < level <= 1, f"loss.confidence_level={level} must be in (0, 1] (1: the mean, as in TDPO)")
        one_of("loss.risk", self.risk, ("paper", "reference", "reference_split"))


def cvar(z: Tensor, reference_logps: Tensor, level: float) -> Tensor:
    """Return the mean of z [n, V] over its largest values that hold `level` of pi_0's mass [n]; level 1 is the mean.

    Sorted by z, pi_0 accumulated; the entry at the quantile counts with the part of its mass that is still missing.
    """
    with torch.no_grad():
        order = z.argsort(dim=-1, descending=True)
        mass = reference_logps.exp().gather(-1, order)
        before = mass.cumsum(-1) - mass
        weights = torch.minimum((level - before).clamp_min(0.0), mass)
        weights = weights / weights.sum(-1, keepdim=True)
        weights = torch.empty_like(weights).scatter_(-1, order, weights)
    return (weights * z).sum(-1)


def quantile(z: Tensor, q: float) -> Tensor:
    """Return torch.quantile(z, q, dim=-1) [n] without sorting: linear between the two order statistics around it."""
    position = q * (z.shape[-1] - 1)
    low = int(position)
    lower = z.kthvalue(low + 1, dim=-1).values
    if low + 1 >= z.shape[-1]:
        return lower
    return lower.lerp(z.kthvalue(low + 2, dim=-1).values, position - low)


def reference_risk(z: Tensor, reference_logps: Tensor, level: float, split: bool = False) -> Tensor:
    """Return sum_a pi_0(a) z(a) 1[z(a) > q] [n], q the unweighted (1 - level)-quantile over the vocabulary.

    What the published code computes: no weights in the quantile, no division by the tail's mass. `split` cuts the
    vocabulary in two halves with a quantile each, as it does by default.
    """
    if split:
        half = z.shape[-1] // 2
        halves = zip(
            z.split([half, z.shape[-1] - half], -1), reference_logps.split([half, z.shape[-1] - half], -1), strict=True
        )
        return sum(reference_risk(part, logps, level) for part, logps in halves)  # type: ignore[return-value]
    tail = z.detach() > quantile(z.detach(), 1 - level).unsqueeze(-1)
    return torch.where(tail, reference_logps.exp() * z, 0.0).sum(-1)


class RaDPO(TDPO):
    """Unit: pairs. confidence_level is the share of pi_0's mass that the tail holds: 1 is TDPO."""

    config: RaDPOConfig
    Config: ClassVar[type] = RaDPOConfig
    formula = (
        "mean over pairs of −log σ({beta}(u − v − d)), variant {variant}: 1: d = D(y_l) − D(y_w); 2: d = "
        "{alpha}(D(y_l) − sg D(y_w)); "
        "D(y) = Σ_t risk of z = log π_0/π_θ under π_0 ({risk}, confidence level {confidence_level})"
    )
    source = "2505.20359"

    def divergences(self, logits: Logits, reference_logits: Logits) -> Tensor:
        """Return the risk at each response token [N]."""
        level = self.config.confidence_level
        if self.config.risk == "paper":
            risk = partial(cvar, level=level)
        else:
            risk = partial(reference_risk, level=level, split=self.config.risk == "reference_split")
        return chunked_risk(risk, logits, reference_logits)
