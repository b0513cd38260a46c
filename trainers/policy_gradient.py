"""What losses of policy gradients share. Letters: B rows, T tokens, N response tokens (flat, row after row)."""

import torch
from torch import Tensor


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Return sum_{s >= t} discount^(s - t) values_s for every t of rows [B, T]."""
    sums, following = torch.empty_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t] + discount * following
        sums[:, t] = following
    return sums


def clipped_losses(log_ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Return max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) of each token [N], from log rho (PPO, arXiv 1707.06347, eq.
    7).
    """
    ratios = log_ratios.exp()
    return torch.maximum(-advantages * ratios, -advantages * ratios.clamp(1 - clip, 1 + clip))


def by_row(values: Tensor, response: Tensor) -> Tensor:
    """Put flat values [N] of the response tokens [B, T] into rows [B, T'], left-aligned, 0 behind."""
    lengths = response.sum(dim=1)
    inside = torch.arange(int(lengths.max().clamp_min(1)), device=values.device)[None] < lengths[:, None]
    return torch.zeros(inside.shape, dtype=values.dtype, device=values.device).masked_scatter(inside, values)
