"""model.activation_checkpointing: what a block computes again in the backward pass, and what it keeps.

`recompute=all` keeps a block's input alone: a third more arithmetic. `recompute=cheap` keeps what matrix products and
attention gave and computes the rest again, which costs almost no arithmetic: norms, activations, rotations, copies.
"""

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from settings.schema import ModelConfig

# Operators whose results are dear: names without their overloads, those of another device or version among them.
DEAR = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
)


def keeps_dear(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Return that the result of a matrix product or of attention is kept, and that any other is computed again."""
    dear = operator.name().split(".")[0] in DEAR if hasattr(operator, "name") else False
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(model: Any, config: ModelConfig) -> None:
    """Let a model's blocks compute again in the backward pass what model.recompute says, in place."""
    options: dict[str, Any] = {"use_reentrant": False}
    if config.recompute == "cheap":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keeps_dear)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
