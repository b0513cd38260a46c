"""Conditional supervised fine-tuning: chosen and rejected responses, each behind a control token that says which it
is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dataloader import Example, Tokens
from engine.metrics import Mean
from functional import token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from tokens.columns import Columns, keys_from, part_of, prompts_of, sides_of
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
    return Tokens(*(part.tolist() for part in controlled(*tokens.arrays(), prompt_length, control, max_length)))


def controlled(
    ids: np.ndarray, mask: np.ndarray, prompt_length: int, control: list[int], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of the same."""
    whole = np.insert(ids, prompt_length, control), np.insert(mask, prompt_length, [True] * len(control))
    return whole[0][:max_length], whole[1][:max_length]


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
        sides, limit = list(controls), self.model_config.max_length
        prompts, known = prompts_of(examples).lengths, sides_of(examples)

        def item(number: int) -> Item:
            example, side = examples[number // len(sides)], sides[number % len(sides)]
            tokens = supervised_sequence(getattr(example, side), side, "csft", example)
            return Item((with_control(tokens, len(example.prompt), controls[side], limit),))

        def part(number: int) -> tuple[np.ndarray, np.ndarray]:
            row, side = divmod(number, len(sides))
            ids, mask = part_of(examples, row, side)
            return controlled(ids, mask, int(prompts[row]), controls[sides[side]], limit)

        count = len(examples) * len(sides)
        lengths = known.lengths[:, : len(sides)]
        longer = np.minimum(lengths + [len(control) for control in controls.values()], limit)
        columns = Columns(np.where(lengths < 0, -1, longer).reshape(-1, 1), lambda: keys_from(part, count)[:, None])
        return checked(count, item, columns)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens, control tokens among them."""
        return {"nll": batch.num_tokens(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the NLL sum."""
        return {"nll": -token_logps(out.logits, out.targets).sum()}, {}
