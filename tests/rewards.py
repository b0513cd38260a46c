"""Checkers for tests: what a reply of the tiny model can be rewarded for."""


def share_of_e(prompt: str, response: str) -> float:
    """Return the share of the letter e in a reply."""
    return response.count("e") / max(1, len(response))


def raises(prompt: str, response: str) -> float:
    """Fail on every reply."""
    raise KeyError("no such order")
