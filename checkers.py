"""Checkers and votes: how a reply is scored beside its prompt, and which of several replies most agree with.

A checker is `module:function(prompt, response) -> number`; one that takes a third argument also gets the row's meta
data, where a reference answer travels. A module that defines `vote(response) -> str | None` can be asked for a majority.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from conversations import Conversation, Message

Vote = Callable[[str], str | None]


def prompt_text(messages: list[Message]) -> str:
    """Return what a checker gets as the prompt: the last message of the user."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return asked[-1] if asked else messages[-1]["content"]


def takes_meta(checker: Callable[..., float]) -> bool:
    """Tell whether a checker wants the row's meta data beside prompt and response."""
    return len(inspect.signature(checker).parameters) >= 3


def scored(checker: Callable[..., float], conversation: Conversation, response: str) -> float:
    """Score one reply to the prompt of a row."""
    prompt = prompt_text(conversation.prompt)
    if takes_meta(checker):
        return float(checker(prompt, response, conversation.meta))
    return float(checker(prompt, response))


def vote_of(checker: Callable[..., float]) -> Vote:
    """Return the `vote` function beside a checker; ValueError where its module has none."""
    vote: Any = getattr(sys.modules[checker.__module__], "vote", None)
    if vote is None:
        raise ValueError(
            f"evaluation.majority needs to know which replies agree: {checker.__module__} defines no vote(response)"
        )
    return vote


def majority_reply(responses: list[str], vote: Vote) -> str:
    """Return the first reply with the most frequent vote, of equally frequent ones the earliest; None is no vote."""
    votes = [vote(response) for response in responses]
    counts = Counter(v for v in votes if v is not None)
    if not counts:
        return responses[0]
    return responses[votes.index(max(counts, key=lambda v: (counts[v], -votes.index(v))))]
