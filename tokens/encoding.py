"""Conversations as token ids: prompts, turns with what ends them, masks, and what is cut.

A sequence is tokenized once, here; its ids then travel to the cache, the generator and the losses.
"""

import copy
import re
from collections import Counter
from functools import lru_cache
from typing import Any

from conversations import WAY_OUT, Conversation, Message, tokenizer_of
from settings.schema import ModelConfig
from templates import adds_bos, render, special_texts, turn_end
from tokens.examples import Example, Tokens

# ---- whose ids they are


def check_ids(row: dict[str, Any], where: str, tokenizer: Any, own: str) -> None:
    """Refuse a row whose ids another tokenizer or template wrote: here they would be other text. `own`: our digest."""
    theirs = tokenizer_of(row, where)
    if theirs == own:
        return
    name = "chosen" if "chosen_ids" in row else "response"
    raise ValueError(
        f"{where}: its ids are of another tokenizer or chat template (digest {theirs}, this model's is {own}).\n"
        f"  the row's text begins      {str(row.get(name))[:60]!r}\n"
        f"  its ids begin, decoded here {tokenizer.decode(row[f'{name}_ids'][:20])[:60]!r}\n{WAY_OUT}"
    )


# ---- tokens of one conversation


OPEN, CLOSE = "\U0010fffd", "\U0010fffc"  # around what only spells a special token
SHIELD = re.compile(f"{OPEN}(.*?){CLOSE}", re.S)
OWN = re.compile(f"[{OPEN}{CLOSE}]")  # where a text itself holds one, it stands in a shield, too, as a letter
LETTERS = {"o": OPEN, "c": CLOSE}
HALF = re.compile("[\ud800-\udfff]")  # one of the two halves in which JSON writes a character, alone


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text; what stands in a shield is plain text, tokenized apart, whatever it spells.

    ValueError for half a character, which no tokenizer takes.
    """
    half = HALF.search(text)
    if half:
        before = text[max(0, half.start() - 20) : half.start()]
        raise ValueError(
            f"the text holds half a character, U+{ord(half[0]):04X}, after {before!r}: correct or remove the row"
        )
    if OPEN not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    for i, part in enumerate(SHIELD.split(text)):
        if part:
            taken = (_plain(tokenizer), LETTERS.get(part, part)) if i % 2 else (tokenizer, part)
            ids += taken[0](taken[1], add_special_tokens=False, split_special_tokens=bool(i % 2))["input_ids"]
    return ids


@lru_cache(maxsize=8)
def _plain(tokenizer: Any) -> Any:
    """Return a twin that knows no special token: to switch the one that is shared is seen by all threads at once."""
    twin = copy.deepcopy(tokenizer)
    twin("", add_special_tokens=False, split_special_tokens=True)
    return twin


def shielded(tokenizer: Any, messages: list[Message], split: bool = True) -> list[Message]:
    """Return messages in which every text that spells a special token stands in a shield, if `split`."""
    special = special_texts(tokenizer) if split else None
    wrap = lambda match: f"{OPEN}{match[0]}{CLOSE}"  # noqa: E731
    letter = lambda match: f"{OPEN}{'o' if match[0] == OPEN else 'c'}{CLOSE}"  # noqa: E731

    def safe(text: str) -> str:
        text = OWN.sub(letter, text)
        return special.sub(wrap, text) if special is not None else text

    return [{**message, "content": safe(message["content"])} for message in messages]


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokenize what a model or a server wrote as text: what spells a special token is none."""
    return _encode(tokenizer, shielded(tokenizer, [{"role": "assistant", "content": text}])[0]["content"])


def spells_special(tokenizer: Any, conversation: Conversation) -> bool:
    """Tell whether a text of a conversation spells one of the tokenizer's special tokens."""
    special = special_texts(tokenizer)
    sides = (conversation.prompt, conversation.chosen, conversation.rejected, conversation.response)
    return special is not None and any(special.search(m["content"]) for side in sides for m in side or [])


def encode_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Tokenize a prompt with the generation prompt and exactly one begin-of-sequence token where there is one."""
    ids = _encode(tokenizer, render(tokenizer, messages, True))
    bos = tokenizer.bos_token_id
    if adds_bos(tokenizer) and ids[:1] != [bos]:
        ids = [bos, *ids]
    if bos is not None and ids[:2] == [bos, bos]:
        raise ValueError(
            f"the chat template puts two {tokenizer.bos_token!r} at the start of "
            f"{render(tokenizer, messages, True)[:80]!r}"
        )
    return ids


def encode_turn(tokenizer: Any, before: list[Message], turn: Message, counts: Counter[str]) -> list[int]:
    """Tokenize an assistant's turn after `before`, up to and including its end-of-turn token.

    The turn is cut out of the jointly tokenized text; where a token would straddle the seam between prompt and
    response it is tokenized apart, as a generator would see it, and counted under 'seam tokenized apart'.
    """
    head, full = render(tokenizer, before, True), render(tokenizer, [*before, turn], False)
    if not full.startswith(head):
        raise ValueError(
            "the chat template does not keep the prompt as a prefix of the conversation:\n"
            f"  prompt ends with      {head[-60:]!r}\n  conversation has there {full[: len(head)][-60:]!r}"
        )
    head_ids, full_ids = _encode(tokenizer, head), _encode(tokenizer, full)
    if full_ids[: len(head_ids)] == head_ids:
        ids = full_ids[len(head_ids) :]
    else:
        counts["seam tokenized apart"] += 1
        ids = _encode(tokenizer, full[len(head) :])
    end = turn_end(tokenizer)
    if end.id is None:
        return ids
    if end.in_template and end.id in ids:  # what the template writes after it (a newline) is nobody's token
        return ids[: len(ids) - ids[::-1].index(end.id)]
    return [*ids, end.id]


def fit_prompt(
    tokenizer: Any, messages: list[Message], limit: int, counts: Counter[str]
) -> tuple[list[Message], list[int]]:
    """Shorten a prompt to `limit` tokens: drop the oldest turns, then cut the left of the newest one."""
    ids = encode_prompt(tokenizer, messages)
    if len(ids) <= limit:
        return messages, ids
    counts["prompt shortened"] += 1
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    while len(ids) > limit and len(turns) > 2:
        turns = turns[2:]
        ids = encode_prompt(tokenizer, system + turns)
    if len(ids) > limit:
        keep_bos = ids[:1] if adds_bos(tokenizer) else []
        ids = keep_bos + ids[len(ids) - limit + len(keep_bos) :]
    return system + turns, ids


def encode_response(
    tokenizer: Any,
    prompt: list[Message],
    prompt_ids: list[int],
    response: list[Message],
    config: ModelConfig,
    supervise: str,
    counts: Counter[str],
) -> Tokens | None:
    """Return prompt and response as Tokens, cut on the right to max_length; None if nothing is supervised."""
    if supervise == "all":
        ids, mask = _all_turns(tokenizer, [*prompt, *response], counts)
        counts["response cut"] += any(mask[config.max_length :])
        ids, mask = ids[: config.max_length], mask[: config.max_length]
    else:
        if not response[0]["content"].strip():
            return None
        turn = encode_turn(tokenizer, prompt, response[0], counts)
        room = config.max_length - len(prompt_ids)
        counts["response cut"] += len(turn) > room
        ids = prompt_ids + turn[:room]
        mask = [False] * len(prompt_ids) + [True] * len(turn[:room])
    return Tokens(ids, mask) if any(mask) else None


def _all_turns(tokenizer: Any, messages: list[Message], counts: Counter[str]) -> tuple[list[int], list[bool]]:
    """Supervise every assistant turn, each tokenized after what stands before it."""
    ids: list[int] = []
    mask: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt_ids = encode_prompt(tokenizer, messages[:i])
        if prompt_ids[: len(ids)] != ids:
            shown = tokenizer.decode(prompt_ids[: len(ids)][-20:])
            raise ValueError(
                "supervise=all needs a template that leaves earlier turns unchanged; this one rewrites them near "
                f"{shown!r}. Use supervise=last"
            )
        turn = encode_turn(tokenizer, messages[:i], message, counts)
        mask += [False] * (len(prompt_ids) - len(ids)) + [True] * len(turn)
        ids = prompt_ids + turn
    return ids, mask


def encode_example(
    tokenizer: Any,
    conversation: Conversation,
    config: ModelConfig,
    supervise: str,
    counts: Counter[str],
    special_tokens: str = "keep",
) -> Example | None:
    """Tokenize one conversation; None (counted) if a response that it has keeps no supervised token.

    special_tokens: `keep` reads what a text spells as the tokenizer does, `split` as plain text.
    """
    spells = spells_special(tokenizer, conversation)
    counts["spells control tokens"] += spells

    split = spells and special_tokens == "split"

    def safe(messages: list[Message]) -> list[Message]:
        own = any(OWN.search(message["content"]) for message in messages)
        return shielded(tokenizer, messages, split) if split or own else messages

    prompt, prompt_ids = fit_prompt(tokenizer, safe(conversation.prompt), config.max_prompt_length, counts)
    encoded: list[Tokens | None] = []
    for response in (conversation.chosen, conversation.rejected, conversation.response):
        tokens = None
        if response is not None:
            tokens = encode_response(tokenizer, prompt, prompt_ids, safe(response), config, supervise, counts)
            if tokens is None:
                counts["dropped: no supervised token"] += 1
                return None
        encoded.append(tokens)
    return Example(prompt_ids, encoded[0], encoded[1], encoded[2], conversation)


def take_ids(
    row: dict[str, Any], conversation: Conversation, config: ModelConfig, counts: Counter[str]
) -> Example | None:
    """Take the ids that a generator wrote instead of tokenizing its text again."""
    prompt, room = row["prompt_ids"], max(0, config.max_length - len(row["prompt_ids"]))
    found: dict[str, Tokens] = {}
    for name in ("chosen", "rejected") if "chosen_ids" in row else ("response",):
        ids = row[f"{name}_ids"][:room]
        counts["response cut"] += len(ids) < len(row[f"{name}_ids"])
        if not ids:
            counts["dropped: no supervised token"] += 1
            return None
        found[name] = Tokens(prompt + ids, [False] * len(prompt) + [True] * len(ids))
    return Example(prompt, found.get("chosen"), found.get("rejected"), found.get("response"), conversation)
