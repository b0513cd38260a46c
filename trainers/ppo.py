"""Proximal policy optimization (arXiv 1707.06347) for responses, with a value head on the policy (2203.02155).

The reward of token t is -kl_weight (log pi_old - log pi_0) and, on the last token, the response's reward; advantages by
GAE (1506.02438), whitened over the global batch; clipped ratio; clipped value loss. Letters: B rows, T tokens, N flat
tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataloader import Sequences
from engine.metrics import Mean
from functional import entropies, token_logps
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import one_of, require
from trainers.batches import Batch, Item
from trainers.paired import check_humanline, humanline
from trainers.policy_gradient import by_row, clipped_losses, discounted_sums
from trainers.rollouts import Micros, RewardedConfig, RolloutTrainer, sampled_logps
from trainers.value_head import response_logits_and_values

ADVANTAGE = 4  # column of an item's notes: old log-prob, the reference's, old value, value target, advantage


@dataclass(frozen=True)
class PPOConfig(RewardedConfig):
    """Values of config/loss/ppo.yaml."""

    kl_weight: float
    gae_gamma: float
    gae_lambda: float
    clip: float
    value_clip: float | None
    value_weight: float
    value_target: str
    drift_weight: float
    humanline: bool
    log_epsilon_P: float
    log_epsilon_R: float

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.value_target", self.value_target, ("returns", "rewards_to_go"))
        for key in ("kl_weight", "value_weight", "drift_weight"):
            require(getattr(self, key) >= 0, f"loss.{key}={getattr(self, key)} must not be negative")
        for key in ("gae_gamma", "gae_lambda"):
            require(0 <= getattr(self, key) <= 1, f"loss.{key}={getattr(self, key)} must be in [0, 1]")
        require(0 < self.clip < 1, f"loss.clip={self.clip} must be in (0, 1)")
        require(
            self.value_clip is None or self.value_clip > 0,
            f"loss.value_clip={self.value_clip} must be above 0 (or null)",
        )
        check_humanline(self)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Return advantages [B, T] (1506.02438, eq. 16); after a row's last masked token the value is 0."""
    rewards, values = rewards * mask, values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return discounted_sums((rewards + gamma * following - values) * mask, gamma * lam)


def whitened(values: Tensor, mean: float, variance: float) -> Tensor:
    """Return values with mean 0 and (population) variance 1."""
    return (values - mean) * (variance + 1e-8) ** -0.5


def value_losses(values: Tensor, old_values: Tensor, targets: Tensor, clip: float | None) -> Tensor:
    """Return half the squared error of each token's value [N], at least that of the clipped value."""
    errors = (values - targets) ** 2
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - targets) ** 2)
    return 0.5 * errors


class PPO(RolloutTrainer):
    """Unit: tokens. Slot: the response; label: its reward."""

    VERSION = 2
    config: PPOConfig
    Config = PPOConfig
    needs = Needs("prompts", reference="logps")
    kind = "policy_gradient"
    formula = (
        "mean over response tokens of max(−Aρ, −A·clip(ρ, 1 ± {clip})) + {value_weight}·½(V − R)², ρ = π_θ/π_old, A by "
        "GAE({gae_gamma}, "
        "{gae_lambda}), whitened; reward: the response's at its last token, −{kl_weight}(log π_old − log π_0) at every "
        "token"
    )
    source = "1707.06347, 2203.02155"
    head = "value"

    def forward(self, model: torch.nn.Module, sequences: Sequences) -> tuple[ResponseLogits, Tensor]:
        """Return logits at response tokens, and the values before them [N]."""
        return response_logits_and_values(model, sequences, self.vocab_size)

    @torch.no_grad()
    def rollout(self, micros: Micros, step: int) -> Micros:
        """Answer, score, note, and whiten the advantages over the global batch."""
        micros = super().rollout(micros, step)
        every = torch.from_numpy(
            np.concatenate([item.notes[:, ADVANTAGE] for items in micros for item in items if item.notes is not None])
        ).double()
        count, total, squares = self.global_sum(torch.tensor(float(len(every))), every.sum(), (every**2).sum())
        mean = total / max(1.0, count)
        variance = max(0.0, squares / max(1.0, count) - mean**2)
        return [[_with_whitened(item, mean, variance) for item in items] for items in micros]

    def noted(self, items: list[Item]) -> list[Item]:
        """Return the items with their notes [n, 5], advantages not yet whitened."""
        batch, config = self.batch_of(items), self.config
        with self.autocast(self.policy):
            out, flat_values = self.forward(self.policy, batch.sequences)
        flat_logps = token_logps(out.logits, out.targets)
        response = batch.sequences.response
        reference = self.reference_logps(batch).to(flat_logps)
        logps, base, values = (by_row(x.to(flat_logps), response) for x in (flat_logps, reference, flat_values))
        lengths = response.sum(dim=1)
        mask = by_row(torch.ones_like(flat_logps), response)
        assert batch.labels is not None
        rewards = -config.kl_weight * (logps - base)
        final = (lengths[:, None] - 1) == torch.arange(rewards.shape[1], device=rewards.device)[None]
        rewards = torch.where(final, rewards + batch.labels.to(rewards)[:, None], rewards)
        advantages = gae(rewards, values, mask, config.gae_gamma, config.gae_lambda)
        targets = (
            advantages + values
            if config.value_target == "returns"
            else discounted_sums(rewards * mask, config.gae_gamma)
        )
        old = by_row(sampled_logps(items, flat_logps), response)
        notes = torch.stack([old, base, values, targets, advantages], dim=-1).float().cpu().numpy()
        return [item._replace(notes=notes[i, : int(lengths[i])]) for i, item in enumerate(items)]

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count response tokens."""
        return {"policy": batch.num_tokens(0), "value": batch.num_tokens(0)}

    def sums(self, out: tuple[ResponseLogits, Tensor], batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the sums of policy and value losses, and what tells how training goes."""
        (logits, targets, _), values = out
        assert batch.notes is not None and batch.labels is not None
        config, logps = self.config, token_logps(logits, targets)
        old, base, old_values, wanted, advantages = batch.notes.to(logps).unbind(dim=1)
        log_ratios = humanline(logps - old, config)
        losses = clipped_losses(log_ratios, advantages, config.clip) + config.drift_weight * log_ratios
        errors = value_losses(values.to(logps), old_values, wanted, config.value_clip)
        tokens, real = len(logps), batch.supervised(0)
        with torch.no_grad():
            outside = ((log_ratios.exp() - 1).abs() > config.clip).to(logps)
            spread = entropies(logits).sum()
        return {"policy": losses.sum(), "value": config.value_weight * errors.sum()}, {
            "reward": Mean(torch.where(real, batch.labels, 0.0).sum(), real.sum()),
            "kl": Mean((old - base).sum(), tokens),
            "clipped": Mean(outside.sum(), tokens),
            "entropy": Mean(spread, tokens),
            "response_tokens": Mean(tokens, real.sum()),
        }


def _with_whitened(item: Item, mean: float, variance: float) -> Item:
    assert item.notes is not None
    notes = item.notes.copy()
    notes[:, ADVANTAGE] = whitened(torch.from_numpy(notes[:, ADVANTAGE]), mean, variance).numpy()
    return item._replace(notes=notes)
