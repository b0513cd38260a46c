"""Losses of a pair's two log-ratios u = log pi_theta/pi_0 of y_w and v of y_l: each a line of maths, in one module.

[B] in, [B] out. Where a loss looks at the whole global batch (AOT, BCO), `prepared` finds that out first.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from functional import token_logps
from settings.schema import one_of, require
from trainers.batches import Batch
from trainers.paired import BetaConfig, PairedTrainer, Pairs, RatioConfig, logistic_loss

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
    weight = (delta / temperature).sigmoid()
    return (1 - weight) * -F.logsigmoid(delta) + weight * torch.exp(-delta)


def bco_loss(u: Tensor, v: Tensor, beta: float, shift: Tensor | float) -> Tensor:
    """Return binary classifier optimization of a pair (2404.04656), rewards shifted by their running mean."""
    return -F.logsigmoid(beta * u - shift) - F.logsigmoid(-(beta * v - shift))


# ---- the methods


@dataclass(frozen=True)
class SmoothedConfig(BetaConfig):
    """Values of losses with a share of wrong labels."""

    label_smoothing: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 0.5, f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5)")


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


class _WholeBatch(PairedTrainer):
    """A loss that needs the log-ratios of the whole global batch: one more forward pass finds them."""

    @torch.no_grad()
    def ratios(self, batch: Batch) -> tuple[Batch, Pairs, Tensor]:
        """Return the batch with its reference scores, the pairs' sums without gradients, and which pairs are real
        [B].
        """
        batch = batch._replace(reference_logps=self.reference_logps(batch))
        with self.autocast(self.policy):
            out = self.forward(self.policy, batch.sequences)
        return batch, self.pairs(token_logps(out.logits, out.targets), out.rows, batch), batch.supervised(0)


@dataclass(frozen=True)
class AOTConfig(SmoothedConfig):
    """Values of config/loss/aot.yaml."""

    variant: str

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.variant", self.variant, ("paired", "unpaired"))


class AOT(_WholeBatch):
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
                shared=torch.stack([_partners(a, real, a_sorted, b_sorted), _partners(b, real, b_sorted, a_sorted)])
            )
            for batch, (a, b, real) in zip(scored, samples, strict=True)
        ]

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the logistic cost of a against its rank's b; unpaired, b learns from its rank's a with a value of
        zero.
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


def _partners(own: Tensor, real: Tensor, own_sorted: Tensor, other_sorted: Tensor) -> Tensor:
    """Return the entry of other_sorted [M] at the rank that each of own [B] has in own_sorted [M]; 0 for fillers."""
    if len(own_sorted) == 0:
        return torch.zeros_like(own)
    ranks = torch.searchsorted(own_sorted, own.double().cpu()).clamp_max(len(own_sorted) - 1)
    return torch.where(real.cpu(), other_sorted[ranks], 0.0).to(own)


class BCO(_WholeBatch):
    """Unit: pairs. The shift is the mean reward of all pairs seen so far, this global batch included."""

    config: BetaConfig
    Config = BetaConfig
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
