"""The questions that a reader of a report asks, as its headings, and their short answers above them.

A question without a part is left out. The sections below a question keep their own anchors.
"""

from collections.abc import Sequence
from typing import NamedTuple

from report.markup import text

ASKED = {  # anchor: the question
    "who": "Who wins, by how much, and is it sure?",
    "cost": "What did it cost?",
    "changed": "What changed in its answers?",
    "teacher": "Where did the teacher push?",
    "data": "Is the data sound?",
    "training": "How did training go?",
}


class Part(NamedTuple):
    """What answers a question: sentences (plain text) for the list on top, and sections as HTML."""

    question: str  # a key of ASKED
    answers: Sequence[str]
    sections: str


def contents(parts: Sequence[Part]) -> str:
    """Write the list on top: every question as a link, its short answers below it."""
    items = "".join(
        f'<li><a href="#{part.question}">{ASKED[part.question]}</a>'
        + "".join(f"<p>{text(answer)}</p>" for answer in part.answers)
        + "</li>"
        for part in parts
        if part.sections
    )
    return f'<nav class="contents" aria-label="Questions"><ol>{items}</ol></nav>' if items else ""


def answered(parts: Sequence[Part]) -> str:
    """Write every question with its sections; their headings stand one level below its own."""
    return "".join(
        f'<div class="question" id="{part.question}"><h2>{ASKED[part.question]}</h2>{_lower(part.sections)}</div>'
        for part in parts
        if part.sections
    )


def _lower(sections: str) -> str:
    """Put headings a level lower; what strangers wrote is escaped, so no tag is theirs."""
    for level in (4, 3, 2):
        sections = sections.replace(f"<h{level}>", f"<h{level + 1}>").replace(f"</h{level}>", f"</h{level + 1}>")
    return sections
