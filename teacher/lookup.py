"""What methods with a teacher share: opening a verified cache, and finding generations by their prompt's ids."""

from collections.abc import Sequence
from typing import Any

from dataloader import Example, Generation, Tokens
from models import tokenizer_digest
from teacher.cache import Reader
from teacher.hub import cache_folder
from teacher.quantities import Entry


def open_cache(folder: str, quantity: str, tokenizer: Any) -> Reader:
    """Open a teacher cache; ValueError if it holds another quantity or was made with another tokenizer."""
    expected: dict[str, object] = {"quantity": quantity, "tokenizer_digest": tokenizer_digest(tokenizer)}
    return Reader(cache_folder(folder), expected, decode=tokenizer.decode)


def entry_of(reader: Reader, tokens: Tokens) -> Entry:
    """Return the K entries a token that a cache of log-probabilities or advantages holds of a sequence."""
    return Entry(**reader.get(tokens.ids, tokens.response))


def generations_by_prompt(
    generations: Sequence[Generation], examples: Sequence[Example], source: str
) -> dict[tuple[int, ...], list[Generation]]:
    """Group generations by their prompt's ids; ValueError shows the first example whose prompt has none.

    Rows are joined by content, never by position: another template, truncation or data set has other ids.
    """
    found: dict[tuple[int, ...], list[Generation]] = {}
    for generation in generations:
        found.setdefault(tuple(generation.prompt_ids), []).append(generation)
    missing = [e for e in examples if tuple(e.prompt) not in found]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of {len(examples)} prompts have no generation. The first: "
            f"{missing[0].conversation.prompt[-1]['content'][:120]!r} ({len(missing[0].prompt)} tokens). Generate for "
            "the "
            "same data, template, model.max_prompt_length and n_examples"
        )
    return found
