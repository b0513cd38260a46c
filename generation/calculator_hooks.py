"""The calculator while a model generates: where a row's own text ends in `<<48/2=`, `24>>` is written for it.

What is to be written is a function of the text so far (calculator.completion), so every backend can use it in its own
way: Hugging Face through a logits processor, which forces the tokens row by row inside a running batch; vLLM and a
server stop at every token with a `=` (`pause_ids`), write, and let the model go on (`response_with_calculator` for a
server). The written tokens are part of the response, and count as its tokens.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from generation.calculator import MAX_LENGTH, completion

PAUSE = "="  # where a backend stops that goes on after the calculator
LEADS = (PAUSE, "0", "x", "\n")
WINDOW = 2 * MAX_LENGTH  # tokens looked back: each character of a mark is at most one token


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode ids as they stand, special tokens included."""
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def ids_that_add(tokenizer: Any, before: Sequence[int], text: str) -> list[int]:
    """Return ids that, after the ids `before`, decode to `text`; empty where no way of writing it does.

    Some tokenizers put a space before what they encode alone: then the text is encoded behind another character that
    it does not merge with, and that one's ids are cut off. Every candidate is decoded; one that differs in spaces only
    (words as tokens) comes last.
    """

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    candidates = [encode(text)]
    for lead in LEADS:
        alone, both = encode(lead), encode(lead + text)
        if both[: len(alone)] == alone:
            candidates.append(both[len(alone) :])
    start = text_of(tokenizer, before)
    for exact in (True, False):
        for ids in candidates:
            whole, wanted = text_of(tokenizer, [*before, *ids]), start + text
            if whole == wanted if exact else "".join(whole.split()) == "".join(wanted.split()):
                return ids
    return []


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot write a value."""
    lead, value = tokenizer(PAUSE, add_special_tokens=False)["input_ids"], "-1234567890.5>>"
    if not ids_that_add(tokenizer, lead, value):
        shown = text_of(tokenizer, tokenizer(value, add_special_tokens=False)["input_ids"])
        raise ValueError(
            f"generation.calculator=true: this tokenizer cannot write a value; {value!r} comes back as {shown!r}. "
            "Set generation.calculator=false, or choose a tokenizer with digits and signs"
        )


def forced_ids(tokenizer: Any, said: Sequence[int]) -> list[int]:
    """Return the ids that the calculator writes after a generated text, given as ids; empty where it has nothing to
    say.
    """
    recent = said[-WINDOW:]
    text = completion(text_of(tokenizer, recent))
    return ids_that_add(tokenizer, recent, text) if text else []


# ---- Hugging Face


class Calculator(LogitsProcessor):
    """Forces the value's tokens, with a queue for each row of one batch; not for beam search, which moves rows."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.queues: dict[int, deque[int]] = {}
        self.pauses: dict[int, bool] = {}  # whether a token's text holds a "=", by id

    def pauses_at(self, token: int) -> bool:
        """Tell whether a token may end `<<expression=`."""
        if token not in self.pauses:
            self.pauses[token] = PAUSE in text_of(self.tokenizer, [token])
        return self.pauses[token]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take and return scores [B, V]: a row with tokens to be written keeps one finite score."""
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if not self.queues.get(row) and self.pauses_at(last):
                self.queues[row] = deque(forced_ids(self.tokenizer, input_ids[row, self.prompt_length :].tolist()))
        forced = {row: queue.popleft() for row, queue in self.queues.items() if queue}
        if not forced:
            return scores
        rows, ids = (torch.tensor(part, device=scores.device) for part in (list(forced), list(forced.values())))
        scores = scores.clone()
        scores[rows] = float("-inf")
        scores[rows, ids] = 0.0
        return scores


def calculators(enabled: bool, tokenizer: Any, prompt_length: int) -> list[LogitsProcessor]:
    """Return the calculator of one batch, or nothing."""
    return [Calculator(tokenizer, prompt_length)] if enabled else []


# ---- backends that stop and go on


def pause_ids(tokenizer: Any, stop: Sequence[int]) -> list[int]:
    """Return the ids whose text holds a `=`: where they are sampled the calculator looks at the response."""
    check_tokenizer(tokenizer)
    return [i for i in range(len(tokenizer)) if i not in stop and PAUSE in text_of(tokenizer, [i])]


def piece_of(ids: list[int], stop: Sequence[int], pauses: Sequence[int]) -> "Piece":
    """Cut ids after the first stop or pause id, and say which it was; without either the model ran out of room."""
    for i, token in enumerate(ids):
        if token in stop or token in pauses:
            return Piece(ids[: i + 1], "stop" if token in stop else "pause")
    return Piece(ids, "length")


class Piece(NamedTuple):
    """What a backend says in one go: ids, and "stop" (end of turn), "length" (out of room) or "pause" (up to a `=`)."""

    ids: list[int]
    reason: str


# (prompts, room of each in tokens, seed) -> pieces in their order. A pause ends with the token that holds the "=".
Speak = Callable[[list[list[int]], list[int], int], list[Piece]]


def response_with_calculator(
    speak: Speak, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, seed: int
) -> list[tuple[list[int], str]]:
    """Answer every prompt with a backend that stops at `=`: speak, write, go on; (response ids, "stop" |
    "length").

    Rows that have ended leave the batch. Every round has a seed of its own, else it would draw the same numbers again.
    """
    check_tokenizer(tokenizer)
    said: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    going, turn = list(range(len(prompts))), 0
    while going:
        rooms = [max_new_tokens - len(said[i]) for i in going]
        pieces = speak([prompts[i] + said[i] for i in going], rooms, seed + turn)
        paused = []
        for i, piece in zip(going, pieces, strict=True):
            said[i] += piece.ids
            if piece.reason == "pause":
                said[i] += forced_ids(tokenizer, said[i])
                del said[i][max_new_tokens:]
            if piece.reason == "stop":
                reasons[i] = "stop"
            elif piece.reason == "pause" and len(said[i]) < max_new_tokens:
                paused.append(i)
        going, turn = paused, turn + 1
    return list(zip(said, reasons, strict=True))
