"""What is odd in the words of a row: template marks inside content, empty systems, scripts, near-equal prompts.

Each check is a pure function of a conversation. They are few and cheap; what they miss is said in docs/data.md.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from conversations import Conversation, Message, key_of
from report.inspection import Facts, Finding, found
from templates import special_texts as special_texts

COMMON = 50  # a span that stands in more test prompts than this is boilerplate and tells nothing
REPEATED = 20  # characters of a prompt from which on a response that begins with it is odd
LETTERS = 20  # letters that a text needs before its script is compared
OPENING = 150  # characters of a response in which it speaks of itself
NOT_PRINTED = re.compile(  # but tab and line breaks; zero-width joiners belong to scripts and emoji
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufffd\ud800-\udfff]"
)
# One word of Latin and Cyrillic letters: look-alikes. Greek is left out: formulas mix it with Latin.
MIXED = re.compile("[A-Za-z][\u0400-\u04ff]|[\u0400-\u04ff][A-Za-z]")
AS_AN_AI = re.compile(r"\bas an? (?:ai\b|artificial intelligence|(?:large )?language model)", re.I)
SCRIPTS = {
    "Latin": re.compile("[A-Za-z\u00c0-\u024f]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Cyrillic": re.compile("[\u0400-\u04ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Devanagari": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
    "Kana": re.compile("[\u3040-\u30ff]"),
    "Hangul": re.compile("[\uac00-\ud7af]"),
    "Han": re.compile("[\u4e00-\u9fff]"),
}
# name: (severity, advice)
ODDITIES = {
    "special tokens written in content": (
        "high",
        "the tokenizer reads them as its own marks, so a turn ends or begins where the text only says so; remove "
        "them, or set datasets.NAME.special_tokens=split",
    ),
    "responses that begin with their prompt": ("middle", "a model learns to repeat the question; strip it"),
    "empty system messages": ("low", "the template writes an empty turn; drop the message"),
    "characters that do not print": ("low", "left-overs of other encodings or hidden marks; clean the text"),
    "words of mixed scripts": ("low", "Latin with Cyrillic letters in one word: look-alikes, mostly"),
    "responses in another script than their prompt": ("low", "translations look so; otherwise a wrong language"),
    "responses that speak as an AI": ("low", 'they begin with "as an AI" or alike; refusals, mostly'),
}


def script_of(text: str) -> str | None:
    """Name the script of most letters of a text; None where it has few. Han with kana is Japanese: Kana."""
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    if counts["Kana"]:
        counts["Kana"] += counts.pop("Han")
    name = max(counts, key=lambda key: counts[key])
    return name if counts[name] >= LETTERS else None


def responses_of(conversation: Conversation) -> list[str]:
    """Return the texts of a row's responses."""
    parts = (conversation.chosen, conversation.rejected, conversation.response)
    return ["\n".join(message["content"] for message in part) for part in parts if part is not None]


def odd(conversation: Conversation, special: re.Pattern[str] | None) -> tuple[str, ...]:
    """Name what is odd in a row: keys of ODDITIES."""
    prompt, answers = conversation.prompt, responses_of(conversation)
    texts = [message["content"] for message in prompt] + answers
    asked = prompt[-1]["content"].strip() if prompt else ""
    script = script_of(asked)
    tests = (
        special is not None and any(special.search(text) for text in texts),
        len(asked) >= REPEATED and any(answer.lstrip().startswith(asked) for answer in answers),
        any(message["role"] == "system" and not message["content"].strip() for message in prompt),
        any(NOT_PRINTED.search(text) for text in texts),
        any(MIXED.search(text) for text in texts),
        script is not None and any((script_of(answer) or script) != script for answer in answers),
        any(AS_AN_AI.search(answer[:OPENING]) for answer in answers),
    )
    return tuple(name for name, hit in zip(ODDITIES, tests, strict=True) if hit)


def oddities(rows: Sequence[Facts], split: str) -> list[Finding]:
    """Return a finding for each kind of oddity that a row has."""
    result: list[Finding] = []
    for name, (severity, advice) in ODDITIES.items():
        hits = [(row.where, row.excerpt) for row in rows if name in row.oddities]
        result += found(name, split, severity, hits, len(rows), "rows", advice)
    return result


def excerpt(conversation: Conversation, room: int = 100) -> str:
    """Return the end of a prompt and the beginning of its first response."""
    asked, answers = (conversation.prompt[-1]["content"] if conversation.prompt else ""), responses_of(conversation)
    return " ".join(asked.split())[-room:] + (" → " + " ".join(answers[0].split())[:room] if answers else "")


def content_digest(prompt: list[Message]) -> int:
    """Hash the roles and words of a prompt to 64 bits, whatever the white space."""
    return hash(key_of(prompt))


# ---- near-equal prompts


class Near(NamedTuple):
    """A test prompt and the training prompt that holds most of its spans."""

    test: Facts
    train: str
    share: float


def spans(prompt: list[Message], size: int) -> set[int]:
    """Hash every span of `size` words of a prompt, in lower case; a shorter prompt has none."""
    words = re.findall(r"\w+", " ".join(m["content"] for m in prompt if m["role"] != "system").lower())
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)}


class SpanIndex:
    """Which test prompts hold a span; each training prompt is then looked up span by span."""

    def __init__(self, size: int, near: float) -> None:
        self.size, self.near = size, near
        self.rows: list[Facts] = []
        self.holders: dict[int, list[int]] = {}
        self.best: dict[int, tuple[float, str]] = {}
        self.counts: list[int] = []

    def add(self, row: Facts, prompt: list[Message]) -> None:
        """Take a test prompt in."""
        for span in spans(prompt, self.size):
            self.holders.setdefault(span, []).append(len(self.rows))
        self.rows.append(row)

    def close(self) -> None:
        """Drop boilerplate, and count what is left of each prompt."""
        self.holders = {span: held for span, held in self.holders.items() if len(held) <= COMMON}
        left = Counter(number for held in self.holders.values() for number in held)
        self.counts = [left[number] for number in range(len(self.rows))]

    def look_up(self, row: Facts, prompt: list[Message]) -> None:
        """Note for every test prompt that shares spans with this training prompt which share of its own that is."""
        if not self.holders:
            return
        shared = Counter(n for span in spans(prompt, self.size) for n in self.holders.get(span, ()))
        for number, count in shared.items():
            share = count / self.counts[number]
            equal = self.rows[number].prompt == row.prompt  # said by `leakage`
            if share >= self.near and not equal and share > self.best.get(number, (0.0, ""))[0]:
                self.best[number] = (share, row.where)

    def found(self, leaked: Iterable[int]) -> list[Near]:
        """Return the near-equal test prompts but those that are equal to a training prompt, too."""
        equal = set(leaked)
        rows = ((self.rows[number], *self.best[number]) for number in sorted(self.best))
        return [Near(row, where, share) for row, share, where in rows if row.prompt not in equal]


def near_findings(near: Sequence[Near], total: int, size: int, share: float) -> list[Finding]:
    """Find test prompts most of whose spans of words stand in one training prompt."""
    hits = [(f"{n.test.where} ({100 * n.share:.0f} % as {n.train})", n.test.excerpt) for n in near]
    advice = f"at least {100 * share:g} % of their spans of {size} words stand in one training prompt; look at them"
    return found("prompts nearly equal to trained ones", "test", "middle", hits, total, "rows", advice)
