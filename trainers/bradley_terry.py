"""Bradley-Terry reward model: -log s(s(x, y_w) - s(x, y_l) - margin), s a scalar head at the last response token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataloader import Example, Sequences
from engine.metrics import Mean
from models import last_token_scores
from settings.needs import Needs
from settings.schema import require
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, pair_items
from trainers.paired import logistic_loss


@dataclass(frozen=True)
class BradleyTerryConfig:
    """Values of config/loss/bradley-terry.yaml."""

    margin: float
    center_weight: float

    def __post_init__(self) -> None:
        require(self.center_weight >= 0, f"loss.center_weight={self.center_weight} must not be negative")


class BradleyTerry(BasicTrainer):
    """Unit: pairs. Slots: chosen, rejected. Saved as an ordinary AutoModelForSequenceClassification folder."""

    config: BradleyTerryConfig
    Config = BradleyTerryConfig
    needs = Needs("pairs")
    formula = (
        "mean over pairs of −log σ(s(y_w) − s(y_l) − {margin}) + {center_weight}(s(y_w) + s(y_l))², s the "
        "score at the last token"
    )
    source = "Bradley and Terry 1952; 2203.02155; centring: 2312.09244"
    head = "reward"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take chosen and rejected."""
        name = "bradley-terry"
        return pair_items(examples, name)

    def forward(self, model: torch.nn.Module, sequences: Sequences) -> Tensor:
        """Return the score of every row [2B]."""
        return last_token_scores(model, sequences)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count pairs."""
        return {"preference": batch.num_supervised(0)}

    def sums(self, out: Tensor, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the preference sum, scores and accuracies."""
        chosen, rejected = out.split(batch.num_items)
        real = batch.supervised(0)
        losses = (
            logistic_loss(chosen - rejected - self.config.margin) + self.config.center_weight * (chosen + rejected) ** 2
        )
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen),
        }
        metrics = {
            name: Mean(torch.where(real, value.detach(), 0.0).sum(), real.sum()) for name, value in values.items()
        }
        return {"preference": torch.where(real, losses, 0.0).sum()}, metrics
