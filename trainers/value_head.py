"""The value head: a causal model's estimate of the reward to come, for actor-critic methods (PPO).

It lives on the policy, so that DDP, FSDP, optimizer and checkpoints treat it as any parameter; FINAL is written without
it.
"""

from typing import Any

import torch
from torch import Tensor

from forward.responses import ResponseLogits, at_responses, response_logits, unwrapped
from forward.rows import Sequences

VALUE_HEAD = "value_head."  # names of its parameters begin so


class ValueHead(torch.nn.Linear):
    """A number for each position that gets logits; it starts at zero. values [B, C]: those of the last forward pass."""

    values: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)


def add_value_head(model: Any) -> None:
    """Give a causal model (or one with LoRA) `value_head`, which reads what its output embeddings read, in the same
    forward pass.

    So the head is computed where FSDP and DDP expect parameters to be used, and on response positions only.
    """
    model.value_head = ValueHead(model.config.get_text_config().hidden_size)

    def read(module: torch.nn.Module, hidden: tuple[Tensor, ...]) -> None:
        model.value_head.values = model.value_head(hidden[0].to(model.value_head.weight.dtype)).squeeze(-1)

    model.get_output_embeddings().register_forward_pre_hook(read)


def response_logits_and_values(
    model: torch.nn.Module, sequences: Sequences, vocab_size: int
) -> tuple[ResponseLogits, Tensor]:
    """Return response_logits, and the value head's estimate before each response token [N] (see add_value_head)."""
    out = response_logits(model, sequences, vocab_size)
    return out, at_responses(unwrapped(model).value_head.values, sequences)
