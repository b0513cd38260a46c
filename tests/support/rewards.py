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


SEEN: list[str] = []  # what `remembered` was asked about


def remembered(prompt: str, response: str) -> float:
    """Keep the response for the test to look at."""
    SEEN.append(response)
    return 0.0


def near_answer(prompt: str, response: str, meta: dict) -> float:
    """Return how near the length of a response is to the row's answer."""
    return -abs(len(response) - meta["answer"])


def nothing(prompt: str, response: str) -> None:
    """Give no score."""


def no_number(prompt: str, response: str) -> float:
    """Give what compares with no number."""
    return float("nan")


def too_few(prompt: str) -> float:
    """Take no response."""
    return 1.0
