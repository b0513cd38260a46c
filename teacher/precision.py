"""In which precision a teacher is asked: that of its weights, its last layer in float32."""

import torch

from forward.responses import ResponseLogits, response_logits
from forward.rows import Sequences
from models import NumericPath, resolve_dtype
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
    with torch.autocast(sequences.ids.device.type, enabled=False):
        return response_logits(model, sequences, vocab_size, wide_head=True)
