"""Advantage-guided distillation for preference alignment (ADPA, arXiv 2502.17927, eq. 11).

L = w_sft NLL(y_w) - gamma mean_t sum_{a in top k} pi_theta(a|s_t) A(s_t, a), on the student's own responses, with
A = log pi_dpo - log pi_ref from the verified advantage cache. Linear in pi_theta: entropy and mass are watched.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataloader import Example, Generation, Tokens, read_generations
from engine.metrics import Mean
from functional import entropies, expected_advantage, inside, row_sums, support_mass, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from settings.typed import Place
from teacher.lookup import generations_by_prompt, open_cache, stored_entry
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, checked, supervised_sequence


@dataclass(frozen=True)
class ADPAConfig:
    """Values of config/loss/adpa.yaml."""

    generations: Place
    advantages: Place
    gamma: float
    sft_weight: float
    reduction: str
    advantage_floor: float

    def __post_init__(self) -> None:
        one_of("loss.reduction", self.reduction, ("token_mean", "sequence_sum"))
        require(self.gamma >= 0, f"loss.gamma={self.gamma} must not be negative")
        require(self.sft_weight >= 0, f"loss.sft_weight={self.sft_weight} must not be negative")
        require(0 <= self.advantage_floor < 1, f"loss.advantage_floor={self.advantage_floor} must be in [0, 1)")


def floored(advantages: Tensor, teacher_logps: Tensor, floor: float) -> Tensor:
    """Set positive advantages [N, K] of tokens with a teacher probability below `floor` to 0 (ours, not the
    paper's).
    """
    absurd = (teacher_logps.exp() < floor) & (advantages > 0)
    return advantages.masked_fill(absurd, 0.0)


def dealt(
    examples: Sequence[Example], generations: Mapping[tuple[int, ...], Sequence[Generation]]
) -> list[tuple[Tokens, Tokens]]:
    """Deal the generations of each prompt out to its rows: (chosen, generated) of every item, in the rows' order.

    m rows and G generations of one prompt give max(m, G) items, in which every generation is supervised once and every
    chosen response equally often: as often as each row has generations, G // m, or once. What does not come out even
    is supervised alone: a generation too many without a chosen response, a row too many without a generation.
    """
    rows = Counter(tuple(example.prompt) for example in examples)
    seen: Counter[tuple[int, ...]] = Counter()
    joined = []
    for example in examples:
        prompt = tuple(example.prompt)
        mine = generations[prompt][seen[prompt] :: rows[prompt]]
        seen[prompt] += 1
        share = len(generations[prompt]) // rows[prompt]
        chosen = supervised_sequence(example.chosen or example.response, "chosen", "adpa", example)
        bare = Tokens(example.prompt, [False] * len(example.prompt))
        joined += [(chosen if k < max(1, share) else bare, generation.tokens) for k, generation in enumerate(mine)]
        joined += [] if mine else [(chosen, bare)]
    return joined


class ADPA(BasicTrainer):
    """Units: tokens (sequence_sum: sequences). Slots: chosen, generated."""

    VERSION = 2
    config: ADPAConfig
    Config = ADPAConfig
    needs = Needs("responses", teacher="advantage")
    formula = (
        "{sft_weight} NLL(y_w) − {gamma} · {reduction} of Σ_a π_θ(a|s_t) A(s_t, a) on ŷ, A = log π_dpo/π_ref on the "
        "teacher's top k, "
        "positive A dropped where π_dpo(a) < {advantage_floor}"
    )
    source = "2502.17927"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Join rows with the responses generated for the very ids of their prompts, and these with their advantages."""
        if split == "test":  # the student answered training prompts only: held-out rows measure the NLL term
            held_out = lambda e: Item((supervised_sequence(e.chosen or e.response, "chosen", "adpa", e),) * 2, ())  # noqa: E731
            return checked(len(examples), lambda i: held_out(examples[i]))
        reader = open_cache(self.config.advantages, "advantage", self.tokenizer)
        generations = generations_by_prompt(
            read_generations(self.config.generations, self.tokenizer), examples, self.config.generations
        )
        pairs = dealt(examples, generations)

        def item(number: int) -> Item:
            pair = pairs[number]
            return Item(pair, (None, stored_entry(reader, pair[1]) if pair[1].num_supervised else None))

        return checked(len(pairs), item)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count chosen tokens (NLL) and generated tokens or sequences (advantage); no advantage without a teacher."""
        if batch.teacher is None:
            return {"nll": batch.num_tokens(0), "advantage": 0}
        generated = batch.num_tokens(1) if self.config.reduction == "token_mean" else int(batch.supervised(1).sum())
        return {"nll": batch.num_tokens(0), "advantage": generated}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the weighted NLL and advantage sums, and what tells a collapse."""
        split = batch.num_tokens(0)
        chosen_logits, logits = out.logits[:split], out.logits[split:]
        nll = -token_logps(chosen_logits, out.targets[:split]).sum()
        sums = {"nll": self.config.sft_weight * nll}
        metrics = {"nll/chosen": Mean(nll.detach(), split)}
        if batch.teacher is None:
            return {**sums, "advantage": logits.sum() * 0}, metrics
        ids, advantages = batch.teacher.ids, batch.teacher.values
        if logits.shape[-1] < self.vocab_size:  # a head with fewer rows than the tokenizer has ids
            ids, advantages = inside(ids, advantages, logits.shape[-1], nothing=0.0)
        if self.config.advantage_floor > 0:
            assert batch.teacher.teacher_logps is not None, "an advantage cache carries the aligned teacher's log-probs"
            advantages = floored(advantages, batch.teacher.teacher_logps, self.config.advantage_floor)
        expected = expected_advantage(logits, ids, advantages)
        sums["advantage"] = -self.config.gamma * expected.sum()
        tokens, lengths = (
            len(expected),
            row_sums(torch.ones_like(expected.detach()), out.rows[split:] - batch.num_items, batch.num_items),
        )
        with torch.no_grad():
            logps = batch.teacher.teacher_logps
            assert logps is not None, "an advantage cache carries the aligned teacher's log-probs"
            mass = support_mass(logits, *inside(batch.teacher.ids, logps, logits.shape[-1])).sum()
            entropy = entropies(logits).sum()
        return sums, {
            **metrics,
            "advantage": Mean(expected.detach().sum(), tokens),
            "entropy": Mean(entropy, tokens),
            "mass_in_support": Mean(mass, tokens),
            "response_tokens": Mean(lengths.sum(), (lengths > 0).sum()),
        }
