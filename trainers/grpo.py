"""Group relative policy optimization (arXiv 2402.03300): a response's advantage is its reward against the other
responses' to its prompt.

Online, a group is the n responses of a step to one prompt; offline, all responses to one prompt in the data, and the
policy that responded is taken to be the one that training starts from. Letters: B responses, N response tokens (flat).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataloader import Example
from engine.metrics import Mean
from functional import entropies, row_sums, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from tokens.columns import prompts_of
from trainers.batches import Batch, Item, Items, columns_of
from trainers.paired import check_humanline, humanline
from trainers.policy_gradient import clipped_losses
from trainers.rollouts import RewardedConfig, RolloutTrainer, sampled_logps

ADVANTAGE = 2  # column of an item's notes: old log-prob, the reference's, advantage


@dataclass(frozen=True)
class GRPOConfig(RewardedConfig):
    """Values of config/loss/grpo.yaml."""

    beta: float
    clip: float
    scale: str
    std_epsilon: float
    reduction: str
    humanline: bool
    log_epsilon_P: float
    log_epsilon_R: float

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.scale", self.scale, ("std", "none"))
        one_of("loss.reduction", self.reduction, ("sequence_mean", "token_mean"))
        require(self.beta >= 0, f"loss.beta={self.beta} must not be negative")
        require(0 < self.clip < 1, f"loss.clip={self.clip} must be in (0, 1)")
        require(self.std_epsilon > 0, f"loss.std_epsilon={self.std_epsilon} must be above 0")
        require(not self.is_online or self.n >= 2, f"loss.n={self.n}: a group needs at least 2 responses to compare")
        check_humanline(self)


def group_advantages(rewards: Tensor, groups: Sequence[Any], scale: str, epsilon: float) -> Tensor:
    """Return (r - mean of its group) / (population deviation of its group + epsilon) of each response [B], or without
    division.
    """
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([number[group] for group in groups])
    zeros = torch.zeros(len(number), dtype=rewards.dtype)
    sizes = zeros.index_add(0, index, torch.ones_like(rewards))
    centered = rewards - (zeros.index_add(0, index, rewards) / sizes)[index]
    if scale == "none":
        return centered
    deviations = (zeros.index_add(0, index, centered**2) / sizes).sqrt()
    return centered / (deviations + epsilon)[index]


def grpo_losses(
    logps: Tensor, log_ratios: Tensor, reference_logps: Tensor, advantages: Tensor, clip: float, beta: float
) -> Tensor:
    """Return -min(A rho, A clip(rho)) + beta (exp(d) - d - 1) of each token [N], d = log pi_0 - log pi (2402.03300, eq.
    3, 4).
    """
    return clipped_losses(log_ratios, advantages, clip) + beta * reference_kl(logps, reference_logps)


def reference_kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Return the estimate exp(d) - d - 1 of KL(pi || pi_0) of each token [N], never negative."""
    d = reference_logps - logps
    return torch.expm1(d) - d


class GRPO(RolloutTrainer):
    """Unit: responses (token_mean: tokens). Slot: the response; label: its reward."""

    VERSION = 2
    config: GRPOConfig
    Config = GRPOConfig
    needs = Needs("prompts", reference="logps")
    kind = "policy_gradient"
    formula = (
        "{reduction} over tokens of responses of −min(Aρ, A·clip(ρ, 1 ± {clip})) + {beta}(exp(d) − d − 1), ρ = "
        "π_θ/π_old, "
        "d = log π_0/π_θ, A = reward against the group's mean (scale: {scale})"
    )
    source = "2402.03300"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Offline, the policy that responded is taken to be the start, wherever the reference has moved since.
        self.keeps_start = bool(self.run_config.sync_reference) and not self.config.is_online

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take prompts, or given responses with their rewards."""
        items = super().items(examples, split)
        if self.config.is_online or split == "test":
            return items
        require(
            not self.config.has_rewards,
            "loss=grpo on responses of the data compares all responses to a prompt at once, before training: let "
            "task=label write their "
            "rewards into the data, and leave out loss.verifier and loss.reward_model",
        )
        given, columns = self.rollouts.places[split], columns_of(items)
        assert columns is not None
        groups = prompts_of(examples).groups[given.rows].tolist()
        require(
            len(set(groups)) < len(groups),
            "loss=grpo compares responses to the same prompt, and every prompt in the data has one only",
        )
        advantages = self.advantages(given.rewards.tolist(), groups)

        def notes(number: int) -> np.ndarray:
            return np.tile(np.array([0.0, 0.0, advantages[number]], np.float32), (int(given.supervised[number]), 1))

        def behind(number: int) -> bytes:
            return repr(float(given.rewards[number])).encode() + notes(number).tobytes()

        item = lambda number: items[number]._replace(notes=notes(number))  # noqa: E731
        return Items(len(items), item, columns.having(behind))

    def advantages(self, rewards: list[float], groups: Sequence[Any]) -> list[float]:
        """Compare rewards within groups."""
        return group_advantages(
            torch.tensor(rewards, dtype=torch.float64), groups, self.config.scale, self.config.std_epsilon
        ).tolist()

    def noted(self, items: list[Item]) -> list[Item]:
        """Return the items with their notes [n, 3]."""
        batch = self.batch_of(items)
        old = (
            sampled_logps(items, self.token_logps_of(self.policy, batch.sequences))
            if self.config.is_online
            else self.reference_logps(batch)
        )
        reference = self.reference_logps(batch._replace(reference_logps=None) if self.keeps_start else batch)
        pairs = (
            torch.stack([old.float(), reference.float()], dim=1)
            .cpu()
            .split(batch.sequences.response.sum(dim=1).tolist())
        )
        if self.config.is_online:
            advantages = self.advantages([item.label or 0.0 for item in items], [item.source for item in items])
        else:  # a held-out response is compared with nothing
            advantages = [
                0.0 if item.notes is None or not len(item.notes) else item.notes[0, ADVANTAGE] for item in items
            ]
        return [
            item._replace(notes=np.concatenate([part.numpy(), np.full((len(part), 1), a, np.float32)], axis=1))
            for item, part, a in zip(items, pairs, advantages, strict=True)
        ]

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count responses, or response tokens."""
        return {"grpo": batch.num_tokens(0) if self.config.reduction == "token_mean" else batch.num_supervised(0)}

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the loss sum, and what tells how training goes."""
        assert batch.notes is not None and batch.labels is not None
        config, logps = self.config, token_logps(out.logits, out.targets)
        old, base, advantages = batch.notes.to(logps).unbind(dim=1)
        log_ratios = humanline(logps - old, config)
        losses = grpo_losses(logps, log_ratios, base, advantages, config.clip, config.beta)
        tokens, real = len(logps), batch.supervised(0)
        if config.reduction == "sequence_mean":
            lengths = row_sums(torch.ones_like(losses), out.rows, batch.num_items).clamp_min(1)
            losses = row_sums(losses, out.rows, batch.num_items) / lengths
        with torch.no_grad():
            estimate, outside = reference_kl(logps, base).sum(), ((log_ratios.exp() - 1).abs() > config.clip).sum()
            spread = entropies(out.logits).sum()
        return {"grpo": losses.sum()}, {
            "reward": Mean(torch.where(real, batch.labels, 0.0).sum(), real.sum()),
            "kl": Mean(estimate, tokens),
            "clipped": Mean(outside, tokens),
            "entropy": Mean(spread, tokens),
            "response_tokens": Mean(tokens, real.sum()),
        }
