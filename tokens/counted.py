"""What is counted while rows become tokens, and what of it deserves a warning at the start of a run."""

import numpy as np

from conversations import Conversation
from settings.schema import ModelConfig

DROPPED = "dropped: cannot be read"
MARKS = "spells control tokens"
COUNTED = (
    "dropped: no supervised token",
    "prompt shortened",
    "response cut",
    "seam tokenized apart",
    DROPPED,
    "empty message",
    "equal roles in a row",
    MARKS,
)
REASON = "why it was dropped"  # key of the meta data of a row that could not be read
MUCH = 0.05  # share of rows from which on a cut is worth a warning


def oddities_of(conversation: Conversation) -> list[str]:
    """Name what a data set should not have and can be trained on: empty messages, one role twice in a row."""
    found = set()
    for response in (conversation.chosen, conversation.rejected, conversation.response, []):
        messages = [*conversation.prompt, *(response or [])]
        for before, message in zip([None, *messages], messages, strict=False):
            if not message["content"].strip() and message not in (response or []):  # no response is counted elsewhere
                found.add("empty message")
            if before is not None and before["role"] == message["role"]:
                found.add("equal roles in a row")
    return sorted(found)


def concerns(counts: np.ndarray, forged: int, total: int, split: str, model: ModelConfig) -> list[str]:
    """Return warnings, with shares, of what training would go on from in silence.

    counts: of COUNTED. forged: rows whose text spells the tokenizer's marks, and is read so.
    """
    found = dict(zip(COUNTED, counts.tolist(), strict=True))
    advice = {
        "prompt shortened": f"at its beginning, to model.max_prompt_length={model.max_prompt_length}: raise it",
        "response cut": f"at model.max_length={model.max_length}, so it has no end: raise it, or leave such rows out",
    }
    lines = [
        f"warning: {split}: {what} in {found[what] / total:.0%} of {total} rows, {how}"
        for what, how in advice.items()
        if found[what] > MUCH * total
    ]
    if forged:
        lines.append(
            f"warning: {split}: {forged} of {total} rows spell the tokenizer's own marks in their text, and so can end "
            "and begin turns: datasets.NAME.special_tokens=split takes them as plain text"
        )
    return lines
