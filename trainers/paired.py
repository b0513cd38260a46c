"""What losses of pairs share: slots, log-ratios (humanline-clipped by option), an NLL term, rewards and accuracies.

Letters: B pairs, N response tokens of a batch (flat, row after row). A method adds one function of `Pairs`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataloader import Example, Tokens
from engine.metrics import Mean
from functional import row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from teacher.cache import Reader
from teacher.lookup import Stored, identity_of
from tokens.columns import NOTHING
from trainers.basic import BasicTrainer
from trainers.batches import Batch, Item, Items, asked, pair_items, pair_of


class Pairs(NamedTuple):
    """Sums over response tokens of B pairs, [B] each: log pi_theta, and its ratio to pi_0 (zeros without pi_0)."""

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor  # how many
    rejected_tokens: Tensor


@dataclass(frozen=True)
class PairedConfig:
    """Values that every loss of pairs has (config/loss/shared/paired.yaml)."""

    nll_weight: float

    def __post_init__(self) -> None:
        require(self.nll_weight >= 0, f"loss.nll_weight={self.nll_weight} must not be negative")


@dataclass(frozen=True)
class RatioConfig(PairedConfig):
    """Values of losses of log-ratios to a reference (config/loss/shared/ratio.yaml)."""

    humanline: bool
    log_epsilon_P: float
    log_epsilon_R: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_humanline(self)


@dataclass(frozen=True)
class BetaConfig(RatioConfig):
    """The same with the strength of the implicit KL constraint."""

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"loss.beta={self.beta} must be above 0")


@dataclass(frozen=True)
class SmoothedConfig(BetaConfig):
    """Values of losses with a share of wrong labels."""

    label_smoothing: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 0.5, f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5)")


def check_humanline(config: Any) -> None:
    """Refuse bounds that do not hold 0, where training starts."""
    require(
        config.log_epsilon_P < 0 < config.log_epsilon_R,
        f"loss.log_epsilon_P={config.log_epsilon_P} and loss.log_epsilon_R={config.log_epsilon_R} must lie on both "
        "sides of 0",
    )


def humanline(ratios: Tensor, config: Any) -> Tensor:
    """Clamp token log-ratios [N] into [log epsilon_P, log epsilon_R] (HALOs' humanline); no gradient outside."""
    return ratios.clamp(config.log_epsilon_P, config.log_epsilon_R) if config.humanline else ratios


def logistic_loss(delta: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return -(1-e) log s(delta) - e log s(-delta) [B]: the loss of a preference that is wrong with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(delta) - label_smoothing * F.logsigmoid(-delta)


def pairs_of(logps: Tensor, ratios: Tensor, rows: Tensor, size: int) -> Pairs:
    """Sum log-probabilities and ratios [N] of 2 * size sequences, chosen first, into Pairs."""
    ones = torch.ones_like(logps.detach())
    sums = [row_sums(values, rows, 2 * size).split(size) for values in (logps, ratios, ones)]
    return Pairs(*(side for pair in sums for side in pair))


def pairs_with_entries(
    trainer: BasicTrainer,
    examples: Sequence[Example],
    split: str,
    readers: Sequence[Reader],
    entry: Callable[[Tokens], Stored],
) -> Sequence[Item]:
    """Take both responses with the teacher's entries; no held-out row where a cache lacks one, which is said."""
    name = type(trainer).__name__.lower()
    pairs = pair_items(examples, name)
    assert pairs.columns is not None
    keys = pairs.columns.keys
    flat = keys.reshape(-1, keys.shape[-1])
    held = np.all([reader.held(flat) for reader in readers], axis=0).reshape(keys.shape[:2]).all(axis=1)
    if split == "test" and not held.all():
        trainer.processes.print("the teacher cache does not hold the test split: nothing is evaluated on it")
        return []

    def item(number: int) -> Item:
        pair = pair_of(examples[number], name)
        return Item(pair, tuple(entry(side) for side in pair))

    for number in np.flatnonzero(~held).tolist():
        item(number)  # says what the cache has in its place
    teachers = b"".join(map(identity_of, readers))
    return Items(len(pairs), item, pairs.columns.having(NOTHING + asked([teachers] * 2)))


class PairedTrainer(BasicTrainer):
    """Unit: pairs (the NLL term: chosen tokens). Slots: chosen, rejected. A method defines `losses`."""

    needs: Needs = Needs("pairs", reference="logps")
    kind = "preference"

    def losses(self, pairs: Pairs, batch: Batch) -> Tensor:
        """Return the loss of each pair [B]."""
        raise NotImplementedError

    def weights(self, out: ResponseLogits, batch: Batch) -> Tensor | None:
        """Return a factor on each pair's loss [B], or None."""
        return None

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards of chosen and rejected [B]: beta times the log-ratio, where there is a beta."""
        beta = getattr(self.config, "beta", 1.0)
        return beta * pairs.chosen_ratio, beta * pairs.rejected_ratio

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take chosen and rejected."""
        name = type(self).__name__
        return pair_items(examples, name)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count pairs and, for the NLL term, chosen tokens."""
        counts = {"preference": batch.num_supervised(0)}
        return {**counts, "nll": batch.num_tokens(0)} if self.config.nll_weight else counts

    def pairs(self, logps: Tensor, rows: Tensor, batch: Batch) -> Pairs:
        """Sum token log-probabilities [N] and their (clipped) ratios to the reference by sequence."""
        ratios = torch.zeros_like(logps)
        if self.needs.reference == "logps":
            ratios = humanline(logps - self.reference_logps(batch).to(logps), self.config)
        return pairs_of(logps, ratios, rows, batch.num_items)

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the preference sum (and the NLL sum), rewards, margins and accuracies."""
        logps = token_logps(out.logits, out.targets)
        pairs = self.pairs(logps, out.rows, batch)
        real = batch.supervised(0).to(logps)
        losses, weights = self.losses(pairs, batch), self.weights(out, batch)
        losses = losses if weights is None else weights * losses
        sums = {"preference": torch.where(real > 0, losses, 0.0).sum()}
        if self.config.nll_weight:
            sums["nll"] = -self.config.nll_weight * logps[: batch.num_tokens(0)].sum()
        return sums, self.metrics(pairs, real)

    def metrics(self, pairs: Pairs, real: Tensor) -> dict[str, Mean]:
        """Return rewards, margins, accuracies and log-probabilities over the real pairs."""
        chosen, rejected = (reward.detach() for reward in self.rewards(pairs))
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen),
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
        }
        return {name: Mean(torch.where(real > 0, value, 0.0).sum(), real.sum()) for name, value in values.items()}

    def objective(self) -> str:
        """Return the formula with the run's numbers, and the options that change it."""
        text, config = super().objective(), self.config
        if config.nll_weight:
            text += f" + {config.nll_weight} NLL(y_w)"
        if getattr(config, "humanline", False):
            text += f"; token log-ratios clamped into [{config.log_epsilon_P}, {config.log_epsilon_R}] (humanline)"
        return text


class WholeBatchTrainer(PairedTrainer):
    """A loss that needs the log-ratios of the whole global batch: one more forward pass finds them."""

    @torch.no_grad()
    def ratios(self, batch: Batch) -> tuple[Batch, Pairs, Tensor]:
        """Return the batch with its reference scores, the pairs' sums without gradients, and which are real [B]."""
        batch = batch._replace(reference_logps=self.reference_logps(batch))
        with self.autocast(self.policy):
            out = self.forward(self.policy, batch.sequences)
        return batch, self.pairs(token_logps(out.logits, out.targets), out.rows, batch), batch.supervised(0)
