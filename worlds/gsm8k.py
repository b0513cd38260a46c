"""Judge solutions in GSM8K's form: exact match of the number after `####`, or of the last number, with the reference's.

The reference travels in the row's meta data under `answer` (conversations.py puts it there for format gsm8k). Numbers
are compared as numbers: `$1,080.00`, `1080` and `1080.` are one.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

# As in the script of the data set's authors the first #### counts: a model cannot guess several times.
FINAL = re.compile(r"####\s*(-?)\s*\$?\s*(-?)(\d[\d,]*(?:\.\d*)?|\.\d+)")
LAST = re.compile(r"(-?)\$?(\d[\d,]*(?:\.\d+)?)(?!\d)")
TAIL = 400  # characters at the end of a response in which its last number is looked for
MAX_CHARACTERS = 40  # of ####, a number, and the space between: only so much is looked at, as FINAL may try its
# three stretches of space in every way


def final_number(response: str) -> Fraction | None:
    """Return the number after the first `####`; None where there is none."""
    start = response.find("####")
    match = FINAL.match(response[start : start + MAX_CHARACTERS + 1]) if start >= 0 else None
    if match is None or len(match[0]) > MAX_CHARACTERS:
        return None
    value = Fraction(match[3].replace(",", "").rstrip("."))
    return -value if match[1] or match[2] else value


def last_number(response: str) -> Fraction | None:
    """Return the last number, of at most 40 characters, in the last 400 characters of a response, or None."""
    found = [match for match in LAST.finditer(response[-TAIL:]) if len(match[0]) <= MAX_CHARACTERS]
    if not found:
        return None
    value = Fraction(found[-1][2].replace(",", ""))
    return -value if found[-1][1] else value


def vote(response: str) -> str | None:
    """Return the answer of a solution in one spelling, for a majority; None where it gives none."""
    value = final_number(response)
    return None if value is None else str(value)


def check(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """Return 1.0 where the number after the first `####` is the reference's, else 0.0; ValueError for a row without a
    usable reference.
    """
    return float(final_number(response) == _reference("check", prompt, meta))


def check_last(prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """Return 1.0 where the last number is the reference's, else 0.0: for models that have not learned to write `####`.

    lm-evaluation-harness calls it flexible-extract. A row without a usable reference is a ValueError.
    """
    return float(last_number(response) == _reference("check_last", prompt, meta))


def _reference(name: str, prompt: str, meta: Mapping[str, Any]) -> Fraction:
    reference = final_number(f"#### {meta['answer']}") if isinstance(meta.get("answer"), str) else None
    if reference is None:
        raise ValueError(
            f"worlds.gsm8k:{name} needs the reference in the row's `answer`, this one has {meta.get('answer')!r}: "
            f"read the data with format gsm8k (question, answer). The prompt is {prompt[:80]!r}"
        )
    return reference
