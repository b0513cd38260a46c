"""How long the rows of a plan are about, from their text: no chat template is rendered and no model code is loaded.

A tokenizer whose tokenizer.json is on this machine counts; without one a token is CHARACTERS characters.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from assets import smollm2
from conversations import Conversation, format_of, to_conversation
from settings import paths
from settings.schema import DatasetConfig, ModelConfig, Settings
from tokens.examples import Example, Tokens
from tokens.sources import open_rows

CHARACTERS = 4  # of a token of English text, where nothing counts
MARKS = 3  # tokens of a message beside its role and its text: begin, line break, end

SAID = "about, from the rows' text"

Count = Callable[[Sequence[str]], list[int]]  # texts -> tokens


def text_examples(settings: Settings, split: str) -> tuple[list[Example], int, int]:
    """Return examples whose ids are all 0 and about as many as they will be, the rows they come from and all rows.

    At most estimate.rows rows of a split are read, evenly spread; what cannot be read is left out.
    """
    run, config, count = settings.run, settings.model, counter(tokenizer_file(settings.model))
    opened = [
        (open_rows(source, f"datasets.{name}.{split}"), dataset, source)
        for name, dataset in settings.datasets.items()
        if (source := getattr(dataset, split))
    ]
    sizes = [_used(rows.size(), dataset, split) for rows, dataset, _ in opened]
    limit = run.n_examples if split == "train" else run.n_eval_examples
    number = min(sum(sizes), limit or sum(sizes))
    sampled = min(number, settings.estimate.rows or number)
    found: list[Example] = []
    for (rows, dataset, source), size in zip(opened, sizes, strict=True):
        total = rows.size()
        share = max(1, round(sampled * size / max(1, sum(sizes))))
        picked = [i % total for i in _spread(share, size)]
        format = format_of(dataset.format, rows.first(), source)
        # A weight above 1 repeats rows; the file is read in its order.
        for row in rows.tried(sorted(set(picked)) if share <= total else list(range(total))):
            example = None if isinstance(row, ValueError) else _example(row, format, source, config, count)
            if example is not None:
                found.append(example)
    return found, max(1, min(sampled, len(found))), number


def _used(total: int, dataset: DatasetConfig, split: str) -> int:
    return round(dataset.weight * total) if split == "train" else total


def _spread(wanted: int, total: int) -> list[int]:
    return sorted({i * total // wanted for i in range(min(wanted, total))})


def _example(row: dict[str, Any], format: str, source: str, config: ModelConfig, count: Count) -> Example | None:
    try:
        conversation = to_conversation(row, format, source)
    except ValueError:
        return None
    if format == "generation":
        prompt = len(row["prompt_ids"])
        lengths = [len(row[f"{s}_ids"]) if row.get(f"{s}_ids") else None for s in ("chosen", "rejected", "response")]
    else:
        prompt, lengths = _lengths(conversation, count)
    prompt = min(prompt, config.max_prompt_length)
    room = max(1, config.max_length - prompt)
    chosen, rejected, response = (None if n is None else _tokens(prompt, min(max(n, 1), room)) for n in lengths)
    return Example([0] * prompt, chosen, rejected, response, conversation)


def _lengths(conversation: Conversation, count: Count) -> tuple[int, list[int | None]]:
    """Return the tokens of a prompt, the mark of the assistant's turn with it, and of each side that there is."""
    sides = [conversation.chosen, conversation.rejected, conversation.response]
    parts = [conversation.prompt, *[side or [] for side in sides]]
    texts = [text for messages in parts for message in messages for text in (message["role"], message["content"])]
    numbers = iter(count([*texts, "assistant"]))
    tokens = [[(next(numbers), next(numbers)) for _ in messages] for messages in parts]
    begins = next(numbers) + MARKS - 1
    prompt = sum(role + content + MARKS for role, content in tokens[0]) + begins
    found: list[int | None] = []
    for side, messages in zip(sides, tokens[1:], strict=True):
        # The first message's role stands in the prompt; its end is the response's.
        more = sum(role + content + MARKS for role, content in messages[1:])
        found.append(None if side is None else messages[0][1] + 1 + more)
    return prompt, found


def _tokens(prompt: int, response: int) -> Tokens:
    return Tokens([0] * (prompt + response), [False] * prompt + [True] * response)


# ---- who counts


def tokenizer_file(config: ModelConfig) -> Path | None:
    """Return the tokenizer.json of a model, from a folder or the hub's cache on this machine; None without one."""
    sources = (config.tokenizer_name_or_path, config.from_checkpoint, config.load_from, config.name_or_path)
    for source in filter(None, sources):
        place = on_this_machine(source, "tokenizer.json")
        if place is not None:
            return place
    return None


def on_this_machine(source: str, name: str) -> Path | None:
    """Return a file of a model that is a folder, a package's converted weights, or in the hub's cache."""
    if source.startswith("package:"):
        folder = smollm2.FOLDERS.get(source.removeprefix("package:"))
        place = smollm2.cache_folder() / folder if folder else None
    else:
        place = paths.found(source)
    if place is not None:
        return place / name if (place / name).is_file() else None
    if source.count("/") != 1 or source.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, name)
    return Path(found) if isinstance(found, str) else None


@lru_cache(maxsize=8)
def counter(file: Path | None) -> Count:
    """Return what counts the tokens of texts."""
    if file is None:
        return lambda texts: [math.ceil(len(text) / CHARACTERS) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(found.ids) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
