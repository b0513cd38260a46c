"""No key or token is written down: a configuration or a command line that holds one is refused before it is stored.

What is typed lands in config.yaml, command.txt, wandb, logs and model cards. Keys come from the environment alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
MIN_LENGTH = 8  # of a variable's value that is looked for: a shorter one is a word
# What the hub, OpenAI, wandb, GitHub, AWS and Slack call theirs; a key in a URL's query; a password before its host.
SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[A-Z0-9]{16}\b|\bxox[abp]-[\w-]{10,}"
    r"|[?&](?:api[-_]?key|access[-_]?token|token|key|password)=[^&\s]+|://[^/\s:@]*:[^/\s@]+@",
    re.IGNORECASE,
)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return the values of the variables whose names say that they are secret."""
    return [value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= MIN_LENGTH]


def is_secret(text: str, secrets: Sequence[str]) -> bool:
    """Tell whether a text holds a secret of the environment, or what looks like one."""
    return any(secret in text for secret in secrets) or SHAPES.search(text) is not None


def hidden(text: str, secrets: Sequence[str]) -> str:
    """Return a text with its secrets taken out."""
    for secret in secrets:
        text = text.replace(secret, "[hidden]")
    return SHAPES.sub("[hidden]", text)


def check_no_secret(raw: Mapping[str, Any], words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise ValueError, which does not show it, for a secret in a plain config or among the words of a command line."""
    secrets = secrets_of(environment)
    places = [(key, text) for key, text in _texts(raw, "") if is_secret(text, secrets)]
    places += [(word.partition("=")[0], word) for word in words if is_secret(word, secrets)]
    if places:
        raise ValueError(
            f"{places[0][0]} holds what looks like a key, token or password, and would be written into config.yaml, "
            "command.txt and the model's card. Take it out and give it by the environment (OPENAI_API_KEY, HF_TOKEN, "
            "WANDB_API_KEY)"
        )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _texts(str(name), f"a name in {key or 'the configuration'}")
            yield from _texts(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for below in value:
            yield from _texts(below, key)
    elif isinstance(value, str):
        yield key, value
