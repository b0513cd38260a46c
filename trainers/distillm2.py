"""Contrastive skew distillation (DistiLLM-2, arXiv 2503.07067) from a live teacher on pairs of responses.

L = w_t KL(p || alpha p + (1 - alpha) q) on the teacher's response + w_s KL(q || (1 - alpha) p + alpha q) on the
student's, p the teacher, q the policy, means over tokens. chosen is the teacher's response, rejected the student's own:
make them with task=generate. The paper's schedules (alpha by sample, the weights by progress) are not built: both are
constants.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataloader import Example
from engine.metrics import Mean
from forward.chunks import Logits, chunked
from functional import _wide, entropies
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from settings.typed import Place
from teacher.precision import teacher_logits
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, pair_items


@dataclass(frozen=True)
class DistiLLM2Config:
    """Values of config/loss/distillm2.yaml."""

    teacher: Place
    alpha: float
    teacher_weight: float
    student_weight: float

    def __post_init__(self) -> None:
        require(0 <= self.alpha < 1, f"loss.alpha={self.alpha} must be in [0, 1): 0 is the plain KL, 1 no divergence")
        for key in ("teacher_weight", "student_weight"):
            require(getattr(self, key) >= 0, f"loss.{key}={getattr(self, key)} must not be negative")
        require(
            self.teacher_weight + self.student_weight > 0,
            "loss.teacher_weight and loss.student_weight are both 0: nothing would be learned",
        )


def _kl_to_mixture(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Return KL(first || alpha first + (1 - alpha) second) [n] of log-probabilities [n, V]."""
    mixed = second if alpha == 0 else torch.logaddexp(first + math.log(alpha), second + math.log1p(-alpha))
    return (first.exp() * (first - mixed)).sum(-1)


def skew_kl(logits: Logits, teacher_logits: Logits, alpha: float, reverse: bool, chunk: int | None = None) -> Tensor:
    """Return the skew KL of each token [N] from logits [N, V]: KL(p || alpha p + (1 - alpha) q), p the teacher.

    reverse: KL(q || alpha q + (1 - alpha) p).
    """

    def divergence(part: Tensor, other: Tensor) -> Tensor:
        q, p = _wide(part).log_softmax(-1), _wide(other).log_softmax(-1)
        return _kl_to_mixture(q, p, alpha) if reverse else _kl_to_mixture(p, q, alpha)

    return chunked(divergence, logits, (teacher_logits,), chunk, held=6)


class DistiLLM2(BasicTrainer):
    """Unit: tokens, of either response. Slots: chosen (the teacher's), rejected (the student's)."""

    config: DistiLLM2Config
    Config = DistiLLM2Config
    needs = Needs("pairs", teacher="live")
    formula = (
        "{teacher_weight} · mean over tokens of y_w of KL(π_T‖{alpha}π_T + (1−{alpha})π_θ) + {student_weight} · mean "
        "over tokens of y_l of KL(π_θ‖{alpha}π_θ + (1−{alpha})π_T), y_w the teacher's response, y_l the student's"
    )
    source = "2503.07067"

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the teacher."""
        return {"teacher": (self.config.teacher, "lm")}

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take both responses."""
        return pair_items(examples, "distillm2")

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count the tokens of the teacher's responses and of the student's."""
        return {"teacher": batch.num_tokens(0), "student": batch.num_tokens(1)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return both weighted divergences' sums, and the entropy on the student's responses."""
        config, split = self.config, batch.num_tokens(0)
        wanted = teacher_logits(self.frozen_models["teacher"], batch.sequences, self.vocab_size).logits
        forward = skew_kl(out.logits[:split], wanted[:split], config.alpha, reverse=False)
        reverse = skew_kl(out.logits[split:], wanted[split:], config.alpha, reverse=True)
        with torch.no_grad():
            spread = entropies(out.logits[split:]).sum()
        sums = {
            "teacher": config.teacher_weight * forward.sum(),
            "student": config.student_weight * reverse.sum(),
        }
        return sums, {
            "kl/teacher": Mean(forward.detach().sum(), len(forward)),
            "kl/student": Mean(reverse.detach().sum(), len(reverse)),
            "entropy": Mean(spread, len(reverse)),
        }
