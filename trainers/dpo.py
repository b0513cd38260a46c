"""Direct preference optimization (arXiv 2305.18290, eq. 7) with its options.

Label smoothing makes it cDPO; other f-divergences in place of reverse KL (2309.16240); WPO's weights (2406.11827);
log-ratios averaged over tokens; a margin that the chosen response has to win by; LD-DPO's weight on what the longer
response has beyond the shorter one's length (2409.06411).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from functional import log_collision, row_sums, token_logps
from models import ResponseLogits
from settings.schema import one_of, require
from trainers.batches import Batch
from trainers.paired import BetaConfig, PairedTrainer, Pairs, humanline, logistic_loss, pairs_of

DIVERGENCES = ("reverse_kl", "forward_kl", "alpha", "js")


@dataclass(frozen=True)
class DPOConfig(BetaConfig):
    """Values of config/loss/dpo.yaml."""

    label_smoothing: float
    divergence: str
    alpha: float
    wpo: str
    length_normalized: bool
    margin: float
    ld_alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 0.5, f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        one_of("loss.divergence", self.divergence, DIVERGENCES)
        require(self.alpha > 0, f"loss.alpha={self.alpha} must be above 0 (toward 0: reverse KL, 1: forward KL)")
        require(0 <= self.ld_alpha <= 1, f"loss.ld_alpha={self.ld_alpha} must be in [0, 1] (1: DPO)")
        one_of("loss.wpo", self.wpo, ("off", "clamped", "unclamped"))


def dpo_loss(
    chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float, label_smoothing: float = 0.0, margin: float = 0.0
) -> Tensor:
    """Return -(1-e) log s(D) - e log s(-D) per pair [B], D = beta (chosen ratio - rejected ratio - margin)."""
    return logistic_loss(beta * (chosen_ratio - rejected_ratio - margin), label_smoothing)


def divergence_score(ratio: Tensor, divergence: str, alpha: float = 1.0) -> Tensor:
    """Return f'(pi_theta / pi_0) up to a constant [B], from log-ratios (2309.16240, table 1).

    alpha: (1 - u^-alpha) / alpha; 1 is the forward KL, toward 0 the reverse KL. js: log u - log(1 + u). Where u^-alpha
    would overflow it is bounded, without a gradient: the slope of a pair that is won by far would be 0 times infinity.
    """
    if divergence == "reverse_kl":
        return ratio
    if divergence == "js":
        return F.logsigmoid(ratio)
    alpha = 1.0 if divergence == "forward_kl" else alpha
    highest = math.log(torch.finfo(ratio.dtype).max) + min(0.0, math.log(alpha)) - 1
    return -torch.exp((-alpha * ratio).clamp_max(highest)) / alpha


def shared_length_weights(rows: Tensor, size: int, ld_alpha: float) -> Tensor:
    """Return LD-DPO's weight of each token [N] of 2 * size sequences, chosen first: 1 within the shorter response's
    length, ld_alpha beyond it (2409.06411, eq. 9).
    """
    ones = torch.ones_like(rows)
    lengths = torch.zeros(2 * size, dtype=rows.dtype, device=rows.device).index_add(0, rows, ones)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(rows), device=rows.device) - starts[rows]
    shared = torch.minimum(*lengths.split(size)).repeat(2)
    return torch.where(place < shared[rows], 1.0, ld_alpha)


def wpo_weights(alignment: Tensor, clamp: bool) -> Tensor:
    """Return exp(alignment) [B] (WPO, 2406.11827); `clamp` bounds it by 1, as its authors' code does.

    alignment: the two responses' token means of log pi - log sum_v pi(v)^2, added.
    """
    weights = torch.exp(alignment)
    return weights.clamp(max=1.0) if clamp else weights


class DPO(PairedTrainer):
    """Unit: pairs (the NLL term: tokens). Slots: chosen, rejected."""

    config: DPOConfig
    Config = DPOConfig
    formula = (
        "mean over pairs of −(1−{label_smoothing}) log σ(D) − {label_smoothing} log σ(−D), D = {beta}(f(u) − f(v) − "
        "{margin}), "
        "u = log π_θ/π_0 of y_w, v of y_l, f of {divergence}"
    )
    source = "2305.18290; label smoothing: Mitchell 2023; f: 2309.16240; WPO: 2406.11827; LD-DPO: 2409.06411"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return dpo_loss of the scores."""
        config, ratios = self.config, [pairs.chosen_ratio, pairs.rejected_ratio]
        if config.length_normalized:
            tokens = (pairs.chosen_tokens, pairs.rejected_tokens)
            ratios = [ratio / count.clamp_min(1) for ratio, count in zip(ratios, tokens, strict=True)]
        chosen, rejected = (divergence_score(ratio, config.divergence, config.alpha) for ratio in ratios)
        return dpo_loss(chosen, rejected, config.beta, config.label_smoothing, config.margin)

    def pairs(self, logps: Tensor, rows: Tensor, batch: Batch) -> Pairs:
        """Sum token log-probabilities [N] and their ratios to the reference; tokens beyond the shared length count
        ld_alpha in the ratios.
        """
        if self.config.ld_alpha == 1:
            return super().pairs(logps, rows, batch)
        ratios = humanline(logps - self.reference_logps(batch).to(logps), self.config)
        weights = shared_length_weights(rows, batch.num_items, self.config.ld_alpha)
        return pairs_of(logps, weights.to(ratios) * ratios, rows, batch.num_items)

    @torch.no_grad()
    def weights(self, out: ResponseLogits, batch: Batch) -> Tensor | None:
        """Return WPO's weight of each pair [B]: how likely the policy itself would have written both responses."""
        if self.config.wpo == "off":
            return None
        size = batch.num_items
        aligned = token_logps(out.logits, out.targets) - log_collision(out.logits)
        tokens = row_sums(torch.ones_like(aligned), out.rows, 2 * size).clamp_min(1)
        chosen, rejected = (row_sums(aligned, out.rows, 2 * size) / tokens).split(size)
        return wpo_weights(chosen + rejected, self.config.wpo == "clamped")

    def objective(self) -> str:
        """Return the formula with the run's numbers, and the options that change it."""
        text, config = super().objective(), self.config
        text += "; u and v averaged over tokens" if config.length_normalized else ""
        text += f"; alpha = {config.alpha}" if config.divergence == "alpha" else ""
        text += f"; tokens beyond the shorter response count {config.ld_alpha} (LD-DPO)" if config.ld_alpha != 1 else ""
        return text + (f"; pairs weighted by WPO ({config.wpo})" if config.wpo != "off" else "")
