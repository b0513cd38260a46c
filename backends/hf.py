"""Hugging Face backend: model.generate in padded batches. It takes any model that loads, built or cut ones too."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import models
from backends.replies import Backend, Reply, cut, forbidden_ids
from calculator_generation import calculators
from schema import GenerationConfig, ModelConfig


def start(config: ModelConfig, generation: GenerationConfig, tokenizer: Any, stop: list[int], longest: int) -> Backend:
    """Load the model onto the GPU if there is one, and return hf_backend of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = models.resolve_dtype(config.policy_dtype, device)
    model: Any = models.load_model(config, dtype=dtype, trainable=False).to(device)  # type: ignore[arg-type]
    positions = getattr(model.config, "max_position_embeddings", longest)
    if longest > positions:
        print(f"note: prompt and reply may take {longest} tokens, the model was made for {positions}")
    return hf_backend(model, tokenizer, generation, stop, len(tokenizer))


class _Forbid(LogitsProcessor):
    """Give some ids no probability."""

    def __init__(self, forbidden: Tensor) -> None:
        self.forbidden = forbidden  # [V] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take and return scores [B, V]."""
        return scores.masked_fill(self.forbidden, float("-inf"))


def hf_backend(model: Any, tokenizer: Any, generation: GenerationConfig, stop: list[int], vocab_size: int) -> Backend:
    """Return a function that samples one batch with model.generate; the whole batch has one seed."""
    width = model.get_output_embeddings().weight.shape[0]
    forbid = _Forbid(forbidden_ids(tokenizer, stop, vocab_size, width).to(model.device))
    sampling: dict[str, Any] = {"do_sample": False}
    if generation.temperature > 0:
        sampling = {
            "do_sample": True, "temperature": generation.temperature,
            "top_p": generation.top_p, "top_k": max(0, generation.top_k),
        }  # fmt: skip
    config = transformers.GenerationConfig(
        max_new_tokens=generation.max_new_tokens, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
        use_cache=True, **sampling,
    )  # fmt: skip

    @torch.inference_mode()
    def batch(prompts: list[list[int]], seed: int, first: int = 0) -> list[Reply]:
        assert first == 0, "a batch with one seed is sampled as a whole"
        longest = max(map(len, prompts))
        pad = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
        attention = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in (pad, attention))
        own, model.generation_config = model.generation_config, config  # else its penalties and cuts fill our gaps
        cuda = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(seed)
                # Position ids follow from the mask: the first token that is not padding stands at 0.
                processors = LogitsProcessorList([forbid, *calculators(generation.calculator, tokenizer, longest)])
                out = model.generate(
                    ids, attention_mask=mask, generation_config=config, logits_processor=processors
                )
        finally:
            model.generation_config = own
        return [cut(row, stop) for row in out[:, longest:].tolist()]

    return batch
