"""The numbers of a Llama or a relative from its keywords alone: arithmetic in place of a model on the meta device.

No torch is imported: a plan is printed in seconds.
"""

import json
from pathlib import Path
from typing import Any

from estimate.arithmetic import Model
from estimate.text_lengths import on_this_machine
from settings.paths import found
from settings.schema import ModelConfig

# Keywords of transformers' LlamaConfig that say how many parameters there are, with its defaults.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# What its relatives have instead. A Qwen's projections of queries, keys and values have biases, always.
RELATIVES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "attention_bias": False, "mlp_bias": False},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "mlp_bias": False},
}
# Those that change no count.
WITHOUT_COUNT = {"max_position_embeddings", "initializer_range", "rms_norm_eps", "hidden_act", "rope_parameters"}


def source_of(config: ModelConfig) -> str | None:
    """Return where the architecture is read from: the first of from_checkpoint, load_from that is a folder, or
    name_or_path.

    A stage of a pipeline that has not run yet has no folder; its model has the shape of the one that it started from.
    """
    for source in (config.from_checkpoint, config.load_from):
        if source and (Path(source).expanduser() / "config.json").is_file():
            return source
    if config.name_or_path:
        return config.name_or_path
    return None if config.build else config.from_checkpoint or config.load_from


def llama_of(config: ModelConfig) -> Model | None:
    """Count the parameters of a Llama, Mistral or Qwen 2 that is built from keywords or described by a config.json.

    None for what this arithmetic does not know: another architecture, adapters elsewhere than on a block's linear
    layers, a tokenizer without its file.
    """
    kind, source = "llama", source_of(config)
    if source is None:
        keys = dict(config.build or {})
        if keys.keys() - DEFAULTS.keys() - WITHOUT_COUNT:
            return None
        keys.setdefault("vocab_size", _tokens(config.tokenizer_name_or_path))
    else:
        described = _described(source)
        kind = described.get("model_type", "")
        if kind not in RELATIVES:
            return None
        keys = {**RELATIVES[kind], **described}
        if kind != "llama":
            keys |= {key: RELATIVES[kind][key] for key in ("attention_bias", "mlp_bias") if key in RELATIVES[kind]}
    if keys.get("vocab_size") is None or not all(isinstance(keys.get(k, 1), int | None) for k in DEFAULTS):
        return None
    return _counted({**DEFAULTS, **keys}, config, kind)


def kind_of(config: ModelConfig) -> str | None:
    """Return the architecture that a model's config.json names; None where it is not on this machine."""
    source = source_of(config)
    return _described(source).get("model_type") if source is not None else None


def _described(source: str) -> dict[str, Any]:
    file = on_this_machine(source, "config.json")
    return json.loads(file.read_text(encoding="utf-8")) if file is not None else {}


def _tokens(tokenizer: str | None) -> int | None:
    """Count a tokenizer's tokens, added ones too; None without a tokenizer.json to read them from."""
    place = found(tokenizer) if tokenizer else None
    if place is None or not (place / "tokenizer.json").is_file():
        return None
    stored = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = stored["model"]["vocab"]
    names = {entry if isinstance(entry, str) else entry[0] for entry in vocabulary}
    return len(names | {token["content"] for token in stored.get("added_tokens", [])} | _special(place))


def _special(folder: Path) -> set[str]:
    """Return the special tokens that the library adds where the vocabulary lacks them."""
    file = folder / "tokenizer_config.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = [value for key, value in stored.items() if key.endswith("_token")]
    named += [*stored.get("extra_special_tokens", []), *stored.get("added_tokens_decoder", {}).values()]
    written = [value.get("content") if isinstance(value, dict) else value for value in named]
    return {value for value in written if isinstance(value, str)}


def _counted(keys: dict[str, Any], config: ModelConfig, kind: str) -> Model | None:
    num_layers = config.num_layers
    hidden, middle, vocabulary = keys["hidden_size"], keys["intermediate_size"], keys["vocab_size"]
    heads = keys["num_attention_heads"]
    if not heads or hidden % heads or num_layers is not None and num_layers > keys["num_hidden_layers"]:
        return None  # the library says what is wrong
    size = keys["head_dim"] or hidden // heads
    attention, key_value = heads * size, (keys["num_key_value_heads"] or heads) * size
    block = 2 * hidden * attention + 2 * hidden * key_value + 3 * hidden * middle + 2 * hidden
    if kind == "qwen2":
        block += attention + 2 * key_value
    elif keys["attention_bias"]:
        block += attention + 2 * key_value + hidden
    if keys["mlp_bias"]:
        block += 2 * middle + hidden
    layers = keys["num_hidden_layers"] if num_layers is None else num_layers
    lora = _lora(config, hidden, middle, attention, key_value)
    if lora is None:
        return None
    adapters, inputs, ranks = lora
    embedding, tied = vocabulary * hidden, bool(keys["tie_word_embeddings"])
    return Model(
        hidden=hidden,
        layers=layers,
        attention=attention,
        key_value=key_value,
        intermediate=middle,
        gated=True,
        vocab=vocabulary,
        parameters=layers * block + hidden + embedding * (1 if tied else 2),
        embedding=embedding,
        tied=tied,
        block=block,
        largest=max(embedding, hidden * attention, hidden * key_value, hidden * middle),
        adapters=layers * adapters,
        adapter_inputs=inputs,
        adapter_ranks=ranks,
    )


def _lora(config: ModelConfig, hidden: int, middle: int, attention: int, key_value: int) -> tuple[int, int, int] | None:
    """Return the parameters of a block's adapters, the units that go into them, and those between their matrices."""
    if not config.use_peft:
        return 0, 0, 0
    linear = {
        "q_proj": (hidden, attention),
        "k_proj": (hidden, key_value),
        "v_proj": (hidden, key_value),
        "o_proj": (attention, hidden),
        "gate_proj": (hidden, middle),
        "up_proj": (hidden, middle),
        "down_proj": (middle, hidden),
    }
    names, rank = config.peft.get("target_modules") or list(linear), config.peft["lora_r"]
    if not isinstance(names, list) or any(name not in linear for name in names):
        return None
    sizes = [linear[name] for name in set(names)]
    return sum(rank * (a + b) for a, b in sizes), sum(a for a, _ in sizes), rank * len(sizes)
