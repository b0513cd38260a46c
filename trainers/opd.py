"""On-policy distillation by policy gradient: a sampled token's reward is log pi_teacher - log pi_student.

Its expectation is minus the reverse KL of MiniLLM (arXiv 2306.08543) and on-policy distillation (2306.13649); with a
discount the later tokens' rewards count, too. One number a token is asked of the teacher, where loss=gkd needs its
whole distribution.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.metrics import Mean
from functional import entropies, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from settings.typed import Place
from teacher.precision import teacher_logits
from trainers.batches import Batch, Item
from trainers.policy_gradient import by_row, clipped_losses, discounted_sums
from trainers.rollouts import RolloutConfig, RolloutTrainer


@dataclass(frozen=True)
class OPDConfig(RolloutConfig):
    """Values of config/loss/opd.yaml."""

    teacher: Place
    discount: float
    clip: float
    is_online = True  # what Rollouts asks: every response is the student's, and nobody else scores it
    has_rewards = False
    verifier = None
    reward_model = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.discount <= 1, f"loss.discount={self.discount} must be in [0, 1]")
        require(0 < self.clip < 1, f"loss.clip={self.clip} must be in (0, 1)")


def distillation_advantages(logps: Tensor, teacher_logps: Tensor, discount: float) -> Tensor:
    """Return sum_{s >= t} discount^(s - t) (log pi_teacher - log pi_student) of the sampled tokens [B, T]; 0 where both
    are.
    """
    return discounted_sums(teacher_logps - logps, discount)


class OPD(RolloutTrainer):
    """Unit: tokens. Slot: the student's response."""

    VERSION = 2
    config: OPDConfig
    Config = OPDConfig
    needs = Needs("prompts", teacher="live")
    formula = (
        "mean over tokens of the student's responses of max(−Aρ, −A·clip(ρ, 1 ± {clip})), ρ = π_θ/π_old, "
        "A_t = Σ_s≥t {discount}^(s−t) log π_teacher/π_old(y_s)"
    )
    source = "2306.08543, 2306.13649"

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the teacher."""
        return {"teacher": (self.config.teacher, "lm")}

    def noted(self, items: list[Item]) -> list[Item]:
        """Return the items with their notes [n, 2]."""
        batch = self.batch_of(items)
        response = batch.sequences.response
        asked = teacher_logits(self.frozen_models["teacher"], batch.sequences, self.vocab_size)
        logps = self.token_logps_of(self.policy, batch.sequences), token_logps(asked.logits, asked.targets)
        own, teacher = (by_row(values.float(), response) for values in logps)
        notes = torch.stack([own, distillation_advantages(own, teacher, self.config.discount)], dim=-1).cpu().numpy()
        lengths = response.sum(dim=1).tolist()
        return [
            item._replace(notes=np.ascontiguousarray(notes[i, :length]))
            for i, (item, length) in enumerate(zip(items, lengths, strict=True))
        ]

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens."""
        return {"policy": batch.num_tokens(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the loss sum, and the sampled reverse KL."""
        assert batch.notes is not None
        logps = token_logps(out.logits, out.targets)
        old, advantages = batch.notes.to(logps).unbind(dim=1)
        log_ratios = logps - old
        tokens, real = len(logps), batch.supervised(0)
        with torch.no_grad():
            outside, spread = ((log_ratios.exp() - 1).abs() > self.config.clip).sum(), entropies(out.logits).sum()
        return {"policy": clipped_losses(log_ratios, advantages, self.config.clip).sum()}, {
            "advantage": Mean(advantages.sum(), tokens),  # with discount 0: minus the sampled reverse KL
            "clipped": Mean(outside, tokens),
            "entropy": Mean(spread, tokens),
            "response_tokens": Mean(tokens, real.sum()),
        }
