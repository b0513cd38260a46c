"""Attention over a packed row: each segment sees itself and the one before it, and nothing is masked away.

The library's attention functions are wrapped once: a model that is given `layout=` takes ours, any other call the
library's. Letters: H heads, G key heads, L tokens of the packed row, D size of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from forward.packing import Layout

try:  # kernels for rows of any length, on GPUs
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

# Kinds whose library functions are wrapped. eager is a function of each model's own file, which cannot be.
CAUSAL = "causal"  # in place of a layout: rows of their own, each token sees all before it
WRAPPED = ("sdpa", "flash_attention_2", "flash_attention_3")


def by_segments(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None, dropout: float
) -> Tensor:
    """Return the attention [1, L, H, D] of queries [1, H, L, D] over keys and values [1, G, L, D], by segments."""
    lengths, grouped = list(layout.lengths), query.shape[1] != key.shape[1]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    found = []
    for number, (own, place) in enumerate(zip(queries, layout.before, strict=True)):
        seen_keys, seen_values = (
            parts[number] if place < 0 else torch.cat([parts[place], parts[number]], dim=2) for parts in (keys, values)
        )
        mask = layout.mask(number, own)
        part = F.scaled_dot_product_attention(
            own,
            seen_keys,
            seen_values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and own.shape[2] > 1,
            scale=scale,
            enable_gqa=grouped,
        )
        found.append(part.transpose(1, 2))
    return torch.cat(found, dim=1)


def by_kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """Return the same by a kernel for rows of any length: a prompt's keys are laid before each of its responses."""
    assert varlen_attn is not None
    flat_query, flat_key, flat_value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.shares:
        flat_key, flat_value = flat_key[layout.keys], flat_value[layout.keys]
    longest = max(layout.lengths), max(map(layout.seen, range(len(layout.lengths))))
    starts = layout.query_starts, layout.key_starts
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if flat_query.shape[1] != flat_key.shape[1]:
        options["enable_gqa"] = True
    found: Any = varlen_attn(flat_query, flat_key, flat_value, *starts, *longest, **options)
    return found.unsqueeze(0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
) -> tuple[Tensor, None]:
    """Return a layer's attention [1, L, H, D] over a packed row, as the library's functions return it."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if varlen_attn is not None and query.is_cuda and half and not dropout:
        found = by_kernel(query, key, value, layout, scaling)
    else:
        found = by_segments(query, key, value, layout, scaling, dropout)
    return found.contiguous(), None


def _wrapped(plain: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layout: Layout | str | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> Any:
        """Return what `plain` does, or attention by segments where there is a layout of them."""
        if isinstance(layout, Layout):
            return attend(query, key, value, layout, scaling, dropout)
        attention_mask = None if layout == CAUSAL else attention_mask
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options)

    attention.is_ours = True  # type: ignore[attr-defined]
    return attention


def wrap_library() -> None:
    """Teach the library's attention functions `layout=`; again is nothing."""
    for kind in WRAPPED:
        plain = ALL_ATTENTION_FUNCTIONS.get(kind)
        if plain is not None and not hasattr(plain, "is_ours"):
            ALL_ATTENTION_FUNCTIONS.register(kind, _wrapped(plain))
