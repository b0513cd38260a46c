"""Dual-constrained knowledge distillation (ADPA, arXiv 2502.17927, section 3.1).

L = w_sft NLL(y_w) + w_c KL_w + w_r KL_l; KL = mean over response tokens of KL(pi_dpo || pi_theta) on the teacher's
top k plus one bucket for the rest, from the verified teacher cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloader import Example, TopK
from engine.metrics import Mean
from forward.chunks import nothing
from functional import row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from teacher.asking import AskedRows
from teacher.entries import (
    Factors,
    distillation_scores,
    event_kl,
    hybrid_distance,
    inside,
    sorted_distance,
    support_mass,
    tempered_entries,
)
from teacher.several import CachedTeachers, CachedTeachersConfig
from tokens.columns import NOTHING
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, Items, asked, pair_items, pair_of


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
    shared: Tensor | None = None  # span_loss=gold: the student's ids that the teacher has [V]
    hybrid_weights: tuple[float, float] | None = None

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
            kind = {
                "kl": "KL of matching tokens and of span probabilities",
                "uld": "distance of sorted probabilities",
                "gold": f"divergence ({config.hybrid_beta}) of matching tokens and distance of the others, sorted, and "
                "KL of span probabilities",
            }
            if self.merges:
                kind["gold"] = kind["gold"].removesuffix(", and KL of span probabilities")
            said += f"; aligned by bytes: the mean is over aligned spans, of the {kind[config.span_loss]}"
            first = "first token, times the probability of those behind it"
            last = "last token, times the probability of those before it"
            parts = {"none": "", "observed": first, "bayesian": last}
            said += f"; a span of several tokens has the distribution of its {parts[config.span_merge]}" * self.merges
        return said

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take both responses with the teachers' entries.

        A cache is made of one split: held-out rows that it lacks tell their NLL alone, and that is said.
        """
        teachers = CachedTeachers(self.config, "logprob", self.tokenizer, self.settings.model, self.settings.datasets)
        self._check_tail(teachers)
        pairs = pair_items(examples, "dckd")
        rows = AskedRows(teachers, examples, self.settings.run.num_proc)
        lacking = rows.lacking()
        if self.config.span_loss == "gold":
            self.shared, self.hybrid_weights = torch.from_numpy(teachers.shared()), teachers.hybrid_weights()
        if split == "test" and rows.coverage(lacking) < 1.0:
            self.processes.print(
                "the teacher cache lacks rows of the test split: it tells nll_eval/chosen, no loss/eval"
            )
            self.held_out_in_part = True
            return pairs

        def item(number: int) -> Item:
            example = examples[number]
            return Item(pair_of(example, "dckd"), tuple(map(teachers.stored, rows.wanted(number, example))))

        for number in np.flatnonzero(lacking.any(axis=1)).tolist():
            item(number)  # says what the caches have in its place
        if self.config.alignment == "bytes":
            self.processes.print(rows.report())
        assert pairs.columns is not None
        who = rows.identity()
        behind = NOTHING + asked([who(0)] * 2) if rows.who is None else lambda i: NOTHING + asked([who(i)] * 2)
        return Items(len(examples), item, pairs.columns.having(behind))

    @property
    def merges(self) -> bool:
        """Tell whether spans of several tokens are merged into one distribution."""
        return self.config.span_merge != "none"

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
        events = [0 if self.merges else len(_logps_of(part)) for part in parts]  # a merged span is its one distribution
        spans = [int((part.values > -math.inf).any(-1).sum()) + more for part, more in zip(parts, events, strict=True)]
        return {"nll": chosen, "kl_chosen": spans[0], "kl_rejected": spans[1]}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the three weighted sums, and the student's mass in the teacher's support."""
        split, config = batch.num_tokens(0), self.config
        if batch.teacher is None:  # a filler, or held-out rows without a cache; the graph stays whole
            nll = -token_logps(out.logits[:split], out.targets[:split]).sum()
            sums = {"nll": config.sft_weight * nll, "kl_chosen": nll * 0, "kl_rejected": nothing(out.logits)}
            return sums, {"nll/chosen": Mean(nll.detach(), split)}
        counts, teacher = self.counts(batch), self._known(batch.teacher, out.logits.shape[-1])
        logps, divergences, mass = self.scores(out, teacher)
        nll = -logps[:split].sum()
        chosen, rejected = (
            divergences[rows].sum() + self._of_spans(logps[rows], _part(teacher, rows))
            for rows in (slice(0, split), slice(split, None))
        )
        sums = {
            "nll": config.sft_weight * nll,
            "kl_chosen": config.chosen_weight * chosen,
            "kl_rejected": config.rejected_weight * rejected,
        }
        return sums, {
            "kl/chosen": Mean(chosen.detach(), counts["kl_chosen"]),
            "kl/rejected": Mean(rejected.detach(), counts["kl_rejected"]),
            "nll/chosen": Mean(nll.detach(), split),
            "mass_in_support": Mean(mass.sum(), len(teacher.values)),
        }

    def _known(self, teacher: TopK, width: int) -> TopK:
        """Return the teacher's entries at its temperature, of ids that a head of `width` rows has."""
        if width < self.vocab_size:  # a head with fewer rows than the tokenizer has ids
            ids, values = inside(teacher.ids, teacher.values, width)
            teacher = teacher._replace(ids=ids, values=values)
        if self.config.teacher_temperature != 1:
            values = tempered_entries(teacher.values, self.config.teacher_temperature, self.config.tail)
            teacher = teacher._replace(values=values)
        return teacher

    def scores(self, out: ResponseLogits, teacher: TopK) -> tuple[Tensor, Tensor, Tensor]:
        """Return of each response token [N] its log-probability, its divergence, and the mass in the support."""
        config, logits = self.config, out.logits
        if config.span_loss == "kl":
            found = distillation_scores(logits, out.targets, teacher.ids, teacher.values, config.tail)
            logps, divergences, mass = found.unbind(-1)
            return logps, divergences, mass.detach()
        logps = token_logps(logits, out.targets)
        factors = factors_of(logps, teacher, config.span_merge) if self.merges else None
        if config.span_loss == "uld":
            divergences = sorted_distance(logits, teacher.values, factors=factors)
        else:
            weights = config.hybrid_weights or self.hybrid_weights
            assert weights is not None, "items() knows how many of the teacher's ids match"
            entries = teacher.ids, teacher.values, self.shared
            divergences = hybrid_distance(logits, *entries, config.hybrid_beta, weights, factors=factors)
        lacking = teacher.ids < 0  # span_loss=gold: tokens that the student has not
        held = teacher.ids.clamp_min(0), teacher.values.masked_fill(lacking, -math.inf)
        return logps, divergences, support_mass(logits.detach(), *held)

    def _of_spans(self, logps: Tensor, teacher: TopK) -> Tensor:
        """Return the sum of the divergences of spans of several tokens, from log-probabilities [n] of the tokens."""
        if teacher.spans is None or self.config.span_loss == "uld" or self.merges:
            return logps.new_zeros(())
        wanted = _logps_of(teacher)
        inside_one = teacher.spans >= 0
        numbers = teacher.spans[inside_one] - (teacher.spans[inside_one].min() if len(wanted) else 0)
        return event_kl(row_sums(logps[inside_one], numbers, len(wanted)), wanted).sum()


def factors_of(logps: Tensor, teacher: TopK, merge: str) -> Factors:
    """Return what multiplies the distributions at each token [N] of spans that are merged at their first token
    (observed) or their last (bayesian): the probability of the span's other tokens, of which logps [N] are the
    student's. Spans lie one after the other, and each token is in one at most.
    """
    assert teacher.spans is not None and teacher.span_logps is not None
    places = (teacher.spans >= 0).nonzero().squeeze(-1)
    numbers, sums = teacher.spans[places].unique_consecutive(return_inverse=True)
    ends = torch.ones_like(sums, dtype=torch.bool)
    if merge == "observed":
        ends[1:] = sums[1:] != sums[:-1]
    else:
        ends[:-1] = sums[1:] != sums[:-1]
    bases = places[ends]
    others = row_sums(logps[places], sums, len(numbers)) - logps[bases]
    zeros = torch.zeros_like(logps)
    theirs = zeros.detach().index_copy(0, bases, teacher.span_logps[numbers].to(logps.dtype))
    return Factors(zeros.index_copy(0, bases, others), theirs)


def _part(teacher: TopK, rows: slice) -> TopK:
    """Return the entries of some of the tokens; spans keep their numbers and their log-probabilities."""
    spans = None if teacher.spans is None else teacher.spans[rows]
    return teacher._replace(ids=teacher.ids[rows], values=teacher.values[rows], spans=spans)


def _logps_of(part: TopK) -> Tensor:
    """Return the teacher's log-probabilities of the spans that a part's tokens are in; a sequence's spans lie together,
    so a slot's are a run of numbers."""
    assert part.spans is not None and part.span_logps is not None
    return part.span_logps[part.spans[part.spans >= 0].unique()]
