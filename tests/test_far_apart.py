"""Pairs whose log-ratios are far from 0, as those of long responses are, have losses and gradients that are numbers."""

import pytest
import torch

from trainers import log_ratio
from trainers.dpo import divergence_score, dpo_loss

BETA = 0.1
LOSSES = {
    "robust-dpo": lambda u, v: log_ratio.robust_dpo_loss(u, v, BETA, 0.1),
    "hinge": lambda u, v: log_ratio.hinge_loss(u, v, BETA),
    "exo": lambda u, v: log_ratio.exo_loss(u, v, BETA, 1e-3),
    "nca": lambda u, v: log_ratio.nca_loss(u, v, BETA),
    "apo-zero": lambda u, v: log_ratio.apo_zero_loss(u, v, BETA),
    "apo-down": lambda u, v: log_ratio.apo_down_loss(u, v, BETA),
    "discopop": lambda u, v: log_ratio.discopop_loss(u, v, BETA, 0.05),
}
LOSSES |= {
    f"dpo, {divergence} {alpha}": lambda u, v, divergence=divergence, alpha=alpha: dpo_loss(
        *(divergence_score(ratio, divergence, alpha) for ratio in (u, v)), BETA
    )
    for divergence, alpha in (("reverse_kl", 1.0), ("js", 1.0), ("forward_kl", 1.0), ("alpha", 0.5), ("alpha", 0.01))
}


def at(name: str, u: float, v: float) -> tuple[float, float, float]:
    """Return a loss and its slopes by both log-ratios, in float32."""
    ratios = [torch.tensor([ratio], requires_grad=True) for ratio in (u, v)]
    loss = LOSSES[name](*ratios).sum()
    slopes = torch.autograd.grad(loss, ratios)
    return float(loss.detach()), float(slopes[0]), float(slopes[1])


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_that_is_won_by_far_is_a_number(name):
    for u, v in ((1.0, -95.0), (0.0, -1000.0), (40.0, -20_000.0)):
        found = torch.tensor(at(name, u, v))
        assert found.isfinite().all(), (u, v, found)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_that_is_lost_by_far_is_a_number(name):
    for u, v in ((-95.0, -1.0), (-95.0, -95.0), (-1000.0, 0.0), (-20_000.0, -20_000.0)):
        found = torch.tensor(at(name, u, v))
        assert found.isfinite().all(), (u, v, found)


def test_where_nothing_overflows_nothing_is_bounded():
    for alpha in (1.0, 0.5):
        ratio = torch.tensor([-80.0, -3.0, 0.0, 50.0])
        torch.testing.assert_close(divergence_score(ratio, "alpha", alpha), -torch.exp(-alpha * ratio) / alpha)
