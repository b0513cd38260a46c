"""The numbers of a model of any kind: its configuration, built on the meta device, counted."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import models
from engine import export
from estimate.arithmetic import Model
from estimate.llama import source_of
from settings.schema import ModelConfig


def architecture(config: ModelConfig) -> Any:
    """Return the model's Hugging Face configuration; ValueError if there is none to read."""
    source = source_of(config)
    if source is None:
        build = dict(config.build or {})
        if "vocab_size" not in build:
            build["vocab_size"] = len(models.load_tokenizer(replace(config, load_from=None, from_checkpoint=None)))
        return LlamaConfig(**build)
    local = models.local_source(source)
    offline = not Path(local).is_dir() and not models.hub_reachable()
    try:
        return AutoConfig.from_pretrained(
            local, trust_remote_code=False, local_files_only=offline or Path(local).is_dir()
        )
    except (OSError, ValueError, KeyError) as error:
        reason = "the hub cannot be reached" if offline else str(error).strip().splitlines()[0]
        raise ValueError(f"no architecture: cannot read config.json of {source!r} ({reason})") from error


def counted(config: ModelConfig) -> Model:
    """Count a model's parameters on the meta device, LoRA's among them; ValueError for mixtures of experts."""
    found = architecture(config)
    key = json.dumps([found.to_dict(), config.num_layers, config.use_peft, config.peft], default=str, sort_keys=True)
    return _counted(key, _Once(found, config))


class _Once:
    """What the count is made from, all alike as a cache's key: the text beside it says what it holds."""

    def __init__(self, architecture: Any, config: ModelConfig) -> None:
        self.architecture, self.config = architecture, config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=16)
def _counted(key: str, made_from: _Once) -> Model:
    found, config = made_from.architecture, made_from.config
    text = found.get_text_config()
    if (getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1) > 1:
        raise ValueError(f"{type(text).__name__} is a mixture of experts, which the estimator does not know")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(found)
        if config.num_layers is not None:
            models.keep_layers(model, config.num_layers)
        total = sum(p.numel() for p in model.parameters())
        largest = max(p.numel() for p in model.parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        layers = text.num_hidden_layers if config.num_layers is None else config.num_layers
        block = blocks_of(model, layers)
        adapters = inputs = ranks = 0
        if config.use_peft:
            adapted = export.add_lora(model, config)
            lora = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
            adapters = sum(p.numel() for p in lora.values())
            inputs = sum(p.shape[1] for n, p in lora.items() if "lora_A" in n) // layers
            ranks = sum(p.shape[1] for n, p in lora.items() if "lora_B" in n) // layers
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Model(
        hidden=text.hidden_size,
        layers=layers,
        attention=heads * size,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * size,
        intermediate=text.intermediate_size,
        gated=any("gate" in name for name, _ in model.named_parameters()),
        vocab=head.shape[0],
        parameters=total,
        embedding=embedding.numel(),
        tied=head is embedding,
        block=block,
        largest=largest,
        adapters=adapters,
        adapter_inputs=inputs,
        adapter_ranks=ranks,
    )


def blocks_of(model: Any, layers: int) -> int:
    """Return the parameters of one of the decoder's blocks."""
    from torch.nn import ModuleList

    blocks = next(m for m in model.base_model.modules() if isinstance(m, ModuleList) and len(m) == layers)
    return sum(p.numel() for p in blocks.parameters()) // layers
