"""What the adapters of golden cases share."""

from typing import Any

import torch
from torch import Tensor

from functional import row_sums, token_logps

Variant = dict[str, Any]
Outputs = dict[str, Any]


class Skip(Exception):
    """Why a variant is not run: a method not built yet, or a reference's quirk by number."""


def response_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift once: (logits [N, V], targets [N], rows [N]) of the labeled tokens, row after row."""
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return logits[rows, columns], labels[rows, columns + 1], rows


def gradient(scalar: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(scalar, leaf, retain_graph=True)[0]


def forward_pair(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen [B] and rejected [B] log-probs, the chosen token-mean NLL, and the logits leaf."""
    logits = inputs["all_logits"].requires_grad_()
    size = len(inputs["chosen_labels"])
    sums, nll = [], torch.tensor(0.0)
    for i, side in enumerate(("chosen", "rejected")):
        labels = inputs[f"{side}_labels"]
        flat, targets, rows = response_tokens(logits[i * size : (i + 1) * size, : labels.shape[1]], labels)
        logps = token_logps(flat, targets)
        sums.append(row_sums(logps, rows, size))
        if side == "chosen":
            nll = -logps.sum() / len(logps)
    return sums[0], sums[1], nll, logits
