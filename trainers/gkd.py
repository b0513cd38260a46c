"""Generalized knowledge distillation (arXiv 2306.13649): a divergence from a live teacher on every token of a response.

Responses are the data's or, for a share `on_policy` of the items, what the student says at that step; no gradient goes
through the sampling. With on_policy=1 and beta=1 this is on-policy distillation by the exact per-token reverse KL.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloader import Example, Tokens
from engine.metrics import Mean
from functional import entropies, tempered_jsd
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from settings.typed import Places
from teacher.live import check_teachers, mixed_logits, said, teacher_folders
from tokens.columns import PROMPT, SIDES, either, sides_of, taken, with_prompts
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, checked
from trainers.rollouts import Micros, row_seed, with_response
from trainers.sampling import answers

CHOSEN = SIDES.index("chosen")


@dataclass(frozen=True)
class GKDConfig:
    """Values of config/loss/gkd.yaml."""

    teacher: Places
    teacher_weights: Any
    mixture: str
    on_policy: float
    beta: float
    temperature: float
    teacher_temperature: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_teachers(self.teacher, self.teacher_weights, self.mixture)
        for key in ("on_policy", "beta"):
            require(0 <= getattr(self, key) <= 1, f"loss.{key}={getattr(self, key)} must be in [0, 1]")
        require(self.temperature > 0, f"loss.temperature={self.temperature} must be above 0")
        require(self.teacher_temperature > 0, f"loss.teacher_temperature={self.teacher_temperature} must be above 0")
        require(self.max_new_tokens >= 1, f"loss.max_new_tokens={self.max_new_tokens} must be at least 1")


class GKD(BasicTrainer):
    """Unit: tokens. Slot: the response."""

    config: GKDConfig
    Config = GKDConfig
    needs = Needs("responses", teacher="live")
    formula = (
        "mean over response tokens of the generalized JSD({beta}) of teacher (its logits over {teacher_temperature}) "
        "and student at temperature {temperature}; "
        "responses: a share "
        "{on_policy} the student's own, the rest the data's"
    )
    source = "2306.13649"

    def answers_while_training(self) -> bool:
        """Tell whether any response is the student's own."""
        return self.config.on_policy > 0

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the teacher, or each of several."""
        return teacher_folders(self.config.teacher)

    def objective(self) -> str:
        """Return the formula with the run's numbers, and the mixture of several teachers."""
        return super().objective() + said(self.config.teacher, self.config.teacher_weights, self.config.mixture)

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take the response of each row; a row may have a prompt alone where the student writes every response."""

        def item(number: int) -> Item:
            example = examples[number]
            response = example.response or example.chosen
            if response is None and (self.config.on_policy < 1 or split == "test"):
                raise ValueError(
                    f"loss=gkd with loss.on_policy={self.config.on_policy} needs a response in every {split} row, and "
                    "one has a prompt alone"
                )
            return Item((response or Tokens(example.prompt, [False] * len(example.prompt)),), source=number)

        if split == "train":
            self.examples = examples
        sides = sides_of(examples)
        slots = either(sides, "response", "chosen")
        if self.config.on_policy < 1 or split == "test":
            return checked(len(examples), item, taken(sides, np.where(slots == PROMPT, CHOSEN, slots)[:, None]))
        return checked(len(examples), item, with_prompts(examples, sides, slots[:, None], np.arange(len(examples))))

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
        for i, prompt, response in zip(asked, prompts, found, strict=True):
            if i in chosen:
                renewed[i] = with_response(items[i], prompt, response)
        return renewed

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens."""
        return {"divergence": batch.num_tokens(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the divergence's sum."""
        config = self.config
        who = config.teacher, config.teacher_weights, config.mixture
        wanted = mixed_logits(self.frozen_models, batch.sequences, self.vocab_size, *who).logits
        divergence = tempered_jsd(out.logits, wanted, config.beta, config.temperature, config.teacher_temperature)
        tokens, real = len(divergence), batch.supervised(0)
        with torch.no_grad():
            spread = entropies(out.logits).sum()
        return {"divergence": divergence.sum()}, {
            "entropy": Mean(spread, tokens),
            "response_tokens": Mean(tokens, real.sum()),
        }
