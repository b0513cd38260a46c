"""Which tokens of two tokenizers stand for the same piece of a text, by byte offsets.

A response is a text and maybe the end of the turn. A span is the shortest run of tokens of each side that begins and
ends together with one of the other side. Letters: L tokens of ours, M tokens of theirs.
"""

from collections.abc import Sequence
from typing import NamedTuple

Offsets = list[tuple[int, int]]  # the bytes [start, end) of each token


class Side(NamedTuple):
    """A response in the tokens of one tokenizer: each one's bytes (None: no text), and whether the turn ends with the
    last one, which then is no text."""

    pieces: Sequence[bytes | None]
    ended: bool

    @property
    def text(self) -> bytes:
        """Return the bytes of all tokens."""
        return b"".join(piece or b"" for piece in self.pieces)


class Span(NamedTuple):
    """Tokens [start, end) of ours, and [their_start, their_end) of theirs, that are the same bytes."""

    start: int
    end: int
    their_start: int
    their_end: int

    @property
    def is_single(self) -> bool:
        """Tell whether it is one token on both sides."""
        return self.end - self.start == self.their_end - self.their_start == 1


def side_of(ids: Sequence[int], pieces: Sequence[bytes | None], end: int | None) -> Side:
    """Take the ids of a response apart: the bytes of each token, the end of the turn set apart."""
    return Side([pieces[i] for i in ids], bool(ids) and ids[-1] == end)


def lead(side: Side) -> int:
    """Return how many bytes of white space a response begins with: a tokenizer may write a space of its own there."""
    text = side.text
    return len(text) - len(text.lstrip())


def offsets(side: Side, skipped: int) -> Offsets:
    """Return the bytes of each token, counted from behind `skipped` leading ones; tokens without text are empty."""
    found, at = [], -skipped
    for piece in side.pieces[: len(side.pieces) - side.ended]:
        after = at + len(piece or b"")
        found.append((max(0, at), max(0, after)))
        at = after
    return found


def common_spans(ours: Offsets, theirs: Offsets, limit: int) -> list[Span]:
    """Return the spans within the first `limit` bytes, in order; those with an empty token in them are left out."""
    spans, begin, their_begin = [], 0, 0
    i = j = 0  # tokens of either side that are behind us
    while i < len(ours) and j < len(theirs):
        if min(ours[i][1], theirs[j][1]) > limit:
            break
        if ours[i][1] < theirs[j][1]:
            i += 1
        elif ours[i][1] > theirs[j][1]:
            j += 1
        else:
            i, j = i + 1, j + 1
            pieces = [*ours[begin:i], *theirs[their_begin:j]]
            if all(start < end for start, end in pieces):
                spans.append(Span(begin, i, their_begin, j))
            begin, their_begin = i, j
    return spans


def align(ours: Side, theirs: Side) -> list[Span]:
    """Align two tokenizations of one response, as far as their texts agree; the ends of the turn with each other.

    White space at the very beginning may differ (the space that a tokenizer writes there). What stands behind the first
    other difference, or behind a cut, is in no span; then the ends of the turn are in none, either.
    """
    texts = ours.text, theirs.text
    skipped = (0, 0) if _prefixed(*texts) else (lead(ours), lead(theirs))
    mine, other = (text[skip:] for text, skip in zip(texts, skipped, strict=True))
    limit = common_prefix(mine, other)
    spans = common_spans(offsets(ours, skipped[0]), offsets(theirs, skipped[1]), limit)
    if ours.ended and theirs.ended and mine == other:
        spans.append(Span(len(ours.pieces) - 1, len(ours.pieces), len(theirs.pieces) - 1, len(theirs.pieces)))
    return spans


def common_prefix(mine: bytes, other: bytes) -> int:
    """Return how many bytes two texts agree from the start."""
    size = min(len(mine), len(other))
    return next((i for i in range(size) if mine[i] != other[i]), size)


def _prefixed(mine: bytes, other: bytes) -> bool:
    """Tell whether one text begins with the other."""
    return mine.startswith(other) or other.startswith(mine)


def covered(spans: Sequence[Span]) -> int:
    """Return how many tokens of ours are in spans."""
    return sum(span.end - span.start for span in spans)
