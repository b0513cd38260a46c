"""A judge behind an OpenAI-compatible chat server: a score of one response, or which of two is better.

What a judge says is kept in a file, one row a question, found by content: a killed run does not ask twice.
A response that does not end as the template asks is no verdict. It is an error or a counted skip, never a tie.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from generation.server import Server, in_parallel, served_model
from settings.artifacts import append_row, resumed_rows
from settings.paths import found
from settings.schema import JudgeConfig, require

SCORE = re.compile(r"\W*score\W*?:\s*(\d+)\s*(?:/\s*10)?\W*", re.IGNORECASE)
VERDICT = re.compile(r"\W*verdict\W*?:\W*(a|b|tie)\W*", re.IGNORECASE)
MAX_LINE = 200  # characters of a line that may be a verdict: what SCORE takes grows with the square of it
MAX_CHARACTERS_A_TOKEN = 50  # of a judge's response: a server that sends more than it was asked for is not read on
POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}


class Question(NamedTuple):
    """What the judge is asked: the whole message, and whether a score or a verdict is wanted."""

    message: str
    kind: str  # score | verdict


SCORE_PLACES = ("prompt", "response")  # what a question for a score must have room for


class Unparsed(ValueError):
    """The judge answered, and its answer holds no verdict."""


def last_line(text: str) -> str:
    """Return the last line that holds something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def parsed(kind: str, text: str) -> float:
    """Read the last line of a judge's response: a score from 1 to 10, or a verdict as the points of A (1, 0.5, 0).

    Raises Unparsed if it is neither.
    """
    line = last_line(text)
    found = (SCORE if kind == "score" else VERDICT).fullmatch(line) if len(line) <= MAX_LINE else None
    if found is None:
        raise Unparsed(f"the judge's response ends with {last_line(text)[:120]!r}, which is no {kind}")
    if kind == "verdict":
        return POINTS[found[1].lower()]
    score = float(found[1])
    if not 1 <= score <= 10:
        raise Unparsed(f"the judge's score is {score:g}, outside 1 to 10")
    return score


def filled(template: str, **texts: str) -> str:
    """Put texts in the places of a template, in one pass: what stands in a text is never taken for a place."""
    return re.sub(r"\{(\w+)\}", lambda place: texts.get(place[1], place[0]), template)


def read_template(path: str, places: Sequence[str], key: str) -> str:
    """Read a judge's template; ValueError if it is missing or lacks a place."""
    file = found(path)
    require(file is not None and file.is_file(), f"{key}={path}: no such file")
    assert file is not None
    text = file.read_text(encoding="utf-8")
    missing = [place for place in places if f"{{{place}}}" not in text]
    require(not missing, f"{key}={path} has no place {{{missing[0] if missing else ''}}}")
    return text


class Judge:
    """Ask, keep, and count what could not be read."""

    def __init__(self, config: JudgeConfig, store: Path, on_error: str) -> None:
        require(bool(config.base_url), "a judge needs judge.base_url=http://HOST:PORT/v1")
        self.config, self.store, self.on_error = config, store, on_error
        self.single = read_template(config.score_template, SCORE_PLACES, "judge.score_template")
        self.pair = read_template(config.pair_template, ("prompt", "first", "second"), "judge.pair_template")
        self.server = Server(config.base_url or "", config.timeout, config.retries, "judge")
        self.server.max_bytes = 1 << 20 | 16 * MAX_CHARACTERS_A_TOKEN * config.max_tokens  # as JSON, with its frame
        self.model = served_model(self.server, config.model_name)
        self.known: dict[str, float] = {row["key"]: row["value"] for row in resumed_rows(store)}
        self.skipped: Counter[str] = Counter()

    def score_question(self, prompt: str, response: str) -> Question:
        """Return the question for a score of one response."""
        return Question(filled(self.single, prompt=prompt, response=response), "score")

    def pair_question(self, prompt: str, first: str, second: str) -> Question:
        """Return the question which of two responses is better."""
        return Question(filled(self.pair, prompt=prompt, first=first, second=second), "verdict")

    def asked(self, questions: Sequence[Question]) -> list[float | None]:
        """Return the answer to each question, None for one that was skipped.

        Raises ValueError where an answer cannot be read and on_error=fail.
        """
        wanted = {self._key(q): q for q in questions if self._key(q) not in self.known}
        with self.store.open("a", encoding="utf-8") as out:
            responses = in_parallel(self.server, list(wanted.items()), self._ask, self.config.concurrency)
            for key, text in tqdm(responses, total=len(wanted), desc="judge", mininterval=1):
                try:
                    value = parsed(wanted[key].kind, text)
                except Unparsed as error:
                    if self.on_error == "fail":
                        raise ValueError(
                            f"{error}. What is judged is kept in {self.store}; take a better judge or template, or "
                            "leave such rows out "
                            "with on_error=skip"
                        ) from error
                    self.skipped[str(error)] += 1
                    continue
                self.known[key] = value
                append_row(out, {"key": key, "value": value, "text": text})
        return [self.known.get(self._key(q)) for q in questions]

    def _key(self, question: Question) -> str:
        facts = [self.model, self.config.temperature, self.config.max_tokens, *question]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _ask(self, task: tuple[str, Question]) -> tuple[str, str]:
        key, question = task
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question.message}],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            "seed": 0,
        }
        response = self.server.call("/chat/completions", payload)
        try:
            text = str(response["choices"][0]["message"]["content"] or "")
            return key, text[-MAX_CHARACTERS_A_TOKEN * self.config.max_tokens :]  # the verdict is its last line
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.server.base_url}/chat/completions answers without a message: {str(response)[:300]}"
            ) from error
