"""Advantage-guided distillation for preference alignment (ADPA, arXiv 2502.17927, eq. 11).

L = w_sft NLL(y_w) - gamma mean_t sum_{a in top k} pi_theta(a|s_t) A(s_t, a), on the student's own responses, with
A = log pi_dpo - log pi_ref from the verified advantage cache. Linear in pi_theta: entropy and mass are watched.
objective=regularized puts E_pi[A] - tau KL(pi || base) in the place of the sum (trainers/regularized_advantage.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataloader import Example, Tokens
from engine.metrics import Mean
from forward.chunks import Logits, nothing
from functional import gather_logps, row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from settings.typed import Place, Places
from teacher.cache import Reader
from teacher.entries import advantage_scores, inside
from teacher.lookup import Stored, StoredSum, check_generated, identity_of, open_cache, stored_entry
from teacher.mixture import named, shares
from tokens.columns import (
    NOTHING,
    PROMPT,
    SIDES,
    Columns,
    Sides,
    either,
    groups_of,
    prompts_of,
    sides_of,
    taken,
    with_prompts,
)
from tokens.generations import generated_sequences
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, Items, asked, checked, supervised_sequence
from trainers.regularized_advantage import BASES, Regularized, Regularizer, regularized_advantage

CHOSEN, RESPONSE = SIDES.index("chosen"), SIDES.index("response")


@dataclass(frozen=True)
class ADPAConfig:
    """Values of config/loss/adpa.yaml."""

    generations: Place
    advantages: Places
    advantage_weights: Any
    objective: str
    gamma: float
    sft_weight: float
    reduction: str
    advantage_floor: float | None
    kl_weight: float
    kl_reference: str
    target_temperature: float
    rest_advantage: str

    def __post_init__(self) -> None:
        folders = named(self.advantages)
        require(
            bool(folders) and all(isinstance(folder, str) and folder for folder in folders.values()),
            f"loss.advantages={self.advantages} must be a CACHE folder, a list or a mapping of them",
        )
        require(
            self.advantage_weights is None or len(folders) > 1,
            f"loss.advantage_weights={self.advantage_weights} weighs several caches: give loss.advantages as a list or "
            "a mapping",
        )
        self.weights  # noqa: B018 (refused here, before a model loads)
        require(
            self.objective == "expected" or len(folders) == 1,
            f"loss.objective={self.objective} takes one advantage cache, and loss.advantages has {len(folders)}: the "
            "base of a KL is one teacher's",
        )
        one_of("loss.objective", self.objective, ("expected", "regularized"))
        one_of("loss.reduction", self.reduction, ("token_mean", "sequence_sum"))
        one_of("loss.kl_reference", self.kl_reference, BASES)
        one_of("loss.rest_advantage", self.rest_advantage, ("zero", "tails"))
        require(self.gamma >= 0, f"loss.gamma={self.gamma} must not be negative")
        require(self.sft_weight >= 0, f"loss.sft_weight={self.sft_weight} must not be negative")
        require(0 <= self.floor < 1, f"loss.advantage_floor={self.advantage_floor} must be in [0, 1)")
        require(
            self.kl_weight > 0,
            f"loss.kl_weight={self.kl_weight} must be above 0; the objective without a KL is loss.objective=expected",
        )
        require(self.target_temperature > 0, f"loss.target_temperature={self.target_temperature} must be above 0")

    @property
    def is_regularized(self) -> bool:
        """Tell whether the advantage stands beside a KL to a base."""
        return self.objective == "regularized"

    @property
    def floor(self) -> float:
        """Return the floor on the teacher's probability; where none is set, 0.01 of the regularized objective (in the
        small world .904 with a floor, .868 without) and 0 of the paper's.
        """
        return (0.01 if self.is_regularized else 0.0) if self.advantage_floor is None else self.advantage_floor

    @property
    def weights(self) -> tuple[float, ...]:
        """Return each cache's weight in the sum of advantages; they sum to 1."""
        return tuple(shares(list(named(self.advantages)), self.advantage_weights, "loss.advantages").values())


def entries_of(readers: Sequence[Reader], weights: tuple[float, ...], tokens: Tokens) -> Stored:
    """Find a sequence's advantages in one cache, or their sum in several; ValueError shows what a cache has instead."""
    parts = tuple(stored_entry(reader, tokens) for reader in readers)
    return parts[0] if len(parts) == 1 else StoredSum(parts, weights)


def floored(advantages: Tensor, teacher_logps: Tensor, floor: float) -> Tensor:
    """Set positive advantages [N, K] of tokens with a teacher probability below `floor` to 0 (ours, not the
    paper's).
    """
    absurd = (teacher_logps.exp() < floor) & (advantages > 0)
    return advantages.masked_fill(absurd, 0.0)


class Deals(NamedTuple):
    """Items by number, [n] each: their rows, the generations they are joined with (NONE: none), and whether y_w is
    supervised.
    """

    rows: np.ndarray
    generations: np.ndarray
    with_chosen: np.ndarray


NONE = -1


def dealt(prompts: np.ndarray, answered: np.ndarray) -> Deals:
    """Deal the generations of each prompt out to its rows, both given by their prompts' keys [., 16]; items in the
    rows' order, and a row's generations in theirs.

    m rows and G generations of one prompt give max(m, G) items, in which every generation is supervised once and every
    chosen response equally often: as often as each row has generations, G // m, or once. What does not come out even
    is supervised alone: a generation too many without a chosen response, a row too many without a generation.
    """
    groups = groups_of(np.concatenate([prompts, answered]))
    of_row, of_answer = groups[: len(prompts)], groups[len(prompts) :]
    size = int(groups.max()) + 1 if len(groups) else 0
    rows, answers = (np.bincount(part, minlength=size) for part in (of_row, of_answer))
    mine = np.maximum(0, -(-(answers[of_row] - ranks(of_row)) // rows[of_row]))  # every rows-th from the row's rank on
    items = np.maximum(1, mine)
    row = np.repeat(np.arange(len(prompts)), items)
    k = np.arange(len(row)) - np.repeat(np.cumsum(items) - items, items)
    group, is_answered = of_row[row], mine[row] > 0
    first = np.cumsum(answers) - answers
    at = first[group] + ranks(of_row)[row] + k * rows[group]
    in_order = np.append(np.argsort(of_answer, kind="stable"), NONE)  # generations, prompt after prompt
    generation = np.where(is_answered, in_order[np.where(is_answered, at, -1)], NONE)
    return Deals(row, generation, k < np.maximum(1, answers[group] // rows[group]))


def ranks(groups: np.ndarray) -> np.ndarray:
    """Return the place [n] of each entry among the entries of its group."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered)
    found = np.empty(len(groups), np.int64)
    found[order] = np.arange(len(groups)) - starts
    return found


def answer_of(sides: Sides) -> np.ndarray:
    """Return which side [n] the NLL term learns of each row: the chosen one, or the response of a row without."""
    found = either(sides, "chosen", "response")
    return np.where(found == PROMPT, CHOSEN, found)


def joined_columns(examples: Sequence[Example], sides: Sides, generated: Sides, deals: Deals) -> Columns:
    """Return the columns of the items of the deals."""
    slots = np.stack([np.where(deals.with_chosen, answer_of(sides)[deals.rows], PROMPT)] * 2, axis=1)
    answered = deals.generations != NONE
    slots[:, 1] = PROMPT  # for those that have none; the others are laid over it
    bare = with_prompts(examples, sides, slots, deals.rows)
    own = deals.generations[answered]
    bare.lengths[answered, 1] = generated.lengths[own, RESPONSE]

    def keys() -> np.ndarray:
        alone = with_prompts(examples, sides, slots[:, :1], deals.rows).keys
        found = np.concatenate([alone, np.zeros_like(alone)], axis=1)
        found[answered, 1] = generated.keys[own, RESPONSE]
        lone = with_prompts(examples, sides, slots[~answered, 1:], deals.rows[~answered])
        found[~answered, 1] = lone.keys[:, 0]
        return found

    return Columns(bare.lengths, keys)


class ADPA(BasicTrainer):
    """Units: tokens (sequence_sum: sequences). Slots: chosen, generated."""

    VERSION = 2
    config: ADPAConfig
    Config = ADPAConfig
    needs = Needs(
        "responses",
        reference="distributions",
        teacher="advantage",
        reference_if=(("objective", "regularized"), ("kl_reference", "start")),
    )
    cache_beta = 1.0  # the factor that the cached advantages carry
    formula = (
        "{sft_weight} NLL(y_w) − {gamma} · {reduction} of Σ_a π_θ(a|s_t) A(s_t, a) on ŷ, A = log π_dpo/π_ref on the "
        "teacher's top k, "
        "positive A dropped where π_dpo(a) < {floor}"
    )
    regularized_formula = (
        "{sft_weight} NLL(y_w) − {gamma} · {reduction} of E_π[A + {kl_weight} log b] + "
        "{kl_weight}·{target_temperature} "
        "H(π) on ŷ, whose optimum is (b exp(A/{kl_weight}))^(1/{target_temperature}), on the teacher's top k and the "
        "rest (its A: {rest_advantage}), b of the {kl_reference}, A = log π_dpo/π_ref, positive A dropped where "
        "π_dpo(a) < {floor}"
    )
    source = "2502.17927"
    kind = "preference"

    def objective(self) -> str:
        """Return the formula with the run's numbers, and the weights of several caches."""
        names = list(named(self.config.advantages))
        parts = ", ".join(f"{w:.3g} {name}" for name, w in zip(names, self.config.weights, strict=True))
        formula = self.regularized_formula if self.config.is_regularized else self.formula
        said = "L = " + formula.format(**vars(self.config), floor=self.config.floor)
        return said + (f"; A: the sum of {parts}" if len(names) > 1 else "")

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Join rows with the responses generated for the very ids of their prompts, and these with their advantages."""
        sides = sides_of(examples)
        if split == "test":  # the student answered training prompts only
            self.processes.print("nobody answered the test split's prompts: it tells nll_eval/chosen, no loss/eval")
            self.held_out_in_part = True
            held_out = lambda e: Item((supervised_sequence(e.chosen or e.response, "chosen", "adpa", e),) * 2, ())  # noqa: E731
            slots = np.repeat(answer_of(sides)[:, None], 2, axis=1)
            return checked(len(examples), lambda i: held_out(examples[i]), taken(sides, slots))
        folders, weights, run = named(self.config.advantages).values(), self.config.weights, self.run_config
        readers = [open_cache(folder, "advantage", self.tokenizer) for folder in folders]
        generations = generated_sequences(self.config.generations, self.tokenizer, run.tokens_dir, run.num_proc)
        check_generated(generations, examples, self.config.generations)
        deals = dealt(prompts_of(examples).keys, generations.prompt_keys())
        self.cache_beta = readers[0].meta.beta

        def item(number: int) -> Item:
            row, generation, with_chosen = (int(part[number]) for part in deals)
            example = examples[row]
            bare = Tokens(example.prompt, [False] * len(example.prompt))
            chosen = supervised_sequence(example.chosen or example.response, "chosen", "adpa", example)
            generated = bare if generation == NONE else generations[generation]
            entries = entries_of(readers, weights, generated) if generated.num_supervised else None
            return Item((chosen if with_chosen else bare, generated), (None, entries))

        known = generations.sides()
        said = np.append(known.supervised[:, RESPONSE] > 0, False)[deals.generations]  # nobody is asked of the others
        lacking = ~np.logical_and.reduce([reader.held(known.keys[:, RESPONSE]) for reader in readers])
        lacks = said & np.append(lacking, False)[deals.generations]
        wrong = (answer_of(sides)[deals.rows] == CHOSEN) & (sides.lengths[deals.rows, CHOSEN] < 0)
        for number in np.flatnonzero(wrong | lacks).tolist():
            item(number)  # says what is missing
        who = b"".join(map(identity_of, readers)) + (repr(weights).encode() if len(readers) > 1 else b"")
        ends = [NOTHING + asked([b"", w]) for w in (b"", who)]
        columns = joined_columns(examples, sides, known, deals).having(lambda i: ends[int(said[i])])
        return Items(len(deals.rows), item, columns)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count chosen tokens (NLL) and generated tokens or sequences (advantage); no advantage without a teacher."""
        if batch.teacher is None:
            return {"nll": batch.num_tokens(0), "advantage": 0}
        generated = batch.num_tokens(1) if self.config.reduction == "token_mean" else batch.num_supervised(1)
        return {"nll": batch.num_tokens(0), "advantage": generated}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the weighted NLL and advantage sums, and what tells a collapse."""
        split = batch.num_tokens(0)
        chosen_logits, logits = out.logits[:split], out.logits[split:]
        nll = -token_logps(chosen_logits, out.targets[:split]).sum()
        sums = {"nll": self.config.sft_weight * nll}
        metrics = {"nll/chosen": Mean(nll.detach(), split)}
        # A sharded start gathers its weights from every rank: one without a generated response asks it, too. What is
        # held out has no advantages on any rank.
        asks = self.needs.reference and (batch.teacher is not None or torch.is_grad_enabled())
        start = self.reference_logits(batch)[split:] if asks else None
        if batch.teacher is None:
            return {**sums, "advantage": nothing(logits)}, metrics
        found = self._regularized(logits, batch, start) if self.config.is_regularized else self._expected(logits, batch)
        sums["advantage"] = -self.config.gamma * found.objective.sum()
        tokens, lengths = (
            len(found.objective),
            row_sums(torch.ones_like(found.mass), out.rows[split:] - batch.num_items, batch.num_items),
        )
        watched = {
            "advantage": found.advantage,
            "entropy": found.entropy,
            "mass_in_support": found.mass,
        }
        if self.config.is_regularized:
            watched |= {"kl/target": found.to_target, "kl/base": found.to_base}
        return sums, {
            **metrics,
            **{name: Mean(values.sum(), tokens) for name, values in watched.items()},
            "response_tokens": Mean(lengths.sum(), (lengths > 0).sum()),
        }

    def _expected(self, logits: Logits, batch: Batch) -> Regularized:
        """Return the paper's objective of each generated token; it has neither target nor base."""
        teacher = batch.teacher
        assert teacher is not None
        assert teacher.teacher_logps is not None, "an advantage cache carries the aligned teacher's log-probs"
        ids, advantages = teacher.ids, teacher.values
        if logits.shape[-1] < self.vocab_size:  # a head with fewer rows than the tokenizer has ids
            ids, advantages = inside(ids, advantages, logits.shape[-1], nothing=0.0)
        if self.config.floor > 0:
            advantages = floored(advantages, teacher.teacher_logps, self.config.floor)
        present = inside(teacher.ids, teacher.teacher_logps, logits.shape[-1])[1] > -math.inf
        expected, mass, entropy = advantage_scores(logits, ids, advantages, present).unbind(-1)
        zero = torch.zeros_like(mass)
        return Regularized(expected, expected.detach(), zero, zero, mass, entropy)

    def _regularized(self, logits: Logits, batch: Batch, start: Logits | None) -> Regularized:
        """Return the objective of each generated token with a KL to the base, maybe the start with these logits."""
        teacher, config = batch.teacher, self.config
        assert teacher is not None
        assert teacher.teacher_logps is not None, "an advantage cache carries the aligned teacher's log-probs"
        ids, teacher_logps = inside(teacher.ids, teacher.teacher_logps, logits.shape[-1])
        start_logps = None if start is None else gather_logps(start, ids)
        how = Regularizer(
            config.kl_weight,
            config.kl_reference,
            config.target_temperature,
            self.cache_beta,
            config.floor,
            config.rest_advantage == "tails",
        )
        return regularized_advantage(logits, ids, teacher.values, teacher_logps, start_logps, how)
