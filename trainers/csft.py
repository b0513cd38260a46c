"""Conditional supervised fine-tuning: chosen and rejected responses, each behind a control token that says which it
is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dataloader import Example, Tokens
from engine.metrics import Mean
from functional import token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, checked, supervised_sequence


@dataclass(frozen=True)
class CSFTConfig:
    """Values of config/loss/csft.yaml."""

    chosen_token: str
    rejected_token: str

    def __post_init__(self) -> None:
        require(
            bool(self.chosen_token) and bool(self.rejected_token) and self.chosen_token != self.rejected_token,
            f"loss.chosen_token={self.chosen_token!r} and loss.rejected_token={self.rejected_token!r} must be two "
            "different texts",
        )


def with_control(tokens: Tokens, prompt_length: int, control: list[int], max_length: int) -> Tokens:
    """Put the control ids between prompt and response, supervised with it, and cut to max_length."""
    old_ids, old_mask = tokens.ids, tokens.response
    ids = [*old_ids[:prompt_length], *control, *old_ids[prompt_length:]]
    mask = [*old_mask[:prompt_length], *(True for _ in control), *old_mask[prompt_length:]]
    return Tokens(ids[:max_length], mask[:max_length])


class CSFT(BasicTrainer):
    """Unit: tokens. Each pair is two items. At inference the response begins with the control text of chosen ones."""

    config: CSFTConfig
    Config = CSFTConfig
    needs = Needs("pairs")
    formula = "mean over response tokens of −log π_θ(y_t|s_t), y_w behind {chosen_token}, y_l behind {rejected_token}"
    source = "2402.01306 (baseline)"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take chosen and rejected as items of their own, with the ids of their control text."""
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        controls = {"chosen": encode(self.config.chosen_token), "rejected": encode(self.config.rejected_token)}
        sides = list(controls)

        def item(number: int) -> Item:
            example, side = examples[number // len(sides)], sides[number % len(sides)]
            tokens = supervised_sequence(getattr(example, side), side, "csft", example)
            return Item((with_control(tokens, len(example.prompt), controls[side], self.model_config.max_length),))

        return checked(len(examples) * len(sides), item)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens, control tokens among them."""
        return {"nll": batch.num_tokens(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the NLL sum."""
        return {"nll": -token_logps(out.logits, out.targets).sum()}, {}
