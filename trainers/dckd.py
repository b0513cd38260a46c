"""Dual-constrained knowledge distillation (ADPA, arXiv 2502.17927, section 3.1).

L = w_sft NLL(y_w) + w_c KL_w + w_r KL_l; KL = mean over response tokens of KL(pi_dpo || pi_theta) on the teacher's
top k plus one bucket for the rest, from the verified teacher cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dataloader import Example
from engine.metrics import Mean
from functional import gather_logps, token_logps, topk_kl
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from settings.typed import Place
from teacher.lookup import open_cache, stored_entry
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, checked, pair_of


@dataclass(frozen=True)
class DCKDConfig:
    """Values of config/loss/dckd.yaml."""

    teacher_cache: Place
    sft_weight: float
    chosen_weight: float
    rejected_weight: float
    tail: str

    def __post_init__(self) -> None:
        one_of("loss.tail", self.tail, ("bucket", "renormalize", "truncate"))
        for key in ("sft_weight", "chosen_weight", "rejected_weight"):
            require(getattr(self, key) >= 0, f"loss.{key}={getattr(self, key)} must not be negative")
        require(
            self.sft_weight + self.chosen_weight + self.rejected_weight > 0,
            "every weight of loss=dckd is 0: set loss.sft_weight, loss.chosen_weight or loss.rejected_weight",
        )


class DCKD(BasicTrainer):
    """Unit: tokens. Slots: chosen, rejected."""

    config: DCKDConfig
    Config = DCKDConfig
    needs = Needs("pairs", teacher="logprob")
    formula = (
        "{sft_weight} NLL(y_w) + {chosen_weight} KL_w + {rejected_weight} KL_l, KL = mean over response tokens of "
        "KL(π_dpo‖π_θ) "
        "on the teacher's top k (rest: {tail})"
    )
    source = "2502.17927"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take both responses with the teacher's entries.

        A cache is made of one split: held-out rows that it lacks are evaluated by their NLL alone, and that is said.
        """
        reader = open_cache(self.config.teacher_cache, "logprob", self.tokenizer)
        pairs = checked(len(examples), lambda i: Item(pair_of(examples[i], "dckd")))
        if split == "test" and reader.coverage(s.key for item in pairs for s in item.sequences) < 1.0:
            self.processes.print("the teacher cache does not hold the test split: loss/eval is the NLL term alone")
            return pairs

        def item(number: int) -> Item:
            pair = pair_of(examples[number], "dckd")
            return Item(pair, tuple(stored_entry(reader, s) for s in pair))

        return checked(len(examples), item)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count chosen tokens (NLL, KL_w) and rejected tokens (KL_l)."""
        chosen, rejected = batch.num_tokens(0), batch.num_tokens(1)
        if batch.teacher is None:
            return {"nll": chosen, "kl_chosen": 0, "kl_rejected": 0}
        return {"nll": chosen, "kl_chosen": chosen, "kl_rejected": rejected}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the three weighted sums, and the student's mass in the teacher's support."""
        split = batch.num_tokens(0)
        nll = -token_logps(out.logits[:split], out.targets[:split]).sum()
        if batch.teacher is None:  # a filler, or held-out rows without a cache; the graph stays whole
            return {"nll": self.config.sft_weight * nll, "kl_chosen": nll * 0, "kl_rejected": out.logits.sum() * 0}, {}
        ids, values = batch.teacher.ids, batch.teacher.values
        kl = partial(topk_kl, tail=self.config.tail)
        chosen = kl(out.logits[:split], ids[:split], values[:split]).sum()
        rejected = kl(out.logits[split:], ids[split:], values[split:]).sum()
        mass = gather_logps(out.logits.detach(), ids).exp().sum()
        config = self.config
        sums = {
            "nll": config.sft_weight * nll,
            "kl_chosen": config.chosen_weight * chosen,
            "kl_rejected": config.rejected_weight * rejected,
        }
        return sums, {
            "kl/chosen": Mean(chosen.detach(), split),
            "kl/rejected": Mean(rejected.detach(), len(values) - split),
            "nll/chosen": Mean(nll.detach(), split),
            "mass_in_support": Mean(mass, len(values)),
        }
