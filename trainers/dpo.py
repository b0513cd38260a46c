"""Direct preference optimization (arXiv 2305.18290, eq. 7), with label smoothing (cDPO) and an optional NLL term."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dataloader import Example
from functional import row_sums, token_logps
from models import ResponseLogits
from schema import require
from trainers.basic import BasicTrainer, supervised_sequence
from trainers.batches import Batch, Item
from trainers.metrics import Mean


@dataclass(frozen=True)
class Config:
    """Values of config/loss/dpo.yaml."""

    beta: float
    label_smoothing: float
    nll_weight: float

    def __post_init__(self) -> None:
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")
        require(0 <= self.label_smoothing < 0.5, f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        require(self.nll_weight >= 0, f"loss.nll_weight={self.nll_weight} must not be negative")


def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return -(1-e) log s(D) - e log s(-D) per pair [B], D = beta (log-ratio of chosen - log-ratio of rejected)."""
    margin = beta * ((chosen_logps - ref_chosen) - (rejected_logps - ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


class Trainer(BasicTrainer):
    """Unit: pairs (the NLL term: tokens). Slots: chosen, rejected."""

    config: Config
    needs_reference = True

    def items(self, examples: list[Example], split: str) -> list[Item]:
        """Take chosen and rejected."""
        return [
            Item((supervised_sequence(e.chosen, "chosen", "dpo"), supervised_sequence(e.rejected, "rejected", "dpo")))
            for e in examples
        ]

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count pairs and, for the NLL term, chosen tokens."""
        counts = {"dpo": int(batch.supervised(0).sum())}
        return {**counts, "nll": batch.num_tokens(0)} if self.config.nll_weight else counts

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the preference sum (and the NLL sum), with rewards beta * (log pi - log pi_0)."""
        size, beta = batch.num_items, self.config.beta
        logps = token_logps(out.logits, out.targets)
        chosen, rejected = row_sums(logps, out.rows, 2 * size).split(size)
        ref_chosen, ref_rejected = self.reference_logps(batch).to(chosen).split(size)
        real = batch.supervised(0).to(chosen)
        losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, self.config.label_smoothing)
        sums = {"dpo": (losses * real).sum()}
        if self.config.nll_weight:
            sums["nll"] = -self.config.nll_weight * logps[out.rows < size].sum()
        reward_chosen = beta * (chosen - ref_chosen).detach()
        reward_rejected = beta * (rejected - ref_rejected).detach()
        num_pairs = real.sum()
        return sums, {
            "rewards/chosen": Mean((reward_chosen * real).sum(), num_pairs),
            "rewards/rejected": Mean((reward_rejected * real).sum(), num_pairs),
            "rewards/margins": Mean(((reward_chosen - reward_rejected) * real).sum(), num_pairs),
            "rewards/accuracies": Mean(((reward_chosen > reward_rejected).to(real) * real).sum(), num_pairs),
        }
