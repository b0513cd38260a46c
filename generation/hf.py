"""Hugging Face backend: model.generate in padded batches, on CPU or one GPU, for any model that transformers loads.

Each batch has its own seed, so a batch does not depend on what ran before it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import models
from generation.calculator_hooks import calculators
from generation.interface import Answer, Progress, Response, cut, derived_seed, forbidden_ids, length_batches
from settings.schema import GenerationConfig, Settings

BatchSampler = Callable[
    [list[list[int]], int], list[Response]
]  # (prompts of one batch, seed) -> responses in their order


class Forbid(LogitsProcessor):
    """Give some ids no probability."""

    def __init__(self, forbidden: Tensor) -> None:
        self.forbidden = forbidden  # [V] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take and return scores [B, V]."""
        return scores.masked_fill(self.forbidden, float("-inf"))


class EntropyWatch(LogitsProcessor):
    """Note the entropy of the distribution that each token is sampled from, at a temperature above 0; cut by nothing.

    It changes no score. Put it behind every processor: generate tempers after them.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.steps: list[Tensor] = []  # [B] nats each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take and return scores [B, V]; an id of -inf has no part in the entropy."""
        logps = (scores.float() / self.temperature).log_softmax(-1)
        self.steps.append(-(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1))
        return scores

    def totals(self, lengths: Sequence[int]) -> list[float]:
        """Return the sum over each response's tokens in nats, and forget them; lengths: tokens of each response."""
        steps = torch.stack(self.steps, dim=1).double().cpu()
        self.steps = []
        return [float(row[:length].sum()) for row, length in zip(steps, lengths, strict=True)]


def left_padded(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, where generation goes on: ids [B, T] and their mask [B, T] of 1 and 0.

    Position ids follow from the mask: the first token that is not padding stands at 0.
    """
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(row)) + row for row in prompts]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def hf_backend(
    model: Any,
    tokenizer: Any,
    generation: GenerationConfig,
    stop: list[int],
    vocab_size: int,
    watch: EntropyWatch | None = None,
) -> BatchSampler:
    """Return a function that samples one batch with model.generate; `watch` sees every step's scores."""
    width = model.get_output_embeddings().weight.shape[0]
    forbid = Forbid(forbidden_ids(tokenizer, stop, vocab_size, width).to(model.device))
    sampling: dict[str, Any] = {"do_sample": False}
    if generation.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": max(0, generation.top_k),
        }
    config = transformers.GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )

    @torch.inference_mode()
    def batch(prompts: list[list[int]], seed: int) -> list[Response]:
        """Answer each prompt, in their order; the seed is the batch's."""
        ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
        longest = ids.shape[1]
        own, model.generation_config = model.generation_config, config  # else its penalties and cuts fill our gaps
        cuda = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(seed)
                hooks = calculators(generation.calculator, tokenizer, longest)
                processors = LogitsProcessorList([forbid, *hooks, *([watch] if watch else [])])
                out = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=processors)
        finally:
            model.generation_config = own
        return [cut(row, stop) for row in out[:, longest:].tolist()]

    return batch


class HfBackend:
    """The model of the `model` group behind the interface of generation.responses."""

    def __init__(self, settings: Settings, tokenizer: Any, stop: list[int]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = models.resolve_dtype(settings.model.policy_dtype, device)
        loaded: Any = models.load_model(settings.model, dtype=dtype, trainable=False)
        self.batch_size = settings.generation.batch_size
        self.batch = hf_backend(loaded.to(device), tokenizer, settings.generation, stop, len(tokenizer))

    def answers(self, prompts: Sequence[list[int]], wanted: Collection[int], seed: int) -> Iterator[Answer]:
        """Yield batch after batch; a batch of which a part is wanted is sampled whole, as it was the first time."""
        for number, batch in enumerate(length_batches(prompts, self.batch_size)):
            if not any(i in wanted for i in batch):
                continue
            responses = self.batch([prompts[i] for i in batch], derived_seed(seed, number))
            for i, (ids, reason) in zip(batch, responses, strict=True):
                if i in wanted:
                    yield Answer(i, ids, reason)

    def close(self) -> None:
        """Let go of the model."""
        del self.batch


def sample(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt_ids: list[list[int]],
    generation: GenerationConfig,
    stop: list[int],
    vocab_size: int,
    seed: int,
) -> list[Response]:
    """Answer every prompt once with a loaded model; (ids with the end-of-turn token, "stop" | "length") in their
    order.

    No response holds an id >= vocab_size, padding, or a special token that ends no turn. Temperature 0 is greedy.
    """
    watched = sample_watched(model, tokenizer, prompt_ids, generation, stop, vocab_size, seed, watch=False)
    return [(ids, reason) for ids, reason, _ in watched]


def sample_watched(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt_ids: list[list[int]],
    generation: GenerationConfig,
    stop: list[int],
    vocab_size: int,
    seed: int,
    watch: bool = True,
) -> list[tuple[list[int], str, float]]:
    """Answer as `sample` does, and give beside it the sum of the tokens' entropies in nats.

    It is 0 for greedy responses, whose tokens are drawn from a point mass, and without `watch`.
    """
    watcher = EntropyWatch(generation.temperature) if watch and generation.temperature > 0 else None
    backend = hf_backend(model, tokenizer, generation, stop, vocab_size, watcher)
    found: dict[int, tuple[list[int], str, float]] = {}
    with Progress(len(prompt_ids), 0) as progress:
        for index, batch in enumerate(length_batches(prompt_ids, generation.batch_size)):
            responses = backend([prompt_ids[i] for i in batch], derived_seed(seed, index))
            nats = watcher.totals([len(ids) for ids, _ in responses]) if watcher else [0.0] * len(batch)
            for i, (ids, reason), total in zip(batch, responses, nats, strict=True):
                found[i] = ids, reason, total
                progress.add(ids)
    return [found[i] for i in range(len(prompt_ids))]
