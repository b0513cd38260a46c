"""Generalized knowledge distillation (arXiv 2306.13649): a divergence from a live teacher on every token of a response.

Responses are the data's or, for a share `on_policy` of the items, what the student says at that step; no gradient goes
through the sampling. With on_policy=1 and beta=1 this is on-policy distillation by the exact per-token reverse KL.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.metrics import Mean
from functional import entropies, tempered_jsd
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from settings.typed import Places
from teacher.live import check_teachers, mixed_logits, said, teacher_folders
from trainers.batches import Batch
from trainers.own_responses import OwnResponses, OwnResponsesConfig


@dataclass(frozen=True)
class GKDConfig(OwnResponsesConfig):
    """Values of config/loss/gkd.yaml."""

    teacher: Places
    teacher_weights: Any
    mixture: str
    beta: float
    temperature: float
    teacher_temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teachers(self.teacher, self.teacher_weights, self.mixture)
        require(0 <= self.beta <= 1, f"loss.beta={self.beta} must be in [0, 1]")
        require(self.temperature > 0, f"loss.temperature={self.temperature} must be above 0")
        require(self.teacher_temperature > 0, f"loss.teacher_temperature={self.teacher_temperature} must be above 0")


class GKD(OwnResponses):
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

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the teacher, or each of several."""
        return teacher_folders(self.config.teacher)

    def objective(self) -> str:
        """Return the formula with the run's numbers, and the mixture of several teachers."""
        return super().objective() + said(self.config.teacher, self.config.teacher_weights, self.config.mixture)

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
