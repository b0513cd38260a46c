"""What generation backends share: their interface, what ends a reply, what none may hold, seeds, and the order.

A backend is started with (model config, generation config, tokenizer, stop ids, longest prompt with reply in tokens).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

import models
from schema import GenerationConfig, ModelConfig

Reply = tuple[list[int], str]  # response ids with the end-of-turn token, and "stop" or "length"
# (prompts of one batch, its seed, how many of its replies are there already) -> the other replies, in their order
Backend = Callable[[list[list[int]], int, int], Iterable[Reply]]
Start = Callable[[ModelConfig, GenerationConfig, Any, list[int], int], Backend]
FORBIDDEN = -100.0  # the strongest bias that servers take: a factor of 4e-44 on the probability


def cut(ids: list[int], stop: Sequence[int]) -> Reply:
    """Cut after the first stop id; without one the reply ran into max_new_tokens."""
    for i, token in enumerate(ids):
        if token in stop:
            return ids[: i + 1], "stop"
    return ids, "length"


def forbidden_ids(tokenizer: Any, stop: Sequence[int], vocab_size: int, width: int) -> Tensor:
    """Mark what no reply may hold, [width] bool: padding of the vocabulary, and special tokens that end no turn."""
    forbidden = torch.zeros(width, dtype=torch.bool)
    forbidden[vocab_size:] = True
    special = {tokenizer.pad_token_id, *tokenizer.all_special_ids} - set(stop)
    forbidden[sorted(i for i in special if i is not None and i < width)] = True
    return forbidden


def stop_ids_of(config: ModelConfig, tokenizer: Any) -> list[int]:
    """Return models.stop_ids of the model that load_model(config) gives, without loading its weights."""
    source = models.model_source(config)
    if source is None:
        architecture = transformers.LlamaConfig(**{"eos_token_id": tokenizer.eos_token_id, **(config.build or {})})
        own = transformers.GenerationConfig.from_model_config(architecture)
        return models.stop_ids(tokenizer, SimpleNamespace(generation_config=own))
    for read in (transformers.GenerationConfig.from_pretrained, _defaults_of_architecture):
        try:
            return models.stop_ids(tokenizer, SimpleNamespace(generation_config=read(source)))
        except (OSError, ValueError):  # a folder without generation_config.json; a served model that is not here at all
            continue
    return models.stop_ids(tokenizer)


def _defaults_of_architecture(source: str) -> Any:
    architecture = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    return transformers.GenerationConfig.from_model_config(architecture)


def reply_seed(seed: int, index: int) -> int:
    """Return the seed of one reply, below 2**31: a function of its batch's seed and its place in the batch alone."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def in_order(found: Iterable[tuple[int, Reply]], first: int) -> Iterator[Reply]:
    """Yield replies number first, first + 1, ... as soon as each is there, from (number, reply) in any order."""
    waiting: dict[int, Reply] = {}
    for number, reply in found:
        waiting[number] = reply
        while first in waiting:
            yield waiting.pop(first)
            first += 1
    assert not waiting, f"reply {first} never came"
