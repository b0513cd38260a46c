"""Generalized on-policy distillation (G-OPD, arXiv 2602.12125): the reward of a teacher against a reference teacher.

Maximize E[lambda log pi_T / pi_ref] - KL(pi_theta || pi_ref) on the policy's own responses. A sampled token's reward
is lambda (log pi_T - log pi_ref) - (log pi_theta - log pi_ref): loss=opd with lambda log pi_T + (1 - lambda) log pi_ref
in the place of the teacher's log-probability. lambda = 1 is loss=opd; above 1 the policy goes beyond the teacher. Of
whole distributions loss=adpa with loss.objective=regularized and loss.kl_weight=1/lambda has the same optimum.
"""

from dataclasses import dataclass

from torch import Tensor

from settings.schema import require
from settings.typed import Place
from teacher.precision import teacher_logits
from trainers.batches import Batch
from trainers.opd import OPD, OPDConfig


@dataclass(frozen=True)
class GOPDConfig(OPDConfig):
    """Values of config/loss/gopd.yaml."""

    reference_teacher: Place
    reward_scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reward_scale >= 0, f"loss.reward_scale={self.reward_scale} must not be negative")
        require(
            self.alignment == "ids",
            f"loss.alignment={self.alignment}: loss=gopd compares two teachers at the student's own token ids",
        )


def scaled_logps(teacher: Tensor, reference: Tensor, scale: float) -> Tensor:
    """Return lambda log pi_T + (1 - lambda) log pi_ref of each token [N]; the reward is this less log pi_theta."""
    return scale * teacher + (1.0 - scale) * reference


class GOPD(OPD):
    """Unit: tokens. Slot: the student's response."""

    config: GOPDConfig
    Config = GOPDConfig
    formula = (
        "mean over tokens of the student's responses of max(−Aρ, −A·clip(ρ, 1 ± {clip})), ρ = π_θ/π_old, "
        "A_t = Σ_s≥t {discount}^(s−t) [{reward_scale} log π_T/π_ref − log π_old/π_ref](y_s)"
    )
    source = "2602.12125"

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the teacher and the model that it started from."""
        return {**super().frozen_model_folders(), "reference_teacher": (self.config.reference_teacher, "lm")}

    def teacher_logps(self, batch: Batch) -> Tensor:
        """Return the scaled teachers' log-probability of each sampled token [N]."""
        model = self.frozen_models["reference_teacher"]
        reference = self.tempered_logps(teacher_logits(model, batch.sequences, self.vocab_size))
        return scaled_logps(super().teacher_logps(batch), reference, self.config.reward_scale)
