"""Teacher value-based knowledge distillation (TVKD, arXiv 2509.16965): DPO with a shaping by the teacher's values.

V(s_t) is the teacher's value of the state before token t. form=shaped: L = -log s(beta (u - v) + psi_w - psi_l), psi(y)
= sum_t [gamma V(s_{t+1}) - V(s_t)], which carries no gradient: what the teacher already tells apart weighs less. Sums
telescope at gamma = 1; with a potential of 0 behind the last token (as shaping has it) psi would then be -V of the
prompt, the same on both sides. The paper leaves this open; here the last transition is left out. form=released is what
its authors' code minimizes: -log s(R_w - R_l), R(y) = sum_t [log pi_theta(y_t) - gamma V(s_{t+1})], without a reference
or a beta. Letters: B pairs, N response tokens of a batch, K entries, E = K + 1 events.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataloader import Example, Tokens, TopK
from engine.metrics import Mean
from forward.chunks import Logits
from functional import gather_logps, row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from settings.typed import Place
from teacher.entries import inside
from teacher.lookup import Stored, open_cache, stored_columns, stored_entry
from trainers.batches import Batch, Item
from trainers.paired import BetaConfig, PairedTrainer, logistic_loss, pairs_with_entries

VALUES = ("logits", "lse", "max", "margin", "student_entropy", "student_expectation")
OF_STUDENT = ("student_entropy", "student_expectation")


@dataclass(frozen=True)
class TVKDConfig(BetaConfig):
    """Values of config/loss/tvkd.yaml."""

    teacher_cache: Place
    form: str
    value: str
    shaping_weight: float
    student_weight: float
    value_temperature: float
    discount: float

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.form", self.form, ("shaped", "released"))
        one_of("loss.value", self.value, VALUES)
        require(0 <= self.discount <= 1, f"loss.discount={self.discount} must be in [0, 1]")
        require(self.value_temperature > 0, f"loss.value_temperature={self.value_temperature} must be above 0")
        require(
            self.student_weight == 0 or self.value == "lse",
            f"loss.student_weight={self.student_weight} is a part of loss.value=lse, not of {self.value}",
        )
        require(
            self.form == "released" or not (self.student_weight or self.value in OF_STUDENT),
            f"loss.form=shaped with loss.value={self.value}, loss.student_weight={self.student_weight}: a potential "
            "must not move with the policy. Take values of the teacher, or loss.form=released",
        )


def with_rest(logps: Tensor) -> Tensor:
    """Return log-probabilities [N, K] with that of the rest behind [N, E]; -inf entries hold nothing."""
    rest = (1.0 - logps.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(logps.dtype).eps)
    return torch.cat([logps, rest.log()], dim=-1)


def event_values(
    kind: str, teacher: Tensor, student: Tensor, weight: float, student_weight: float, temperature: float
) -> Tensor:
    """Return the value of each state [N], of log-probabilities [N, E] of the same events.

    lse: T logsumexp((weight log pi_T + student_weight log pi_theta) / T); max and margin (largest less second): of
    weight log pi_T. student_entropy, student_expectation: the student's entropy and its negative, with gradient, which
    the authors' code calls a value (its default is the entropy).
    """
    if kind == "lse":
        mixed = weight * teacher + (student_weight * student if student_weight else 0.0)
        return temperature * (mixed / temperature).logsumexp(-1)
    if kind in ("max", "margin"):
        top = weight * teacher.topk(2, dim=-1).values
        return top[:, 0] if kind == "max" else top[:, 0] - top[:, 1]
    expectation = torch.where(student == -torch.inf, 0.0, student.exp() * student).sum(-1)
    return expectation if kind == "student_expectation" else -expectation


def next_values(values: Tensor, rows: Tensor, terminal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return V(s_{t+1}) of each token [N] and which is its row's last; behind it is 0, or terminal [rows]."""
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    behind = torch.zeros_like(values) if terminal is None else terminal[rows]
    return torch.where(last, behind, values.roll(-1)), last


def potentials(values: Tensor, rows: Tensor, size: int, discount: float) -> Tensor:
    """Return sum_t [gamma V(s_{t+1}) - V(s_t)] of each row [size], the last token's transition left out."""
    following, last = next_values(values, rows)
    return row_sums(torch.where(last, 0.0, discount * following - values), rows, size)


def value_rewards(
    logps: Tensor, values: Tensor, rows: Tensor, size: int, discount: float, terminal: Tensor | None = None
) -> Tensor:
    """Return sum_t [log pi(y_t) - gamma V(s_{t+1})] of each row [size]."""
    return row_sums(logps - discount * next_values(values, rows, terminal)[0], rows, size)


class TVKD(PairedTrainer):
    """Unit: pairs (the NLL term: chosen tokens). Slots: chosen, rejected."""

    config: TVKDConfig
    Config = TVKDConfig
    needs = Needs("pairs", reference="logps", teacher="value", reference_if=(("form", "shaped"),))
    formula = (
        "mean over pairs of −log σ({beta}(u − v) + ψ_w − ψ_l), ψ(y) = Σ_t [{discount} V(s_t+1) − V(s_t)] without the "
        "last token's, V = {shaping_weight} · {value} of the teacher"
    )
    released_formula = (
        "mean over pairs of −log σ(R_w − R_l), R(y) = Σ_t [log π_θ(y_t|s_t) − {discount} V(s_t+1)], V: {value} "
        "({shaping_weight} log π_T + {student_weight} log π_θ at {value_temperature})"
    )
    source = "2509.16965"

    def objective(self) -> str:
        """Return the formula with the run's numbers."""
        if self.config.form == "shaped":
            return super().objective()
        said = "L = " + self.released_formula.format(**vars(self.config))
        return said + (f" + {self.config.nll_weight} NLL(y_w)" if self.config.nll_weight else "")

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take both responses with the teacher's values; held-out rows that the cache lacks have none."""
        quantity = "value" if self.config.value == "logits" else "logprob"
        reader = open_cache(self.config.teacher_cache, quantity, self.tokenizer)

        def entry(side: Tokens) -> Stored:
            return stored_entry(reader, side) if quantity == "logprob" else stored_columns((reader,), side, "values")

        return pairs_with_entries(self, examples, split, (reader,), entry)

    def values(self, logits: Logits, teacher: TopK | None) -> Tensor | None:
        """Return V of the state before each token [N]; None without a teacher."""
        if teacher is None:
            return None
        config = self.config
        if config.value == "logits":
            return config.shaping_weight * teacher.values[:, 0].double()
        ids, logps = inside(teacher.ids, teacher.values.double(), logits.shape[-1])
        student = logps
        if config.value in OF_STUDENT or config.student_weight:
            student = gather_logps(logits, ids).double().masked_fill(logps == -torch.inf, -torch.inf)
        return event_values(
            config.value,
            with_rest(logps),
            with_rest(student),
            config.shaping_weight,
            config.student_weight,
            config.value_temperature,
        )

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the preference sum (and the NLL sum), rewards, margins, accuracies and the shaping."""
        config, size = self.config, batch.num_items
        logps = token_logps(out.logits, out.targets)
        values = self.values(out.logits, batch.teacher)
        values = torch.zeros_like(logps) if values is None else values.to(logps.dtype)
        pairs, real = self.pairs(logps, out.rows, batch), batch.supervised(0).to(logps)
        if config.form == "shaped":
            chosen, rejected = potentials(values, out.rows, 2 * size, config.discount).split(size)
            shaping = chosen - rejected
            losses = logistic_loss(config.beta * (pairs.chosen_ratio - pairs.rejected_ratio) + shaping)
        else:
            chosen, rejected = value_rewards(logps, values, out.rows, 2 * size, config.discount).split(size)
            shaping = (chosen - pairs.chosen) - (rejected - pairs.rejected)
            losses = logistic_loss(chosen - rejected)
        sums = {"preference": torch.where(real > 0, losses, 0.0).sum()}
        if config.nll_weight:
            sums["nll"] = -config.nll_weight * logps[: batch.num_tokens(0)].sum()
        shaped = Mean(torch.where(real > 0, shaping.detach(), 0.0).sum(), real.sum())
        return sums, {**self.metrics(pairs, real), "shaping": shaped}
