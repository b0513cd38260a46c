"""Verifiers and votes: how a response is scored beside its prompt, and which of several responses most agree with.

A verifier is `module:function(prompt, response) -> number`; one that takes a third argument also gets the row's meta
data, where a reference answer travels. A module that defines `vote(response) -> str | None` can be asked for a
majority.
"""

import hashlib
import importlib
import inspect
import math
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from conversations import Conversation, Message

SECONDS = 30.0  # that a verifier may take for one response; SECONDS in its own module is another limit
Verifier = Callable[..., float]  # (prompt, response) or (prompt, response, meta)
Vote = Callable[[str], str | None]


def resolve_verifier(name: str, key: str = "evaluation.verifier") -> Verifier:
    """Import `module:function`; ValueError says which half is missing."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{key}={name!r} must be written module:function, e.g. worlds.shop:check")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{key}={name!r}: cannot import {module_name!r} ({error}). "
            "The module must lie in the repository or on PYTHONPATH"
        ) from error
    functions = {key: value for key, value in vars(module).items() if callable(value) and not isinstance(value, type)}
    if function_name not in functions:
        raise ValueError(
            f"{key}={name!r}: {module_name} has no function {function_name!r}. "
            f"It has: {', '.join(key for key in functions if key.islower() and not key.startswith('_'))}"
        )
    return functions[function_name]


def code_of(verifier: Verifier) -> str:
    """Hash the source of a verifier's module; empty where it has none (a compiled one)."""
    try:
        source = inspect.getsource(sys.modules[verifier.__module__])
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def prompt_text(messages: list[Message]) -> str:
    """Return what a verifier gets as the prompt: the last message of the user."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return asked[-1] if asked else messages[-1]["content"]


def takes_meta(verifier: Callable[..., float]) -> bool:
    """Tell whether a verifier wants the row's meta data beside prompt and response."""
    return len(inspect.signature(verifier).parameters) >= 3


class _TooLong(BaseException):
    """The time is over; no Exception, as a verifier may catch those."""


@contextmanager
def limited(function: Callable[..., Any], response: str) -> Iterator[None]:
    """Stop a verifier or vote that takes too long: ValueError. Regular expressions are stopped, too.

    The clock is a signal, which only the main thread gets; nobody calls verifiers from another one.
    """
    seconds = float(getattr(sys.modules[function.__module__], "SECONDS", SECONDS))
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TooLong:
        raise ValueError(
            f"{function.__module__}:{function.__name__} took more than {seconds:g} s for one response of "
            f"{len(response):,} characters, {response[:80]!r}. Make it faster on such text, or write SECONDS = "
            f"{10 * seconds:g} into its module"
        ) from None
    finally:
        signal.signal(signal.SIGALRM, before)


def scored(verifier: Callable[..., float], conversation: Conversation, response: str) -> float:
    """Score one response to the prompt of a row.

    ValueError where the verifier takes more than its time, or gives what is no number; else what it raises itself.
    """
    prompt = prompt_text(conversation.prompt)
    more = (conversation.meta,) if takes_meta(verifier) else ()
    with limited(verifier, response):
        value = verifier(prompt, response, *more)
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"it gives {value!r}, and a score is a finite number")
    return score


@contextmanager
def blamed(function: Callable[..., Any], response: str) -> Iterator[None]:
    """Turn whatever a verifier or vote raises into a ValueError that names it and the response."""
    try:
        yield
    except Exception as error:
        name = f"{function.__module__}:{getattr(function, '__name__', function)}"
        raise ValueError(f"verifier {name} failed on the response {response[:200]!r}: {error!r}") from error


def surely_scored(verifier: Callable[..., float], conversation: Conversation, response: str) -> float:
    """Score one response; ValueError where the verifier fails on it in any way."""
    with blamed(verifier, response):
        return scored(verifier, conversation, response)


def vote_of(verifier: Callable[..., float]) -> Vote:
    """Return the `vote` function beside a verifier; ValueError where its module has none."""
    vote: Any = getattr(sys.modules[verifier.__module__], "vote", None)
    if vote is None:
        raise ValueError(
            f"evaluation.majority needs to know which responses agree: {verifier.__module__} defines no vote(response)"
        )
    return vote


def _voted(vote: Vote, response: str) -> str | None:
    with blamed(vote, response), limited(vote, response):
        return vote(response)


def majority_response(responses: list[str], vote: Vote) -> str:
    """Return the first response with the most frequent vote, of equally frequent ones the earliest; None is no vote."""
    votes = [_voted(vote, response) for response in responses]
    counts = Counter(v for v in votes if v is not None)
    if not counts:
        return responses[0]
    return responses[votes.index(max(counts, key=lambda v: (counts[v], -votes.index(v))))]
