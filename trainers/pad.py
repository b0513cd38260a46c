"""Preference-aligned distillation (PAD, arXiv 2502.14272): rank n responses as the teacher does.

The reward of a response is beta times its mean log-probability a token; rewards s give a ranking t of the n responses
the probability prod_k exp(s_t(k)) / sum_{j >= k} exp(s_t(j)) (Plackett and Luce). L = JSD of the teacher's and the
student's distributions over all n! rankings, mean over prompts. Left out: the teacher's reward by its choice among
lettered answers, which the paper mixes in. The authors' code takes the KLs in the other direction, from the mixture;
here it is the JSD of the paper's text. Letters: B prompts, n responses, N tokens, R = n! rankings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from dataloader import Example
from engine.metrics import Mean
from forward.chunks import nothing
from functional import row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from settings.typed import Place
from teacher.lookup import check_generated, open_cache, stored_columns
from tokens.columns import prompts_of
from tokens.generations import generated_sequences
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, checked
from trainers.paired import pairs_with_entries

MOST = 6  # responses: 720 rankings


@dataclass(frozen=True)
class PADConfig:
    """Values of config/loss/pad.yaml."""

    teacher_cache: Place
    generations: Place | None
    n: int
    beta: float

    def __post_init__(self) -> None:
        require(2 <= self.n <= MOST, f"loss.n={self.n} must be in [2, {MOST}]: all n! rankings are counted")
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")
        require(
            self.generations is not None or self.n == 2,
            f"loss.n={self.n}: the data's pairs have two responses. Set loss.generations=FILE to generations of "
            f"task=generate generation.n={self.n}, or loss.n=2",
        )


def ranking_logps(scores: Tensor) -> Tensor:
    """Return the log-probability of every ranking [B, R] under Plackett and Luce's model of scores [B, n]."""
    orders = torch.tensor(list(permutations(range(scores.shape[1]))), device=scores.device)
    ranked = scores[:, orders]  # [B, R, n], the best first
    left = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return (ranked - left).sum(-1)


def jsd(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence [B] of log-probabilities [B, R]."""
    mixture = torch.logaddexp(first, second) - math.log(2)
    return ((first.exp() * (first - mixture)).sum(-1) + (second.exp() * (second - mixture)).sum(-1)) / 2


class PAD(BasicTrainer):
    """Unit: prompts. Slots: n responses to one prompt."""

    config: PADConfig
    Config = PADConfig
    needs = Needs("pairs", teacher="token_logp")
    kind = "preference"
    formula = (
        "mean over prompts of JSD(P_θ, P_T) over the rankings of {n} responses, P(τ) = Π_k exp(s_τ(k)) / Σ_j≥k "
        "exp(s_τ(j)), s(y) = {beta} · mean over tokens of log π(y_t)"
    )
    source = "2502.14272"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take n generations of each prompt, or the data's pairs, with the teacher's log-probability of each token."""
        config = self.config
        readers = (open_cache(config.teacher_cache, "token_logp", self.tokenizer),)
        if config.generations is None or split == "test":  # the student answered training prompts only
            return pairs_with_entries(
                self, examples, split, readers, lambda side: stored_columns(readers, side, "logps")
            )
        run = self.run_config
        generations = generated_sequences(config.generations, self.tokenizer, run.tokens_dir, run.num_proc)
        check_generated(generations, examples, config.generations)
        found: dict[bytes, list[int]] = {}
        for number, key in enumerate(map(bytes, generations.prompt_keys())):
            found.setdefault(key, []).append(number)
        groups = ranked_groups(list(map(bytes, prompts_of(examples).keys)), found, config.n)

        def item(number: int) -> Item:
            responses = tuple(generations[i] for i in groups[number])
            return Item(responses, tuple(stored_columns(readers, tokens, "logps") for tokens in responses))

        return checked(len(groups), item)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count prompts; none without a teacher."""
        return {"divergence": 0 if batch.teacher is None else batch.num_supervised(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the divergence's sum, and how often both prefer the same response."""
        if batch.teacher is None:
            return {"divergence": nothing(out.logits)}, {}
        logps = token_logps(out.logits, out.targets)
        shape = len(batch.counted), batch.num_items
        lengths = row_sums(torch.ones_like(logps), out.rows, math.prod(shape)).clamp_min(1)

        def scores(values: Tensor) -> Tensor:
            return self.config.beta * (row_sums(values, out.rows, math.prod(shape)) / lengths).reshape(shape).T

        student, teacher = scores(logps), scores(batch.teacher.values[:, 0].to(logps))
        real = batch.supervised(0)
        losses = torch.where(real, jsd(ranking_logps(student), ranking_logps(teacher)), 0.0)
        agreed = (student.argmax(1) == teacher.argmax(1)) & real
        return {"divergence": losses.sum()}, {
            "agreement": Mean(agreed.to(logps).sum(), real.sum()),
            "rewards/spread": Mean(torch.where(real, student.detach().std(1), 0.0).sum(), real.sum()),
        }


def ranked_groups(prompts: Sequence[bytes], generations: dict[bytes, list[int]], n: int) -> list[list[int]]:
    """Return the generations of each item, by number: n of one prompt, every prompt once, none left out.

    ValueError where a prompt's generations are not a multiple of n: generation.n says how many there are.
    """
    groups = []
    for prompt in dict.fromkeys(prompts):
        mine = generations[prompt]
        if len(mine) % n:
            raise ValueError(
                f"loss.n={n}: a prompt has {len(mine)} generations, which are not groups of {n}. Take loss.n from the "
                "generation.n that wrote loss.generations"
            )
        groups += [mine[start : start + n] for start in range(0, len(mine), n)]
    return groups
