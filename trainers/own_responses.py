"""Distillation on responses of the data or, for a share `on_policy` of the items, on what the student says then.

What a step's student says is a function of (seed, step, example) and of its weights: any layout gives the same. No
gradient goes through the sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataloader import Example, Tokens
from settings.schema import require
from tokens.columns import PROMPT, SIDES, either, sides_of, taken, with_prompts
from trainers.basic import GENERATED, BasicTrainer
from trainers.batches import Batch, Item, checked
from trainers.rollouts import Micros, row_seed, with_response
from trainers.sampling import Said, answers

CHOSEN = SIDES.index("chosen")


@dataclass(frozen=True)
class OwnResponsesConfig:
    """Values that these methods share."""

    on_policy: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        require(0 <= self.on_policy <= 1, f"loss.on_policy={self.on_policy} must be in [0, 1]")
        require(self.max_new_tokens >= 1, f"loss.max_new_tokens={self.max_new_tokens} must be at least 1")


class OwnResponses(BasicTrainer):
    """Unit: tokens. Slot: the response."""

    config: OwnResponsesConfig

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take the response of each row; a row may have a prompt alone where the student writes every response."""

        def item(number: int) -> Item:
            example = examples[number]
            response = example.response or example.chosen
            if response is None and (self.config.on_policy < 1 or split == "test"):
                raise ValueError(
                    f"loss={type(self).__name__.lower()} with loss.on_policy={self.config.on_policy} needs a response "
                    f"in every {split} row, and one has a prompt alone"
                )
            return self.item(example, response or Tokens(example.prompt, [False] * len(example.prompt)), number)

        if split == "train":
            self.examples = examples
        if type(self).item is not OwnResponses.item:  # a method whose items hold more has no table of them
            return checked(len(examples), item)
        sides = sides_of(examples)
        slots = either(sides, "response", "chosen")
        if self.config.on_policy < 1 or split == "test":
            return checked(len(examples), item, taken(sides, np.where(slots == PROMPT, CHOSEN, slots)[:, None]))
        return checked(len(examples), item, with_prompts(examples, sides, slots[:, None], np.arange(len(examples))))

    def answers_while_training(self) -> bool:
        """Tell whether any response is the student's own."""
        return self.config.on_policy > 0

    def rollout(self, micros: Micros, step: int) -> Micros:
        """Let the student answer the share of the items that this step draws; held-out responses stay the data's."""
        if not step or not self.config.on_policy:
            return micros
        return [self._renewed(items, step) for items in micros]

    def _renewed(self, items: list[Item], step: int) -> list[Item]:
        seeds = [row_seed(self.run_config.seed, step, item.source, 0) for item in items]
        draws = [row_seed(self.run_config.seed, step, item.source, 1) / 2**62 for item in items]
        chosen = [i for i, draw in enumerate(draws) if draw < self.config.on_policy and items[i].source >= 0]
        asked = chosen or [0]  # ranks of a sharded model generate together, also where none of theirs is drawn
        prompts = [
            self.examples[items[i].source].prompt if items[i].source >= 0 else items[i].sequences[0].ids for i in asked
        ]
        found = answers(self, prompts, [seeds[i] for i in asked], self.config.max_new_tokens, step)
        renewed = list(items)
        for i, prompt, said in zip(asked, prompts, found, strict=True):
            if i in chosen:
                self.tally[GENERATED] += len(said.ids)
                renewed[i] = self.with_response(items[i], prompt, said)
        return renewed

    def item(self, example: Example, response: Tokens, number: int) -> Item:
        """Return the item of a row with its response, or with its bare prompt."""
        return Item((response,), source=number)

    def with_response(self, item: Item, prompt: list[int], said: Said) -> Item:
        """Return an item with what the student said to its prompt."""
        return with_response(item, prompt, said)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens."""
        return {"divergence": batch.num_tokens(0)}
