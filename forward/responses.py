"""The logits of response tokens: the one way in which a model is asked, whatever is done to be quick about it.

A batch is computed as padded rows, or without padding where it carries a packed row and the model takes it. The last
layer is computed at response tokens alone: at once, or, where that would be large, chunk by chunk by those who look at
it. Letters: B rows, T tokens, N response tokens of a batch (flat, row after row), V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from forward.attention import CAUSAL, WRAPPED, wrap_library
from forward.chunks import HeadLogits, Logits
from forward.rows import Sequences, collate
from tokens.examples import Tokens

LAZY = 2**23  # logits with more entries than this are computed by chunks


class ResponseLogits(NamedTuple):
    """Logits [N, V] that predict the response tokens targets [N]; rows [N] says whose token each is."""

    logits: Logits
    targets: Tensor
    rows: Tensor


def response_logits(
    model: torch.nn.Module, sequences: Sequences, vocab_size: int, wide_head: bool = False
) -> ResponseLogits:
    """Run the model and keep the logits that predict response tokens, cut to the tokenizer's vocabulary.

    Padding is on the right and the model is causal, so padded rows need no mask and positions no correction.
    wide_head: compute the last layer of a narrow model in float32.
    """
    found, can = sequences.predictions(), abilities_of(model)
    lazy = can.has_plain_head and len(found.targets) * vocab_size > LAZY
    head: Any = unwrapped(model).get_output_embeddings() if lazy or wide_head else None

    def last_layer(hidden: Tensor) -> Any:
        states = at_responses(hidden, sequences)
        wide = wide_head and hidden.dtype in (torch.float16, torch.bfloat16)
        if wide:
            _check_finite(states)
        logits = HeadLogits(states, head.weight, head.bias, vocab_size, wide)
        return states if lazy else logits.whole() if wide else head_forward(hidden)

    head_forward: Any = None if head is None else head.forward
    with replaced(head, last_layer) if head is not None else nullcontext():
        out = _run(model, sequences, can)
    if lazy:
        wide = wide_head and out.dtype in (torch.float16, torch.bfloat16)
        return ResponseLogits(HeadLogits(out, head.weight, head.bias, vocab_size, wide), found.targets, found.rows)
    logits = out if out.dim() == 2 else at_responses(out, sequences)
    return ResponseLogits(logits[:, :vocab_size], found.targets, found.rows)


@contextmanager
def replaced(head: Any, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let a module compute `forward` instead of its own."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _run(model: torch.nn.Module, sequences: Sequences, can: "Abilities") -> Tensor:
    """Run the model on the packed row, if there is one and it can, else on padded rows; return what its head gave."""
    packed, options = sequences.packed, {}
    if packed is not None and can.takes_layout:
        options = {"position_ids": packed.positions, "logits_to_keep": packed.places, "layout": packed.layout}
        options |= {"input_ids": packed.ids, "attention_mask": _no_mask(packed.ids)}
    else:
        found = sequences.predictions()
        keep = torch.arange(found.start, found.stop, device=sequences.ids.device)
        options = {"input_ids": sequences.ids, "logits_to_keep": keep}
        if can.takes_layout:  # a mask would change nothing, keep flash kernels away and repeat keys and values
            options |= {"attention_mask": _no_mask(sequences.ids), "layout": CAUSAL}
        else:
            options |= {"attention_mask": sequences.attention.long()}
    return model(**options, use_cache=False).logits


def _no_mask(ids: Tensor) -> Tensor:
    """Return what the library takes for a mask that is ready, so that it makes none; nobody looks at it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)


def at_responses(values: Tensor, sequences: Sequences) -> Tensor:
    """Take values [B, C, ...] of the computed columns (of a packed row [1, N, ...]) at the response tokens [N, ...]."""
    found = sequences.predictions()
    if sequences.packed is not None and values.shape[:2] == (1, len(found.rows)):
        return values[0]
    return values[found.rows, found.columns - found.start]


def last_token_scores(model: torch.nn.Module, sequences: Sequences) -> Tensor:
    """Return a reward model's score of each row [rows], taken at its last attended token: the end of the response.

    The library takes it at the last token that is not the model's padding, which may be what ends a response. So for
    this call padding is an id with which no row ends.
    """
    config = unwrapped(model).config.get_text_config()
    ids, attention = sequences.ids, sequences.attention
    ends = set(ids.gather(1, attention.sum(dim=1, keepdim=True) - 1).flatten().tolist())
    padding, own = next(i for i in range(config.vocab_size) if i not in ends), config.pad_token_id
    config.pad_token_id = padding
    try:
        out = model(input_ids=ids.masked_fill(~attention, padding), attention_mask=attention.long(), use_cache=False)
    finally:
        config.pad_token_id = own
    scores = out.logits[:, 0]
    return scores if scores.dtype == torch.float64 else scores.float()


def unwrapped(model: Any) -> Any:
    """Return the model inside DistributedDataParallel."""
    return getattr(model, "module", model)


def _check_finite(hidden: Tensor) -> None:
    if not bool(hidden.isfinite().all()):
        raise ValueError(
            f"the teacher's hidden states are not finite in {hidden.dtype}: set model.reference_dtype=bfloat16, which "
            "is coarser, or float32, which takes twice the memory"
        )


@contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every part of it back into its own mode afterward.

    For what is scored and not learned from: with dropout two scorings of the same tokens would differ.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- what a model can do, seen once


class Abilities(NamedTuple):
    """What a model was seen to do right.

    takes_layout: its attention goes by segments, so that rows need no padding and no mask. has_plain_head: its logits
    are its last layer's, without a scale or a cap, and that layer's weight is whole in this process.
    """

    takes_layout: bool
    has_plain_head: bool


_seen: WeakKeyDictionary[Any, Abilities] = WeakKeyDictionary()


def abilities_of(model: torch.nn.Module) -> Abilities:
    """Try the fast ways on a few tokens beside the plain one, once a model; a way that gives other logits is not taken.

    All processes that share a model ask together: what is tried is a forward pass.
    """
    inner = unwrapped(model)
    if inner not in _seen:
        _seen[inner] = _tried(inner)
    return _seen[inner]


@torch.no_grad()
def _tried(model: Any) -> Abilities:
    device = next(model.parameters()).device
    tokens = [Tokens([1, 2, 3, *reply], [False] * 3 + [True] * len(reply)) for reply in ([4, 5, 6, 7], [6, 5, 4])]
    batch = collate(tokens, 0, "prompts").to(device)
    padded = batch._replace(packed=None)
    if not hasattr(model, "config"):  # a module that is none of the library's
        return Abilities(False, False)
    with scoring(model):
        slow = Abilities(False, False)
        plain = _asked(model, padded, slow)
        takes_layout = _windowless(model) and all(
            _agrees(plain, partial(_asked, model, rows, Abilities(True, False))) for rows in (batch, padded)
        )
        head = model.get_output_embeddings()
        if type(head) is not torch.nn.Linear:
            return Abilities(takes_layout, False)
        with replaced(head, lambda hidden: hidden):
            hidden = _asked(model, padded, slow)
        whole_here = not hasattr(head.weight, "ds_id") and not hasattr(head.weight, "to_local")
        has_plain_head = whole_here and _agrees(plain, HeadLogits(hidden, head.weight, head.bias, plain.shape[1]).whole)
    return Abilities(takes_layout, has_plain_head)


def _asked(model: Any, sequences: Sequences, can: Abilities) -> Tensor:
    out = _run(model, sequences, can)
    return at_responses(out, sequences) if out.dim() == 3 else out


def _agrees(plain: Tensor, other: Callable[[], Tensor]) -> bool:
    """Tell whether another way gives the same logits, up to the rounding of their precision."""
    try:
        found = other()
    except (TypeError, ValueError, RuntimeError):  # the model's code does not know what the way needs
        return False
    tolerance = 1e-4 if plain.dtype in (torch.float32, torch.float64) else 0.05
    return found.shape == plain.shape and bool((found - plain).abs().max() <= tolerance * plain.abs().max())


def _windowless(model: Any) -> bool:
    """Tell whether every layer sees all that came before, by a kind of attention that is wrapped."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return config._attn_implementation in WRAPPED and kinds <= {"full_attention"} and (bool(kinds) or not window)


wrap_library()
