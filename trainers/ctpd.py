"""DPO of weighted tokens with the teacher for a reference (CTPD, arXiv 2601.11865; its weights: TIS-DPO, 2410.04350).

L = -log s(beta (r(y_w) - r(y_l))), r(y) = sum_t w_t (log pi_theta - log pi_T)(y_t), w_t = k exp(+-mu clamp(log
pi_plus/pi_minus (y_t), low, high)): plus for chosen tokens, minus for rejected ones, as the authors' code has it.
pi_T is the teacher after SFT, pi_plus after DPO, pi_minus after DPO on the pairs with chosen and rejected exchanged.
The paper's spans of text that two tokenizers share are single tokens here: teacher and student have one tokenizer.
The authors round weights to two decimals; we do not. Weights carry no gradient. Letters: B pairs, N response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataloader import Example
from engine.metrics import Mean
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from settings.typed import Place
from teacher.lookup import open_cache, stored_columns
from trainers.batches import Batch, Item
from trainers.paired import PairedConfig, PairedTrainer, Pairs, logistic_loss, pairs_of, pairs_with_entries

TEACHER, POSITIVE, NEGATIVE = range(3)  # columns of the numbers of a token


@dataclass(frozen=True)
class CTPDConfig(PairedConfig):
    """Values of config/loss/ctpd.yaml."""

    teacher_cache: Place
    positive_cache: Place
    negative_cache: Place
    beta: float
    weight_scale: float
    weight_exponent: float
    clamp_low: float
    clamp_high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("beta", "weight_scale"):
            require(getattr(self, key) > 0, f"loss.{key}={getattr(self, key)} must be above 0")
        require(self.weight_exponent >= 0, f"loss.weight_exponent={self.weight_exponent} must not be negative")
        require(
            self.clamp_low < self.clamp_high,
            f"loss.clamp_low={self.clamp_low} must be below loss.clamp_high={self.clamp_high}",
        )


def token_weights(positive: Tensor, negative: Tensor, chosen: Tensor, config: CTPDConfig) -> Tensor:
    """Return the weight of each token [N] from both teachers' log-probabilities; chosen [N] bool: whose response."""
    gap = (positive - negative).clamp(config.clamp_low, config.clamp_high)
    return config.weight_scale * torch.exp(config.weight_exponent * torch.where(chosen, gap, -gap))


class CTPD(PairedTrainer):
    """Unit: pairs (the NLL term: chosen tokens). Slots: chosen, rejected."""

    config: CTPDConfig
    Config = CTPDConfig
    needs = Needs("pairs", teacher="token_logp")
    formula = (
        "mean over pairs of −log σ({beta}(r(y_w) − r(y_l))), r(y) = Σ_t w_t log π_θ/π_T(y_t), w_t = {weight_scale} "
        "exp(±{weight_exponent} clamp(log π₊/π₋(y_t), {clamp_low}, {clamp_high})), + in y_w and − in y_l"
    )
    source = "2601.11865"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take both responses with three log-probabilities of each token."""
        config = self.config
        folders = config.teacher_cache, config.positive_cache, config.negative_cache
        readers = tuple(open_cache(folder, "token_logp", self.tokenizer) for folder in folders)
        return pairs_with_entries(self, examples, split, readers, lambda side: stored_columns(readers, side, "logps"))

    def pairs(self, logps: Tensor, rows: Tensor, batch: Batch) -> Pairs:
        """Sum token log-probabilities [N] and their weighted ratios to the teacher; without a teacher these are 0."""
        ratios = logps * 0  # of a rank without a pair: a loss without a graph could not be back-propagated
        if batch.teacher is not None:
            known = batch.teacher.values.to(logps)
            weights = token_weights(known[:, POSITIVE], known[:, NEGATIVE], rows < batch.num_items, self.config)
            ratios = weights * (logps - known[:, TEACHER])
        return pairs_of(logps, ratios, rows, batch.num_items)

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the loss of each pair [B]."""
        return logistic_loss(self.config.beta * (pairs.chosen_ratio - pairs.rejected_ratio))

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return what every loss of pairs does, and the mean weight of a token."""
        sums, metrics = super().sums(out, batch)
        if batch.teacher is None:
            return sums, metrics
        known = batch.teacher.values
        weights = token_weights(known[:, POSITIVE], known[:, NEGATIVE], out.rows < batch.num_items, self.config)
        return sums, {**metrics, "weight": Mean(weights.sum(), len(weights))}
