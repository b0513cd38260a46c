"""Small Llamas, large vocabularies and even data that memory is measured with."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from settings.schema import Settings, settings_from
from tests.support.helpers import ROOT, composed

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


def settings(*overrides: str) -> Settings:
    """Compose and type a config."""
    return settings_from(composed(*overrides))


def inline(build: dict[str, Any]) -> str:
    """Spell a model.build for the command line."""
    return "++model.build={" + ", ".join(f"{k}: {str(v).lower()}" for k, v in build.items()) + "}"


def large_vocabulary(folder: Path, words: int) -> Path:
    """Write the byte tokenizer with so many words in all, so that logits weigh what they do in practice."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/byte_tokenizer")
    tokenizer.add_tokens([f"<w{i}>" for i in range(words - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return folder


def even_pairs(path: Path, count: int, length: int) -> Path:
    """Write pairs whose prompts and responses have `length` characters."""
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            prompt = {"role": "user", "content": f"{i:0{length}d}"}
            sides = {
                side: [prompt, {"role": "assistant", "content": letter * length}]
                for side, letter in (("chosen", "a"), ("rejected", "b"))
            }
            out.write(json.dumps(sides) + "\n")
    return path
