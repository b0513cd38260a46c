"""What changed in a model's answers: its words that the model it is compared with does not say there."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from report.markup import text

WORD = re.compile(r"\s+|\w+|[^\w\s]")
MOST_WORDS = 800  # of either side: comparing takes time that grows with the square


def parts_of(response: str, other: str) -> list[tuple[str, bool]]:
    """Cut a response into runs of text, each with whether `other` lacks it there; whole and unmarked if long."""
    ours, theirs = WORD.findall(response), WORD.findall(other)
    if max(len(ours), len(theirs)) > MOST_WORDS:
        return [(response, False)]
    found = []
    for kind, _, _, start, end in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if end > start:
            found.append(("".join(ours[start:end]), kind != "equal"))
    return found


def marked(response: str, other: str) -> str:
    """Write a response as HTML, what `other` lacks underlined."""
    return "".join(f"<ins>{text(part)}</ins>" if new else text(part) for part, new in parts_of(response, other))


def changed_share(samples: Sequence[Mapping[str, Any]], model: str, base: str) -> float | None:
    """Return the share of a model's characters, white space left out, that the base's answers do not have there.

    samples: {"prompt", "model", "response"}; None where the two answered no prompt in common.
    """
    said = {(str(row["prompt"]), str(row["model"])): str(row.get("response", "")) for row in samples}
    new = total = 0
    for (prompt, name), response in said.items():
        if name == model and (prompt, base) in said:
            for part, changed in parts_of(response, said[prompt, base]):
                count = len("".join(part.split()))
                total, new = total + count, new + count * changed
    return new / total if total else None
