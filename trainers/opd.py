"""On-policy distillation by policy gradient: a sampled token's reward is log pi_teacher - log pi_student.

Its expectation is minus the reverse KL of MiniLLM (arXiv 2306.08543) and on-policy distillation (2306.13649); with a
discount the later tokens' rewards count, too. One number a token is asked of the teacher, where loss=gkd needs its
whole distribution. Its relatives: loss=iw-opd weighs tokens by the drift before them, loss=gopd scales the reward
against a reference teacher.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dataloader import Tokens, collate
from engine.metrics import Mean
from functional import entropies, tempered_token_logps, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from settings.typed import Place, Places
from teacher.alignment import Span, side_of
from teacher.live import check_teachers, mixed_logits, said, teacher_folders
from teacher.precision import teacher_logits
from teacher.spans import Aligned, Translation, aligned, check_coverage, response_ids, translation
from tokens.encoding import fit_prompt
from trainers.batches import Batch, Item
from trainers.policy_gradient import by_row, clipped_losses, discounted_sums
from trainers.rollouts import Micros, RolloutTrainer, UnscoredConfig, sampled_logps


@dataclass(frozen=True)
class OPDConfig(UnscoredConfig):
    """Values of config/loss/opd.yaml."""

    teacher: Places
    teacher_weights: Any
    mixture: str
    alignment: str
    min_coverage: float
    discount: float
    clip: float
    teacher_temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teachers(self.teacher, self.teacher_weights, self.mixture)
        require(
            self.alignment == "ids" or isinstance(self.teacher, str),
            f"loss.alignment=bytes asks one teacher, loss.teacher={self.teacher} names several: take alignment=ids",
        )
        one_of("loss.alignment", self.alignment, ("ids", "bytes"))
        require(0 <= self.min_coverage <= 1, f"loss.min_coverage={self.min_coverage} must be in [0, 1]")
        require(0 <= self.discount <= 1, f"loss.discount={self.discount} must be in [0, 1]")
        require(self.teacher_temperature > 0, f"loss.teacher_temperature={self.teacher_temperature} must be above 0")
        require(0 < self.clip < 1, f"loss.clip={self.clip} must be in (0, 1)")


def distillation_advantages(logps: Tensor, teacher_logps: Tensor, discount: float) -> Tensor:
    """Return sum_{s >= t} discount^(s - t) (log pi_teacher - log pi_student) of the sampled tokens [B, T]; 0 where both
    are.
    """
    return discounted_sums(teacher_logps - logps, discount)


def span_advantages(logps: np.ndarray, teacher_logps: np.ndarray, spans: Sequence[Span], discount: float) -> np.ndarray:
    """Return the advantage of each token [L] where teacher_logps [M] are of another tokenizer's tokens of the text.

    A span is one action: its reward, the difference of both models' log-probabilities of its text, goes to each of its
    tokens, and the discount counts spans. Tokens in no span have nobody's opinion: their own reward is 0, and so is
    their advantage.
    """
    found, later = np.zeros(len(logps), logps.dtype), 0.0
    for span in reversed(spans):
        own = logps[span.start : span.end].sum()
        later = teacher_logps[span.their_start : span.their_end].sum() - own + discount * later
        found[span.start : span.end] = later
    return found


class OPD(RolloutTrainer):
    """Unit: tokens. Slot: the student's response."""

    VERSION = 2
    config: OPDConfig
    Config: ClassVar[type] = OPDConfig
    needs = Needs("prompts", teacher="live")
    formula = (
        "mean over tokens of the student's responses of max(−Aρ, −A·clip(ρ, 1 ± {clip})), ρ = π_θ/π_old, "
        "A_t = Σ_s≥t {discount}^(s−t) log π_teacher/π_old(y_s)"
    )
    source = "2306.08543, 2306.13649"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.aligns_bytes = self.config.alignment == "bytes"

    def objective(self) -> str:
        """Return the formula with the run's numbers, and how another tokenizer's teacher is asked."""
        by_bytes = "; y_s are spans of text that both tokenizers have, each token of one gets its reward"
        mixed = said(self.config.teacher, self.config.teacher_weights, self.config.mixture)
        sharp = self.config.teacher_temperature
        tempered = f"; the teacher's logits are divided by {sharp}" if sharp != 1 else ""
        return super().objective() + mixed + tempered + (by_bytes if self.aligns_bytes else "")

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the teacher, or each of several."""
        return teacher_folders(self.config.teacher)

    def rollout(self, micros: Micros, step: int) -> Micros:
        """Know whose prompts are answered: the conversations of another tokenizer's teacher are theirs."""
        self.split = "train" if step else "test"
        return super().rollout(micros, step)

    def noted(self, items: list[Item]) -> list[Item]:
        """Return the items with their notes [n, 2]: old log-probability and advantage; by bytes also 1 in a span."""
        if self.aligns_bytes:
            return self._noted_by_bytes(items)
        batch = self.batch_of(items)
        response = batch.sequences.response
        logps = self.token_logps_of(self.policy, batch.sequences).float()
        flat = logps, self.teacher_logps(batch).float(), sampled_logps(items, logps)
        own, teacher, old = (by_row(values, response) for values in flat)
        notes = torch.stack([old, self.advantages(own, teacher)], dim=-1).cpu().numpy()
        lengths = response.sum(dim=1).tolist()
        return [
            item._replace(notes=np.ascontiguousarray(notes[i, :length]))
            for i, (item, length) in enumerate(zip(items, lengths, strict=True))
        ]

    def advantages(self, own: Tensor, teacher: Tensor) -> Tensor:
        """Return the advantages of rows [B, T] of both models' log-probabilities, 0 behind a response."""
        return distillation_advantages(own, teacher, self.config.discount)

    def teacher_logps(self, batch: Batch) -> Tensor:
        """Return the teacher's log-probability of each sampled token [N]."""
        config = self.config
        who = config.teacher, config.teacher_weights, config.mixture
        return self.tempered_logps(mixed_logits(self.frozen_models, batch.sequences, self.vocab_size, *who))

    def tempered_logps(self, asked: ResponseLogits) -> Tensor:
        """Return a teacher's log-probability of each sampled token [N], at loss.teacher_temperature."""
        return tempered_token_logps(asked.logits, asked.targets, self.config.teacher_temperature)

    def _noted_by_bytes(self, items: list[Item]) -> list[Item]:
        teacher, tokenizer = self.frozen_models["teacher"], self.frozen_tokenizers["teacher"]
        between, batch = translation(self.tokenizer, tokenizer), self.batch_of(items)
        asked, found = zip(*(self._asked(item, tokenizer, between) for item in items), strict=True)
        check_coverage(found, self.config.min_coverage)
        sequences = collate(asked, tokenizer.pad_token_id).to(batch.sequences.ids.device)
        out = teacher_logits(teacher, sequences, len(tokenizer))
        own = self.token_logps_of(self.policy, batch.sequences)
        flat = self.tempered_logps(out), own, sampled_logps(items, own)
        supervised = batch.sequences.response.sum(dim=1).tolist()
        lengths = [sum(tokens.response) for tokens in asked], supervised, supervised
        parts = ([part.numpy() for part in f.float().cpu().split(n)] for f, n in zip(flat, lengths, strict=True))
        rows = zip(items, *parts, found, strict=True)
        return [item._replace(notes=self._notes(*logps)) for item, *logps in rows]

    def _notes(self, theirs: np.ndarray, own: np.ndarray, old: np.ndarray, found: Aligned) -> np.ndarray:
        within = np.zeros(len(own), np.float32)
        for span in found.spans:
            within[span.start : span.end] = 1
        return np.stack([old, span_advantages(own, theirs, found.spans, self.config.discount), within], axis=1)

    def _asked(self, item: Item, tokenizer: Any, between: Translation) -> tuple[Tokens, Aligned]:
        """Return the item's conversation in the teacher's tokens, and how the response's are aligned."""
        ids = response_ids(item.sequences[0])
        if not ids:  # a filler
            return Tokens([tokenizer.eos_token_id] * 2, [False] * 2), aligned(between, [], [])
        side = side_of(ids, between.pieces, between.end)
        text = side.text.decode(errors="replace")  # what is no character ends the common text
        theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs += [between.their_end] if side.ended and between.their_end is not None else []
        messages = self.rollouts.examples[self.split][item.source].conversation.prompt
        _, prompt = fit_prompt(tokenizer, messages, self.model_config.max_prompt_length, Counter())
        return Tokens(prompt + theirs, [False] * len(prompt) + [True] * len(theirs)), aligned(between, ids, theirs)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens."""
        return {"policy": batch.num_tokens(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the loss sum, and the sampled reverse KL."""
        assert batch.notes is not None
        logps = token_logps(out.logits, out.targets)
        old, advantages, *within = batch.notes.to(logps).unbind(dim=1)
        log_ratios = logps - old
        tokens, real = len(logps), batch.supervised(0)
        with torch.no_grad():
            outside, spread = ((log_ratios.exp() - 1).abs() > self.config.clip).sum(), entropies(out.logits).sum()
        metrics = {"coverage": Mean(within[0].sum(), tokens)} if within else {}
        return {"policy": clipped_losses(log_ratios, advantages, self.config.clip).sum()}, {
            "advantage": Mean(advantages.sum(), tokens),  # with discount 0: minus the sampled reverse KL
            "clipped": Mean(outside, tokens),
            "entropy": Mean(spread, tokens),
            "response_tokens": Mean(tokens, real.sum()),
            **metrics,
        }


@dataclass(frozen=True)
class IWOPDConfig(OPDConfig):
    """Values of config/loss/iw-opd.yaml."""

    amplification: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.amplification >= 0, f"loss.amplification={self.amplification} must not be negative")
        require(
            self.alignment == "ids",
            f"loss.alignment={self.alignment}: loss=iw-opd weighs a token by those before it, of one tokenizer. "
            "Use loss=opd",
        )
        require(
            self.discount == 0,
            f"loss.discount={self.discount}: loss=iw-opd weighs each token's own advantage. Leave it at 0, or "
            "use loss=opd",
        )


def prefix_weights(advantages: Tensor, amplification: float, epsilon: float = 1e-8) -> Tensor:
    """Return 1 + gamma (1 - share of sum |A| that lies before t) of rows [B, T]; zeros behind a row change nothing."""
    size = advantages.abs()
    before = size.cumsum(dim=1) - size
    return 1.0 + amplification * (1.0 - before / size.sum(dim=1, keepdim=True).clamp_min(epsilon))


class IWOPD(OPD):
    """Importance-weighted on-policy distillation (2606.22600): early tokens count more where a prefix drifts.

    A token's advantage is multiplied by w_t = 1 + gamma (1 - sum_{s<t} |A_s| / sum_s |A_s|): 1 + gamma at the first,
    toward 1 as the disagreement is used up. No gradient goes through w. The weights are those of TRL's trainer, whose
    golden numbers hold; the clipped ratio is that of loss=opd. Unit: tokens. Slot: the student's response.
    """

    config: IWOPDConfig
    Config = IWOPDConfig
    formula = (
        "mean over tokens of the student's responses of max(−wAρ, −wA·clip(ρ, 1 ± {clip})), ρ = π_θ/π_old, "
        "A_t = log π_teacher/π_old(y_t), w_t = 1 + {amplification}(1 − Σ_s<t |A_s| / Σ_s |A_s|)"
    )
    source = "2606.22600"

    def advantages(self, own: Tensor, teacher: Tensor) -> Tensor:
        """Return the weighted advantages of rows [B, T]."""
        with torch.no_grad():
            plain = distillation_advantages(own, teacher, 0.0)
            return prefix_weights(plain, self.config.amplification) * plain


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
    """Generalized on-policy distillation (2602.12125): maximize E[lambda log pi_T / pi_ref] - KL(pi_theta || pi_ref).

    A sampled token's reward is lambda (log pi_T - log pi_ref) - (log pi_theta - log pi_ref): that of loss=opd with
    lambda log pi_T + (1 - lambda) log pi_ref for a teacher. lambda = 1 is loss=opd, above 1 the policy goes beyond the
    teacher. loss=adpa loss.objective=regularized loss.kl_weight=1/lambda has the same optimum.
    Unit: tokens. Slot: the student's response.
    """

    config: GOPDConfig
    Config = GOPDConfig
    formula = (
        "mean over tokens of the student's responses of max(−Aρ, −A·clip(ρ, 1 ± {clip})), ρ = π_θ/π_old, "
        "A_t = Σ_s≥t {discount}^(s−t) ({reward_scale} log π_T/π_ref − log π_old/π_ref)(y_s)"
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
