"""Online ADPA: the regularized advantage (loss=adpa, 2502.17927; 2602.12125) on the policy's newest responses, live.

The policy answers rollout_batches batches of prompts as it stands, learns rollout_epochs times from them, and answers
anew. J = E_pi[A] - tau KL(pi || b) at every token, over the whole vocabulary: A = log pi_dpo - log pi_ref of two live
teachers, nothing is cut to a top k and nothing imputed. With a target temperature T the optimum is (b
exp(A/tau))^(1/T). The gradient is exact; none goes through the sampling. objective=expected is not offered: without
an NLL on chosen responses it collapses, and prompts alone have none. loss=gopd is the policy gradient of the same
objective with b of the reference teacher. Letters: N response tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.metrics import Mean
from forward.chunks import Logits, chunked
from functional import _wide
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from settings.typed import Place
from teacher.precision import teacher_logits
from trainers.batches import Batch, Item
from trainers.regularized_advantage import BASES
from trainers.rollouts import RolloutTrainer, UnscoredConfig


@dataclass(frozen=True)
class OnlineADPAConfig(UnscoredConfig):
    """Values of config/loss/online-adpa.yaml."""

    teacher: Place
    reference_teacher: Place
    kl_weight: float
    kl_reference: str
    target_temperature: float
    advantage_floor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.kl_reference", self.kl_reference, BASES)
        for key in ("kl_weight", "target_temperature"):
            require(getattr(self, key) > 0, f"loss.{key}={getattr(self, key)} must be above 0")
        require(0 <= self.advantage_floor < 1, f"loss.advantage_floor={self.advantage_floor} must be in [0, 1)")


def regularized_everywhere(
    logits: Logits, teacher: Logits, reference: Logits, start: Logits | None, config: OnlineADPAConfig
) -> Tensor:
    """Return J of each token and, without gradient, E_pi[A], KL(pi || pi*), KL(pi || b), entropy: [N, 5].

    All logits are [N, V]; start's are given where it is the base.
    """

    def of_chunk(part: Tensor, aligned: Tensor, before: Tensor, *first: Tensor) -> Tensor:
        """Return objective and figures [n, 5] of chunks of logits [n, V]: policy, both teachers, maybe the start."""
        own, dpo, ref = (_wide(x).log_softmax(-1) for x in (part, aligned, before))
        advantage = dpo - ref
        absurd = (dpo.exp() < config.advantage_floor) & (advantage > 0)
        advantage = advantage.masked_fill(absurd, 0.0)
        base = {"teacher": dpo, "reference_teacher": ref}.get(config.kl_reference)
        base = _wide(first[0]).log_softmax(-1) if base is None else base
        scale, p = config.kl_weight * config.target_temperature, own.exp()
        score = advantage + config.kl_weight * base
        objective = (p * (score - scale * own)).sum(-1)
        with torch.no_grad():
            figures = [
                (p * advantage).sum(-1),
                (score / scale).logsumexp(-1) - objective / scale,
                (p * (own - base)).sum(-1),
                -(p * own).sum(-1),
            ]
        return torch.stack([objective, *figures], dim=1)

    others = (teacher, reference) if start is None else (teacher, reference, start)
    return chunked(of_chunk, logits, others, None, held=12)


class OnlineADPA(RolloutTrainer):
    """Unit: tokens. Slot: the policy's response."""

    config: OnlineADPAConfig
    Config: ClassVar[type] = OnlineADPAConfig
    needs = Needs("prompts", reference="distributions", teacher="live", reference_if=(("kl_reference", "start"),))
    formula = (
        "−mean over tokens of the policy's responses of E_π[A + {kl_weight} log b] + {kl_weight}·{target_temperature} "
        "H(π), whose optimum is (b exp(A/{kl_weight}))^(1/{target_temperature}), b of the {kl_reference}, A = log "
        "π_dpo/π_ref, positive A dropped where π_dpo(a) < {advantage_floor}; answered anew every {rollout_batches} × "
        "{rollout_epochs} steps"
    )
    source = "2502.17927, 2602.12125"

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the aligned teacher and the model that it started from."""
        return {"teacher": (self.config.teacher, "lm"), "reference_teacher": (self.config.reference_teacher, "lm")}

    def noted(self, items: list[Item]) -> list[Item]:
        """Return the items as they are: the teachers are asked when a step learns from them."""
        return items

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens."""
        return {"advantage": batch.num_tokens(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the objective's negative sum, and what tells a collapse."""
        teacher, reference = (
            teacher_logits(self.frozen_models[name], batch.sequences, self.vocab_size).logits
            for name in ("teacher", "reference_teacher")
        )
        start = self.reference_logits(batch) if self.needs.reference else None
        found = regularized_everywhere(out.logits, teacher, reference, start, self.config)
        objective, *figures = found.unbind(-1)
        names = ("advantage", "kl/target", "kl/base", "entropy")
        tokens, real = len(found), batch.supervised(0)
        return {"advantage": -objective.sum()}, {
            **{name: Mean(values.detach().sum(), tokens) for name, values in zip(names, figures, strict=True)},
            "response_tokens": Mean(tokens, real.sum()),
        }
