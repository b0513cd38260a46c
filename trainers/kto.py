"""Kahneman-Tversky optimization (arXiv 2402.01306): single responses, each desirable or not.

z_0 = max(0, mean over the global batch of log pi_theta/pi_0 of a response to another prompt), without gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dataloader import Example, Tokens
from engine.metrics import Mean
from functional import row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from tokens.columns import (
    PROMPT,
    SIDES,
    keys_from,
    labeled,
    numbers_of,
    part_of,
    prompts_of,
    sides_of,
    taken,
)
from tokens.examples import held
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, Items
from trainers.paired import check_humanline, humanline

CHOSEN, REJECTED, RESPONSE = range(len(SIDES))
Part = tuple[np.ndarray, np.ndarray]  # ids and mask of a sequence


@dataclass(frozen=True)
class KTOConfig:
    """Values of config/loss/kto.yaml."""

    beta: float
    desirable_weight: float
    undesirable_weight: float
    zero_reference_point: bool
    frac_unique_desirable: float
    frac_unique_undesirable: float
    humanline: bool
    log_epsilon_P: float
    log_epsilon_R: float

    def __post_init__(self) -> None:
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")
        for key in ("desirable_weight", "undesirable_weight"):
            require(getattr(self, key) > 0, f"loss.{key}={getattr(self, key)} must be above 0")
        for key in ("frac_unique_desirable", "frac_unique_undesirable"):
            require(0 <= getattr(self, key) <= 1, f"loss.{key}={getattr(self, key)} must be in [0, 1]")
        check_humanline(self)


def kto_loss(
    ratios: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Return w_D (1 - s(beta (u - z_0))) or w_U (1 - s(beta (z_0 - u))) per sequence [B]; ratios u, desirable bool
    [B].
    """
    gain = beta * (ratios - reference_point)
    return torch.where(desirable, desirable_weight * (1 - gain.sigmoid()), undesirable_weight * (1 - (-gain).sigmoid()))


def kept(count: int, share: float, seed: int, last: bool) -> np.ndarray:
    """Choose a share of the pairs [count] whose chosen (or, `last`, rejected) response is used: from opposite ends of
    one shuffle.

    So shares that add up to at most 1 leave no prompt with both of its responses.
    """
    order = np.random.default_rng(seed).permutation(count)
    number, found = round(share * count), np.zeros(count, np.bool_)
    found[order[count - number :] if last else order[:number]] = True
    return found


def partners(prompts: np.ndarray, seed: int) -> np.ndarray:
    """Return for each response [n] the next one, in a shuffled round, that answers another prompt (a number each).

    Shuffled because in data made of pairs the next prompt's first response is always a chosen one. The round is a
    function of the seed and the data: no layout and no resume changes it.
    """
    count = len(prompts)
    order = np.random.default_rng([seed, 1]).permutation(count)
    round_ = prompts[order]
    ends = np.flatnonzero(round_ != np.roll(round_, -1))  # places whose next one has another prompt
    if not len(ends):
        raise ValueError("loss=kto needs responses to at least two different prompts: z_0 is taken on mismatched ones")
    of_place = ends[np.searchsorted(ends, np.arange(count)) % len(ends)]
    found = np.empty(count, np.int64)
    found[order] = order[(of_place + 1) % count]
    return found


def mismatched(prompt: np.ndarray, other: Part, max_length: int) -> Part:
    """Join a prompt's ids with the response (ids and mask) to another one; a longer sequence is cut to max_length."""
    ids = np.concatenate([prompt, other[0][other[1]]])[:max_length]
    return ids, np.arange(len(ids)) >= len(prompt)


class KTO(BasicTrainer):
    """Unit: sequences. Slot: the response; scored beside it: the mismatched one."""

    VERSION = 2
    config: KTOConfig
    Config = KTOConfig
    needs = Needs("feedback", reference="logps")
    kind = "preference"
    formula = (
        "mean over responses of {desirable_weight}(1 − σ({beta}(u − z_0))) if desirable, {undesirable_weight}(1 − "
        "σ({beta}(z_0 − u))) if not; "
        "u = log π_θ/π_0 of y, z_0 = max(0, global mean of u on mismatched responses), 0 if "
        "zero_reference_point={zero_reference_point}"
    )
    source = "2402.01306"

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take labeled responses; of a pair the chosen one is desirable, the rejected one is not."""
        config, seed = self.config, self.run_config.seed
        sides = sides_of(examples)
        used = sides.lengths >= 0
        for row in np.flatnonzero(~used.any(axis=1)).tolist():
            raise ValueError(
                f"{examples[row].where}: loss=kto needs pairs, or a response with a column `label`, and this row gives "
                f"{held(examples[row])}. Check datasets= and its format, or remove the row"
            )
        used[:, CHOSEN] &= kept(len(examples), config.frac_unique_desirable, seed, False)
        used[:, REJECTED] &= kept(len(examples), config.frac_unique_undesirable, seed, True)
        rows, slots = np.nonzero(used)  # row after row; of a row chosen, rejected, response
        if not len(rows):
            raise ValueError(
                "loss=kto has no response left: raise loss.frac_unique_desirable or loss.frac_unique_undesirable"
            )
        labels = (slots == CHOSEN).astype(np.float64)
        single = slots == RESPONSE
        labels[single] = numbers_of(examples, "label", rows[single], self._label) > 0
        columns = labeled(taken(sides, slots[:, None], rows), labels)
        tokens_of = lambda number: getattr(examples[int(rows[number])], SIDES[slots[number]])  # noqa: E731
        label_of = lambda number: float(labels[number])  # noqa: E731
        if config.zero_reference_point:
            return Items(len(rows), lambda number: Item((tokens_of(number),), label=label_of(number)), columns)
        others = partners(prompts_of(examples).groups[rows], seed)

        def scored(number: int) -> Part:
            prompt, _ = part_of(examples, int(rows[number]), PROMPT)
            other = others[number]
            response = part_of(examples, int(rows[other]), int(slots[other]))
            return mismatched(prompt, response, self.model_config.max_length)

        def item(number: int) -> Item:
            other = Tokens(*(part.tolist() for part in scored(number)))
            return Item((tokens_of(number),), label=label_of(number), scored=(other,))

        own = columns.make_keys
        both = lambda: np.concatenate([own(), keys_from(scored, len(rows))[:, None]], axis=1)  # noqa: E731
        return Items(len(rows), item, replace(columns, make_keys=both))

    def _label(self, example: Example) -> float:
        label = example.conversation.meta.get("label")
        if not isinstance(label, (bool, int, float)):
            raise ValueError(
                f"{example.where}: loss=kto needs pairs, or a column `label` (true or false) beside each response; "
                f"this row has {label!r}"
            )
        return float(label > 0)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count sequences."""
        return {"kto": batch.num_supervised(0)}

    @torch.no_grad()
    def prepared(self, batches: list[Batch], training: bool) -> list[Batch]:
        """Estimate z_0 on the mismatched responses of the whole global batch."""
        if self.config.zero_reference_point:
            return batches
        total, count = torch.zeros(()), torch.zeros(())
        for batch in batches:
            assert batch.scored is not None
            logps = self.token_logps_of(self.policy, batch.scored)
            ratios = logps - self.scored_reference_logps(batch).to(logps)
            total = total + humanline(ratios, self.config).sum().double().cpu()
            count = count + batch.scored.response.any(dim=1).sum().cpu()
        total_sum, number = self.global_sum(total, count)
        point = torch.tensor(max(0.0, total_sum / max(1.0, number)))
        return [batch._replace(shared=point.to(batch.sequences.ids.device)) for batch in batches]

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the loss sum, rewards of either kind, and z_0."""
        config = self.config
        logps = token_logps(out.logits, out.targets)
        ratios = row_sums(humanline(logps - self.reference_logps(batch).to(logps), config), out.rows, batch.num_items)
        assert batch.labels is not None
        desirable, real = batch.labels > 0, batch.supervised(0)
        point = torch.zeros_like(ratios[0]) if batch.shared is None else batch.shared.to(ratios)
        losses = kto_loss(ratios, desirable, point, config.beta, config.desirable_weight, config.undesirable_weight)
        rewards = config.beta * ratios.detach()
        metrics = {"reference_point": Mean(point * real.sum(), real.sum())}
        for name, chosen in (("desirable", real & desirable), ("undesirable", real & ~desirable)):
            metrics[f"rewards/{name}"] = Mean(torch.where(chosen, rewards, 0.0).sum(), chosen.sum())
        return {"kto": torch.where(real, losses, 0.0).sum()}, metrics
