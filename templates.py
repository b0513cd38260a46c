"""Chat templates and tokenizers: conversations as text, what ends a turn, which ids are no text, whose ids they are.

A tokenizer comes from `models.load_tokenizer`, which pins the day that a template with a date writes.
"""

import copy
import hashlib
import json
import re
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError

from conversations import Message

# ---- text


def render(tokenizer: Any, messages: list[Message], prompt: bool) -> str:
    """Apply the chat template as text, with the generation prompt if `prompt`; ValueError where it refuses."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=pinned_template(tokenizer), tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses messages of the roles {roles}: {error}") from error


def asks_the_date(tokenizer: Any) -> bool:
    """Say whether the chat template writes today's date, as Llama 3.1's does."""
    return "strftime_now" in str(tokenizer.chat_template)


def pinned_template(tokenizer: Any) -> str | None:
    """Return the chat template with its clock stopped at the day that `load_tokenizer` pinned; None without a clock.

    The library hands no function to a template, so a macro of the clock's name stands before it. The line break after
    it is the one that the library's own settings take away.
    """
    if not asks_the_date(tokenizer):
        return None
    day = date.fromisoformat(tokenizer.template_date)
    parts = [f"%{letter}" for letter in "aAbBcdfGHIjmMpSuUVwWxXyY"] + ["%%"]
    filled = "".join(f" | replace({part!r}, {day.strftime(part)!r})" for part in parts)
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{tokenizer.get_chat_template()}"
    )


def stopped(tokenizer: Any) -> Any:
    """Return the tokenizer for a library that renders templates itself, its template's clock stopped, too."""
    template = pinned_template(tokenizer)
    if template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


# ---- ids with a meaning


class TurnEnd(NamedTuple):
    """How a template ends an assistant's turn: the id that closes it, and whether the template writes it itself."""

    id: int | None
    in_template: bool


@lru_cache(maxsize=8)
def turn_end(tokenizer: Any) -> TurnEnd:
    """Find the token that the template puts after an assistant's content; without one it is the tokenizer's eos."""
    probe = "qqq"
    messages = [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}]
    text = render(tokenizer, messages, False)
    after = text[text.rindex(probe) + len(probe) :]
    special = [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in special_ids(tokenizer)]
    return TurnEnd(special[0], True) if special else TurnEnd(tokenizer.eos_token_id, False)


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that are no text: those with a role (eos, ...), and those that were added as special tokens.

    Llama 3's end of turn is of the second kind: the vocabulary has it, and no role of the base tokenizer names it.
    """
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


@lru_cache(maxsize=8)
def special_texts(tokenizer: Any) -> re.Pattern[str] | None:
    """Return what finds a tokenizer's special tokens in a text; None if it has none."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    kept = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, kept))) if kept else None


@lru_cache(maxsize=8)
def adds_bos(tokenizer: Any) -> bool:
    """Say whether the tokenizer begins a plain text with its begin-of-sequence token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


# ---- identity


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash what maps text to ids: vocabulary, merges, added tokens, begin and end of sequence, chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation", None)  # state of the last call, not of the tokenizer
    backend.pop("padding", None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]  # not pad: it reaches neither ids nor losses
    text = json.dumps([backend, special], sort_keys=True) + template_digest(tokenizer)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template_digest(tokenizer: Any) -> str:
    """Hash the chat template, and the day that is pinned where the template writes the date."""
    text = str(tokenizer.chat_template) + (tokenizer.template_date if asks_the_date(tokenizer) else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
