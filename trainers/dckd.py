"""Dual-constrained knowledge distillation (ADPA, arXiv 2502.17927, section 3.1).

L = w_sft NLL(y_w) + w_c KL_w + w_r KL_l; KL = mean over response tokens of KL(pi_dpo || pi_theta) on the teacher's
top k plus one bucket for the rest, from the verified teacher cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dataloader import Example, TopK
from engine.metrics import Mean
from functional import (
    event_kl,
    inside,
    row_sums,
    sorted_distance,
    support_mass,
    tempered_entries,
    token_logps,
    topk_kl,
)
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from teacher.several import CachedTeachers, CachedTeachersConfig
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, checked, pair_of


@dataclass(frozen=True)
class DCKDConfig(CachedTeachersConfig):
    """Values of config/loss/dckd.yaml."""

    sft_weight: float
    chosen_weight: float
    rejected_weight: float
    tail: str
    teacher_temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.tail", self.tail, ("bucket", "renormalize", "truncate"))
        require(
            self.alignment == "ids" or self.tail == "bucket",
            f"loss.tail={self.tail}: a span is one event and its complement, so loss.alignment=bytes needs tail=bucket",
        )
        check_teacher_temperature(self.teacher_temperature, self.tail, self.alignment)
        for key in ("sft_weight", "chosen_weight", "rejected_weight"):
            require(getattr(self, key) >= 0, f"loss.{key}={getattr(self, key)} must not be negative")
        require(
            self.sft_weight + self.chosen_weight + self.rejected_weight > 0,
            "every weight of loss=dckd is 0: set loss.sft_weight, loss.chosen_weight or loss.rejected_weight",
        )


def check_teacher_temperature(temperature: float, tail: str, alignment: str) -> None:
    """Refuse to temper what is not known well enough: a truncated distribution has lost how its rest is shared out."""
    said = f"loss.teacher_temperature={temperature}"
    require(temperature > 0, f"{said} must be above 0")
    if temperature == 1:
        return
    require(
        alignment == "ids",
        f"{said} with loss.alignment=bytes: of a span the cache has one probability, of several tokens. Leave it at 1",
    )
    require(tail != "truncate", f"{said} with loss.tail=truncate: nobody knows the sum to divide by. Use renormalize")
    require(
        temperature < 1 or tail == "renormalize",
        f"{said} with loss.tail=bucket: above 1 the mass outside of the cached entries cannot be bounded. Use "
        "loss.tail=renormalize, which is exact on the entries kept",
    )


class DCKD(BasicTrainer):
    """Unit: tokens (of another tokenizer's teacher aligned spans). Slots: chosen, rejected."""

    config: DCKDConfig
    Config = DCKDConfig
    needs = Needs("pairs", teacher="logprob")
    formula = (
        "{sft_weight} NLL(y_w) + {chosen_weight} KL_w + {rejected_weight} KL_l, KL = mean over response tokens of "
        "KL(π_dpo‖π_θ) "
        "on the teacher's top k (rest: {tail})"
    )
    source = "2502.17927"

    def objective(self) -> str:
        """Return the formula with the run's numbers, who the teachers are, and how another tokenizer's are compared."""
        config, said = self.config, super().objective()
        names = list(config.folders)
        if config.teacher_column is not None:
            said += f"; teacher of a row: its column {config.teacher_column} ({', '.join(names)})"
        elif len(names) > 1:
            shares = ", ".join(f"{share:.3g} {name}" for name, share in config.weights.items())
            said += f"; π_dpo: the mixture of {config.mixture} ({shares})"
        if config.teacher_temperature != 1:
            rest = ", the rest as if made of tokens like the least one kept" if config.tail == "bucket" else ""
            said += f"; π_dpo^(1/{config.teacher_temperature}), normalized on the entries kept{rest}"
        if config.alignment == "bytes":
            kind = {"kl": "KL of matching tokens and of span probabilities", "uld": "distance of sorted probabilities"}
            said += f"; aligned by bytes: the mean is over aligned spans, of the {kind[config.span_loss]}"
        return said

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take both responses with the teachers' entries.

        A cache is made of one split: held-out rows that it lacks are evaluated by their NLL alone, and that is said.
        """
        teachers = CachedTeachers(self.config, "logprob", self.tokenizer, self.settings.model, self.settings.datasets)
        self._check_tail(teachers)
        pairs = checked(len(examples), lambda i: Item(pair_of(examples[i], "dckd")))
        if split == "test" and teachers.coverage(w for e in examples for w in teachers.wanted(e)) < 1.0:
            self.processes.print("the teacher cache does not hold the test split: loss/eval is the NLL term alone")
            return pairs
        if self.config.alignment == "bytes":
            wanted = [w for e in examples for w in teachers.wanted(e)]
            self.processes.print(teachers.report(wanted, map(teachers.entry, wanted)))

        def item(number: int) -> Item:
            example = examples[number]
            return Item(pair_of(example, "dckd"), tuple(map(teachers.stored, teachers.wanted(example))))

        return checked(len(examples), item)

    def _check_tail(self, teachers: CachedTeachers) -> None:
        for reader in teachers.readers.values():
            if self.config.tail == "renormalize" and reader.meta.mass < 1:
                raise ValueError(
                    f"loss.tail=renormalize needs the same number of entries at every token, and {reader.folder} keeps "
                    f"those that hold {reader.meta.mass}: where one holds them its divergence is 0. Make it with "
                    "cache.mass=1, or take loss.tail=bucket"
                )

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count chosen tokens (NLL, KL_w) and rejected tokens (KL_l); of another tokenizer's teacher aligned spans."""
        chosen, rejected = batch.num_tokens(0), batch.num_tokens(1)
        teacher = batch.teacher
        if teacher is None:
            return {"nll": chosen, "kl_chosen": 0, "kl_rejected": 0}
        if teacher.spans is None:
            return {"nll": chosen, "kl_chosen": chosen, "kl_rejected": rejected}
        parts = [_part(teacher, rows) for rows in (slice(0, chosen), slice(chosen, None))]
        spans = [int((part.values > -math.inf).any(-1).sum()) + len(_logps_of(part)) for part in parts]
        return {"nll": chosen, "kl_chosen": spans[0], "kl_rejected": spans[1]}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the three weighted sums, and the student's mass in the teacher's support."""
        split = batch.num_tokens(0)
        nll = -token_logps(out.logits[:split], out.targets[:split]).sum()
        if batch.teacher is None:  # a filler, or held-out rows without a cache; the graph stays whole
            return {"nll": self.config.sft_weight * nll, "kl_chosen": nll * 0, "kl_rejected": out.logits.sum() * 0}, {}
        width, counts = out.logits.shape[-1], self.counts(batch)
        teacher = batch.teacher
        if width < self.vocab_size:  # a head with fewer rows than the tokenizer has ids
            ids, values = inside(teacher.ids, teacher.values, width)
            teacher = teacher._replace(ids=ids, values=values)
        if self.config.teacher_temperature != 1:
            values = tempered_entries(teacher.values, self.config.teacher_temperature, self.config.tail)
            teacher = teacher._replace(values=values)
        halves = (slice(0, split), slice(split, None))
        chosen, rejected = (
            self.divergence(out.logits[rows], out.targets[rows], _part(teacher, rows)) for rows in halves
        )
        mass = support_mass(out.logits.detach(), teacher.ids, teacher.values).sum()
        config = self.config
        sums = {
            "nll": config.sft_weight * nll,
            "kl_chosen": config.chosen_weight * chosen,
            "kl_rejected": config.rejected_weight * rejected,
        }
        return sums, {
            "kl/chosen": Mean(chosen.detach(), counts["kl_chosen"]),
            "kl/rejected": Mean(rejected.detach(), counts["kl_rejected"]),
            "nll/chosen": Mean(nll.detach(), split),
            "mass_in_support": Mean(mass, len(teacher.values)),
        }

    def divergence(self, logits: Tensor, targets: Tensor, teacher: TopK) -> Tensor:
        """Return the sum of the divergences at the tokens of logits [n, V], and of those of spans of several tokens."""
        if self.config.span_loss == "uld":
            return sorted_distance(logits, teacher.values).sum()
        total = topk_kl(logits, teacher.ids, teacher.values, tail=self.config.tail).sum()
        if teacher.spans is None:
            return total
        logps = _logps_of(teacher)
        inside_one = teacher.spans >= 0
        numbers = teacher.spans[inside_one] - (teacher.spans[inside_one].min() if len(logps) else 0)
        own = token_logps(logits, targets)[inside_one]
        return total + event_kl(row_sums(own, numbers, len(logps)), logps).sum()


def _part(teacher: TopK, rows: slice) -> TopK:
    """Return the entries of some of the tokens; spans keep their numbers and their log-probabilities."""
    spans = None if teacher.spans is None else teacher.spans[rows]
    return teacher._replace(ids=teacher.ids[rows], values=teacher.values[rows], spans=spans)


def _logps_of(part: TopK) -> Tensor:
    """Return the teacher's log-probabilities of the spans that a part's tokens are in; a sequence's spans lie together,
    so a slot's are a run of numbers."""
    assert part.spans is not None and part.span_logps is not None
    return part.span_logps[part.spans[part.spans >= 0].unique()]
