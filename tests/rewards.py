"""Verifiers for tests: what a response of the tiny model can be rewarded for."""


def share_of_e(prompt: str, response: str) -> float:
    """Return the share of the letter e in a response."""
    return response.count("e") / max(1, len(response))


def length(prompt: str, response: str) -> float:
    """Return how many characters a response has."""
    return float(len(response))


def raises(prompt: str, response: str) -> float:
    """Fail on every response."""
    raise KeyError("no such order")
