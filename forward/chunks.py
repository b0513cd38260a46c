"""Functions of logits, chunk by chunk: no [N, V] tensor of them need exist.

Logits are a tensor, or `HeadLogits`: the hidden states that a model's last layer reads, and that layer's weight. Either
way a function of a chunk of logits [n, V] is applied to one chunk after the other, and once more in the backward pass,
which writes the gradient of the logits, or of hidden states and weight, as it goes. Letters: N response tokens, V
vocabulary, H hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Computing = Callable[[], AbstractContextManager[Any]]

# Entries of one chunk of [n, V], whatever the vocabulary: 128 MiB in float32, and 16 MiB on a CPU, as fast with these.
# The system's allocator gives larger blocks back when they are freed, and has every page cleared anew.
CHUNK_ELEMENTS = {"cuda": 2**25, "cpu": 2**22}


def chunk_elements(device: torch.device) -> int:
    """Return how many logits a chunk has on a device."""
    return CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]


def autocast_now(kind: str) -> Computing:
    """Return what enters autocast on a kind of device as it is now: later, and elsewhere, it may be another."""
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype, enabled=enabled)


class HeadLogits:
    """Logits [N, width] that are computed when a chunk of them is asked for: hidden [N, H] times weight [V, H].

    wide: in float32, whatever the two are stored in (without gradient). computing: the context in which they are
    computed, whoever asks and whenever; by default under autocast as it is now.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        width: int,
        wide: bool = False,
        computing: Computing | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.wide = hidden, weight, bias, wide
        self.width = min(width, len(weight))
        self.computing = computing or autocast_now(hidden.device.type)

    @property
    def shape(self) -> torch.Size:
        """Return what the tensor's shape would be."""
        return torch.Size((len(self.hidden), self.width))

    @property
    def device(self) -> torch.device:
        """Return where they are computed."""
        return self.hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Any) -> "HeadLogits":
        return HeadLogits(self.hidden[rows], self.weight, self.bias, self.width, self.wide, self.computing)

    def detach(self) -> "HeadLogits":
        """Return the same without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return HeadLogits(self.hidden.detach(), self.weight.detach(), bias, self.width, self.wide, self.computing)

    def whole(self) -> Tensor:
        """Return the tensor [N, width]."""
        weight, bias = self.weight[: self.width], None if self.bias is None else self.bias[: self.width]
        with self.computing():
            return _float32_linear(self.hidden, weight, bias) if self.wide else F.linear(self.hidden, weight, bias)


@torch.no_grad()
def _float32_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden [N, H] times weight [V, H] in float32; the weight is widened by pieces, never as a whole."""
    wide, num_rows = hidden.float(), max(1, chunk_elements(weight.device) // weight.shape[1])
    logits = torch.empty(len(wide), len(weight), dtype=torch.float32, device=wide.device)
    for start in range(0, len(weight), num_rows):
        piece = weight[start : start + num_rows].float()
        torch.mm(wide, piece.T, out=logits[:, start : start + num_rows])
    return logits if bias is None else logits.add_(bias.float())


Logits = Tensor | HeadLogits


def whole(logits: Logits) -> Tensor:
    """Return logits as a tensor."""
    return logits if isinstance(logits, Tensor) else logits.whole()


def nothing(logits: Logits) -> Tensor:
    """Return 0 as a function of the logits: where nothing is learned the graph stays whole, for all ranks to agree."""
    if isinstance(logits, Tensor):
        return logits.sum() * 0
    zero = logits.hidden.sum() * 0 + logits.weight[:1].sum() * 0
    return zero if logits.bias is None else zero + logits.bias[:1].sum() * 0


def chunked(
    function: Callable[..., Tensor],
    logits: Logits,
    others: Sequence[Tensor | HeadLogits] = (),
    chunk: int | None = None,
    held: int = 1,
) -> Tensor:
    """Apply function(logits [n, V], *others [n, ...]) -> [n, ...] to chunks of rows and join the results.

    Others are data, without gradient; logits among them come as a chunk of logits. `held` says how many tensors as
    large as the chunk the function needs at once: the chunk shrinks by it.
    """
    size = chunk or max(1, chunk_elements(logits.device) // (held * logits.shape[-1]))
    if isinstance(logits, Tensor):
        return _OfTensor.apply(function, size, others, logits)
    plain = logits.hidden, logits.weight, logits.bias
    return _OfHead.apply(function, size, others, (logits.width, logits.wide, logits.computing), *plain)


def _pieces(others: Sequence[Tensor | HeadLogits], start: int, stop: int) -> list[Tensor]:
    """Return rows start to stop of each, logits as tensors."""
    return [whole(other[start:stop]) for other in others]


class _OfTensor(torch.autograd.Function):
    """A function of a tensor of logits; the gradient is written in place of a copy (split and cat would hold two)."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], size: int, others: Sequence[Any], logits: Tensor) -> Tensor:
        """Return the joined results [N, ...]."""
        ctx.function, ctx.size, ctx.others = function, size, others
        ctx.save_for_backward(logits)
        starts = range(0, max(1, len(logits)), size)
        return torch.cat([function(logits[s : s + size], *_pieces(others, s, s + size)) for s in starts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of logits [N, V]."""
        (logits,), size = ctx.saved_tensors, ctx.size
        result = torch.empty_like(logits)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            result[rows] = _slope(
                ctx.function, logits[rows], _pieces(ctx.others, start, start + size), gradients[0][rows]
            )
        return None, None, None, result


def _slope(function: Callable[..., Tensor], part: Tensor, others: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Return the gradient of a chunk of logits."""
    leaf = part.detach().requires_grad_()
    with torch.enable_grad():
        out = function(leaf, *others)
    return torch.autograd.grad(out, leaf, gradient)[0]


class _OfHead(torch.autograd.Function):
    """A function of hidden states and the head's weight."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        size: int,
        others: Sequence[Any],
        how: tuple[int, bool, Computing],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return the joined results [N, ...]."""
        ctx.function, ctx.size, ctx.others, ctx.how = function, size, others, how
        ctx.save_for_backward(hidden, weight, bias)
        logits = HeadLogits(hidden, weight, bias, *how)
        starts = range(0, max(1, len(hidden)), size)
        return torch.cat([function(logits[s : s + size].whole(), *_pieces(others, s, s + size)) for s in starts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias; those of the weight are summed in float32."""
        hidden, weight, bias = ctx.saved_tensors
        own = ctx.needs_input_grad[4:]
        logits = HeadLogits(hidden, weight, bias, *ctx.how)
        grads = [
            torch.empty_like(hidden) if own[0] else None,
            _sums_like(weight) if own[1] else None,
            _sums_like(bias) if bias is not None and own[2] else None,
        ]
        for start in range(0, len(hidden), ctx.size):
            rows = slice(start, start + ctx.size)
            others = _pieces(ctx.others, start, start + ctx.size)
            _add(grads, _slope(ctx.function, logits[rows].whole(), others, gradients[0][rows]), logits, rows)
        return (
            None,
            None,
            None,
            None,
            *(
                None if grad is None else grad.to(like.dtype)
                for grad, like in zip(grads, (hidden, weight, bias), strict=True)
            ),
        )


def _sums_like(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _add(grads: list[Tensor | None], slope: Tensor, logits: HeadLogits, rows: slice) -> None:
    """Add what a chunk's gradient [n, width] gives hidden states, weight and bias, in the precision of the logits."""
    hidden, weight, bias = grads
    dtype = slope.dtype
    if hidden is not None:
        hidden[rows] = slope @ logits.weight[: logits.width].to(dtype)
    if weight is not None:
        into, states = weight[: logits.width], logits.hidden[rows].to(dtype)
        if into.dtype == dtype:
            into.addmm_(slope.T, states)
        else:
            into += slope.T @ states
    if bias is not None:
        bias[: logits.width] += slope.sum(0)
