"""Alignment as adaptive policy distillation (AlignDistil, arXiv 2503.02832) from a DPO model and a reverse one, live.

The reverse model is DPO's on the pairs with chosen and rejected exchanged. At every token the policy learns the
distribution of the logits z_dpo + alpha_t (z_dpo - z_reverse), alpha_t = extrapolation * sum_a |p_dpo - p_reverse| +
0.001: L = mean over tokens of beta/alpha_t KL(pi_theta || pi*_t), no gradient through alpha_t. Written from the
authors' code, whose two scripts take extrapolation 10 on chosen responses and 15 on the student's own, and which
averages over the tokens of a response before it averages over responses; here every token counts alike. Its sum of
|.| is twice the total variation. Letters: N response tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.metrics import Mean
from forward.chunks import Logits, chunked
from functional import _wide, entropies
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from settings.typed import Place
from teacher.precision import teacher_logits
from trainers.batches import Batch
from trainers.own_responses import OwnResponses, OwnResponsesConfig

LEAST = 1e-3  # of alpha_t: where both models agree it would be 0, and its inverse is a factor


@dataclass(frozen=True)
class AlignDistilConfig(OwnResponsesConfig):
    """Values of config/loss/aligndistil.yaml."""

    teacher: Place
    reverse_teacher: Place
    beta: float
    extrapolation: float
    adaptive: bool
    target_temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("beta", "extrapolation", "target_temperature"):
            require(getattr(self, key) > 0, f"loss.{key}={getattr(self, key)} must be above 0")


def extrapolations(teacher: Tensor, reverse: Tensor, scale: float, adaptive: bool) -> Tensor:
    """Return alpha_t [n] from log-probabilities [n, V] of both models."""
    if not adaptive:
        return torch.full_like(teacher[:, 0], scale)
    return scale * (teacher.exp() - reverse.exp()).abs().sum(-1) + LEAST


def adaptive_divergences(logits: Logits, teacher: Logits, reverse: Logits, config: AlignDistilConfig) -> Tensor:
    """Return beta/alpha_t KL(pi_theta || pi*_t) and alpha_t of each token [N, 2], from three models' logits [N, V]."""

    def of_chunk(part: Tensor, wanted: Tensor, avoided: Tensor) -> Tensor:
        student, plus, minus = (_wide(x).log_softmax(-1) for x in (part, wanted, avoided))
        alpha = extrapolations(plus, minus, config.extrapolation, config.adaptive)
        target = ((plus + alpha[:, None] * (plus - minus)) / config.target_temperature).log_softmax(-1)
        divergence = (student.exp() * (student - target)).sum(-1)
        return torch.stack([config.beta / alpha * divergence, alpha], dim=-1)

    return chunked(of_chunk, logits, (teacher, reverse), None, held=9)


class AlignDistil(OwnResponses):
    """Unit: tokens. Slot: the response."""

    config: AlignDistilConfig
    Config = AlignDistilConfig
    needs = Needs("responses", teacher="live")
    formula = (
        "mean over response tokens of {beta}/α KL(π_θ‖softmax((z + α(z − z₋))/{target_temperature})), z of the DPO "
        "model, z₋ of the reverse one, α = {extrapolation} · Σ_a |p − p₋| + 0.001 (adaptive={adaptive}; else "
        "{extrapolation}); responses: a share {on_policy} the student's own, the rest the data's"
    )
    source = "2503.02832"

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the DPO model and the reverse one."""
        return {"teacher": (self.config.teacher, "lm"), "reverse_teacher": (self.config.reverse_teacher, "lm")}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the divergence's sum, and how far the target was extrapolated."""
        teacher, reverse = (
            teacher_logits(self.frozen_models[name], batch.sequences, self.vocab_size).logits
            for name in ("teacher", "reverse_teacher")
        )
        divergences, alphas = adaptive_divergences(out.logits, teacher, reverse, self.config).unbind(-1)
        tokens, real = len(divergences), batch.supervised(0)
        with torch.no_grad():
            spread = entropies(out.logits).sum()
        return {"divergence": divergences.sum()}, {
            "extrapolation": Mean(alphas.detach().sum(), tokens),
            "entropy": Mean(spread, tokens),
            "response_tokens": Mean(tokens, real.sum()),
        }
