"""Supervised fine-tuning: -log pi(y|x), mean over the response tokens of the global batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dataloader import Example
from engine.metrics import Mean
from functional import token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of
from tokens.columns import SIDES, side_numbers, sides_of, taken
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, checked, supervised_sequence


@dataclass(frozen=True)
class SFTConfig:
    """Values of config/loss/sft.yaml."""

    train_on: str

    def __post_init__(self) -> None:
        one_of("loss.train_on", self.train_on, ("auto", "response", "chosen"))


class SFT(BasicTrainer):
    """Unit: tokens."""

    config: SFTConfig
    Config = SFTConfig
    needs = Needs("responses")
    formula = "mean over response tokens of −log π_θ(y_t|s_t)"
    source = "supervised fine-tuning"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take the response, or the chosen one of a pair."""

        def item(number: int) -> Item:
            example = examples[number]
            tokens = example.chosen if self.config.train_on == "chosen" else example.response
            if self.config.train_on == "auto":
                tokens = example.response or example.chosen
            return Item((supervised_sequence(tokens, "a response", "sft", example),))

        sides = sides_of(examples)
        wanted = side_numbers(len(examples), "chosen" if self.config.train_on == "chosen" else "response")
        if self.config.train_on == "auto":
            wanted[sides.lengths[:, SIDES.index("response")] < 0] = SIDES.index("chosen")
        return checked(len(examples), item, taken(sides, wanted))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens."""
        return {"nll": batch.num_tokens(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the NLL sum."""
        return {"nll": -token_logps(out.logits, out.targets).sum()}, {}
