"""Distribution-aware DPO (daDPO, arXiv 2506.15717): DPO whose policy stays near the reference and near the teacher.

Maximizing E[r] - beta KL(pi || pi_0) - beta_T KL(pi || pi_T) gives the reward r = beta log pi/pi_0 + beta_T log pi/pi_T
up to a constant of the prompt, and with Bradley and Terry's model of preferences L = -log s(r(y_w) - r(y_l)). Chosen
responses are meant to be the teacher's and rejected ones the student's own (task=generate); any pairs will do. The loss
was derived anew from the paper's abstract objective, which names both KLs; its equation 10 has the same two terms in
quotations of it that we saw, not its own text, and we know of no released code. Letters: B pairs, N response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dataloader import Example
from settings.needs import Needs
from settings.schema import require
from settings.typed import Place
from teacher.lookup import open_cache, stored_columns
from trainers.batches import Batch, Item
from trainers.paired import BetaConfig, PairedTrainer, Pairs, humanline, logistic_loss, pairs_of, pairs_with_entries


@dataclass(frozen=True)
class DaDPOConfig(BetaConfig):
    """Values of config/loss/dadpo.yaml."""

    teacher_cache: Place
    teacher_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.teacher_weight >= 0, f"loss.teacher_weight={self.teacher_weight} must not be negative")


class DaDPO(PairedTrainer):
    """Unit: pairs (the NLL term: chosen tokens). Slots: chosen, rejected."""

    config: DaDPOConfig
    Config = DaDPOConfig
    needs = Needs("pairs", reference="logps", teacher="token_logp")
    formula = (
        "mean over pairs of −log σ(r(y_w) − r(y_l)), r(y) = {beta} log π_θ/π_0(y) + {teacher_weight} log π_θ/π_T(y)"
    )
    source = "2506.15717"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take both responses with the teacher's log-probability of each token."""
        readers = (open_cache(self.config.teacher_cache, "token_logp", self.tokenizer),)
        return pairs_with_entries(self, examples, split, readers, lambda side: stored_columns(readers, side, "logps"))

    def pairs(self, logps: Tensor, rows: Tensor, batch: Batch) -> Pairs:
        """Sum token log-probabilities [N]; the ratio is r / beta: to the reference and, weighted, to the teacher."""
        config = self.config
        ratios = humanline(logps - self.reference_logps(batch).to(logps), config)
        if batch.teacher is not None:
            to_teacher = logps - batch.teacher.values[:, 0].to(logps)
            ratios = ratios + config.teacher_weight / config.beta * to_teacher
        return pairs_of(logps, ratios, rows, batch.num_items)

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the loss of each pair [B]."""
        return logistic_loss(self.config.beta * (pairs.chosen_ratio - pairs.rejected_ratio))
