"""A Llama of two narrow layers over bytes, to load, build, save and refuse."""

from dataclasses import replace

from settings.schema import ModelConfig, typed
from tests.support.helpers import composed

BYTES = "assets/byte_tokenizer"
BUILD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def small_config() -> ModelConfig:
    """Return the settings of that model with random weights."""
    tiny = typed(composed("model=tiny")["model"], ModelConfig)
    return replace(tiny, tokenizer_name_or_path=BYTES, build=BUILD, num_layers=None, build_seed=3)
