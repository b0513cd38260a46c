"""In which precision a teacher is asked: that of its weights, its last layer in float32.

Letters: B rows, C columns, N response tokens of a batch (flat), H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dataloader import Sequences
from functional import CHUNK_ELEMENTS
from models import NumericPath, ResponseLogits, predicting, resolve_dtype, response_logits
from settings.schema import ModelConfig


def teacher_dtype(config: ModelConfig, device: torch.device | str, narrow: torch.dtype = torch.float16) -> torch.dtype:
    """Return the precision of a teacher; auto is `narrow` on a GPU. With float16 advantages have an eighth of
    bfloat16's error.

    Most of that error is in the weights, which bfloat16 rounds to 8 bits (docs/cache_format.md).
    """
    return resolve_dtype(config.reference_dtype, device, on_gpu=narrow)


def teacher_path(config: ModelConfig, device: torch.device | str) -> NumericPath:
    """Return how teacher_logits asks a teacher."""
    dtype = teacher_dtype(config, device)
    return NumericPath(dtype, dtype, torch.float32, config.attn_implementation or "default")


@torch.no_grad()
def teacher_logits(model: torch.nn.Module, sequences: Sequences, vocab_size: int) -> ResponseLogits:
    """Return response_logits of a frozen teacher: in the precision of its weights, its last layer in float32.

    The difference of two teachers is small beside their logits, and bfloat16 rounds a logit of 20 by up to 0.06
    (docs/cache_format.md has what was measured). A teacher that computes in float32 gives response_logits bit by bit.
    """
    inner: Any = getattr(model, "module", model)  # DDP wraps the model
    with torch.autocast(sequences.ids.device.type, enabled=False), _float32_head(inner, sequences.response):
        return response_logits(model, sequences, vocab_size)


@contextmanager
def _float32_head(model: Any, response: Tensor) -> Iterator[None]:
    """Let the last layer take narrow hidden states at the response positions alone, in float32: [B, C, H] -> [N, V].

    What a model does to its logits afterwards (a scale, a soft cap) goes by entries and works on [N, V] as well.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    _, rows, kept = predicting(response)
    plain = head.forward

    def forward(hidden: Tensor) -> Tensor:
        if hidden.dtype in (torch.float32, torch.float64):
            return plain(hidden)
        return _float32_linear(hidden[rows, kept], head.weight, head.bias)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _float32_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden [N, H] times weight [V, H] in float32; the weight is widened by pieces, never as a whole."""
    if not bool(hidden.isfinite().all()):
        raise ValueError(
            f"the teacher's hidden states are not finite in {hidden.dtype}: set model.reference_dtype=bfloat16, which "
            "is coarser, or float32, which takes twice the memory"
        )
    wide, num_rows = hidden.float(), max(1, CHUNK_ELEMENTS // weight.shape[1])
    logits = torch.empty(len(wide), len(weight), dtype=torch.float32, device=wide.device)
    for start in range(0, len(weight), num_rows):
        piece = weight[start : start + num_rows].float()
        torch.mm(wide, piece.T, out=logits[:, start : start + num_rows])
    return logits if bias is None else logits.add_(bias.float())
