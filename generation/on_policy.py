"""Sampling inside a training step: each row draws with uniform numbers of its own, whatever it is batched with.

So the responses of a step are the same on one process and on many, in one batch and in eight. Nothing that the policy
may say is forbidden: a policy gradient on samples of another distribution pushes probability into what is never
sampled.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from generation.hf import Forbid, left_padded
from generation.interface import Response, cut


class RowSampler(LogitsProcessor):
    """Leave each row one token: the one at its next uniform number in the cumulated probabilities (temperature 1)."""

    def __init__(self, uniforms: Tensor, start: int) -> None:
        self.uniforms, self.start = uniforms, start  # [B, tokens] in [0, 1); start: columns of the prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take and return scores [B, V]."""
        mass = scores.double().softmax(-1).cumsum(-1)
        at = self.uniforms[:, input_ids.shape[1] - self.start, None] * mass[:, -1:]
        chosen = torch.searchsorted(mass, at, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def uniforms_of(seeds: Sequence[int], count: int) -> Tensor:
    """Return `count` uniform numbers for each seed, [B, count] float64."""
    return torch.stack(
        [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def sample_rows(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    stop: list[int],
    synced: bool,
) -> list[Response]:
    """Answer every prompt from the model's distribution over the tokenizer's vocabulary, row i by seeds[i].

    `synced` keeps the ranks of a sharded model in step.
    """
    width = model.get_output_embeddings().weight.shape[0]
    forbid = Forbid((torch.arange(width) >= len(tokenizer)).to(model.device))
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    sampler = RowSampler(uniforms_of(seeds, max_new_tokens).to(model.device), ids.shape[1])
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        do_sample=False,
    )
    own, model.generation_config = model.generation_config, config  # else its penalties and cuts fill our gaps
    try:
        processors = LogitsProcessorList([forbid, sampler])
        out = model.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=processors, synced_gpus=synced
        )
    finally:
        model.generation_config = own
    return [cut(row, stop) for row in out[:, ids.shape[1] :].tolist()]
