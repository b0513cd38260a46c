"""The entries of a teacher with another tokenizer, laid onto the student's tokens by byte offsets.

Letters: L response tokens of the student, M of the teacher, K entries a token, S spans of several tokens.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dataloader import Tokens
from teacher.alignment import Side, Span, align, covered, lead, side_of
from teacher.mixture import ABSENT
from teacher.quantities import Entry
from teacher.vocabulary import NOTHING, matched_ids, token_bytes
from templates import turn_end

MERGES = ("none", "observed", "bayesian")


class Translation(NamedTuple):
    """Two tokenizers: the bytes of their tokens, the ids that end a turn, and their ids as ours where they match."""

    pieces: Sequence[bytes | None]
    their_pieces: Sequence[bytes | None]
    end: int | None
    their_end: int | None
    matches: np.ndarray
    by_bytes: dict[bytes, int]


@lru_cache(maxsize=4)
def translation(ours: Any, theirs: Any) -> Translation:
    """Put two tokenizers beside each other."""
    pieces = token_bytes(ours)
    by_bytes: dict[bytes, int] = {}
    for i, piece in enumerate(pieces):
        if piece:
            by_bytes.setdefault(piece, i)
    ends = turn_end(ours).id, turn_end(theirs).id
    return Translation(pieces, token_bytes(theirs), *ends, matched_ids(theirs, ours), by_bytes)


def response_ids(tokens: Tokens) -> list[int]:
    """Return the supervised ids."""
    return [i for i, on in zip(tokens.ids, tokens.response, strict=True) if on]


class Aligned(NamedTuple):
    """A response in both tokenizers' tokens and the spans that are common."""

    ours: Side
    theirs: Side
    their_ids: list[int]
    spans: list[Span]


def aligned(between: Translation, ours: Sequence[int], theirs: Sequence[int]) -> Aligned:
    """Align the ids of one response in both tokenizers."""
    mine = side_of(ours, between.pieces, between.end)
    other = side_of(theirs, between.their_pieces, between.their_end)
    return Aligned(mine, other, list(theirs), align(mine, other))


def token_logp(entry: Entry, position: int, token: int) -> float:
    """Return a teacher's log-probability of one token; nan where its top k lacks it, because nobody knows it then."""
    at = np.flatnonzero((entry.ids[position] == token) & ~np.isneginf(entry.values[position]))
    return float(entry.values[position][at[0]]) if len(at) else float("nan")


def laid_onto(found: Aligned, entry: Entry, between: Translation, span_loss: str, merge: str = "none") -> Entry:
    """Return entries [L, K] for the student's tokens, from the teacher's [M, K].

    A span of one token on both sides gets the teacher's entries, their ids as ours; entries without a token of ours
    go to the tail. A span of several tokens is one event: the sum of the teacher's log-probabilities of its tokens; it
    is left out if one of them is outside the top k. What is in no span has no entries.

    span_loss `uld`: the first token of every span gets the teacher's log-probabilities there, without ids. `gold`:
    entries without a token of ours stay, under the id NOTHING.

    merge `observed`: the first token of a span of several gets the teacher's entries at its first token there, times
    the probability of the others; `bayesian`: the last token, those at the last one, times that of those before. All
    tokens of ours are then in a span whose log-probability is that factor. Left out where the factor is not known.
    """
    length, width = len(found.ours.pieces), entry.ids.shape[1]
    ids, values = np.zeros((length, width), np.int64), np.full((length, width), ABSENT, np.float32)
    spans, span_logps = np.full(length, NOTHING, np.int64), list[float]()
    for span in found.spans:
        if merge != "none" and not span.is_single:
            base, their_base = _bases(span, merge)
            others = [t for t in range(span.their_start, span.their_end) if t != their_base]
            factor = sum(token_logp(entry, t, found.their_ids[t]) for t in others)
            if not np.isnan(factor):
                spans[span.start : span.end] = len(span_logps)
                span_logps.append(factor)
                mapped = _mapped(found, base, entry.ids[their_base], between) if span_loss == "gold" else 0
                ids[base], values[base] = mapped, entry.values[their_base] + factor
        elif span_loss == "uld":
            values[span.start] = entry.values[span.their_start]
        elif span.is_single:
            mapped = _mapped(found, span.start, entry.ids[span.their_start], between)
            known = mapped != NOTHING
            kept = known if span_loss == "kl" else np.ones_like(known)
            ids[span.start] = np.where(kept, mapped, 0)
            values[span.start] = np.where(kept, entry.values[span.their_start], ABSENT)
        else:
            there = range(span.their_start, span.their_end)
            logp = sum(token_logp(entry, t, found.their_ids[t]) for t in there)
            if not np.isnan(logp):
                spans[span.start : span.end] = len(span_logps)
                span_logps.append(logp)
    tail = np.clip(1.0 - np.exp(values).sum(axis=-1), 0.0, None).astype(np.float32)
    return Entry(ids, values, tail, None, spans, np.asarray(span_logps, np.float32))


def _bases(span: Span, merge: str) -> tuple[int, int]:
    """Return the token of ours, and the one of theirs, whose distribution stands for a span."""
    return (span.start, span.their_start) if merge == "observed" else (span.end - 1, span.their_end - 1)


def _mapped(found: Aligned, place: int, their_ids: np.ndarray, between: Translation) -> np.ndarray:
    """Return their ids [K] at our token `place` as ours; at the very beginning a tokenizer's own white space is
    exchanged for ours."""
    leads = tuple(side.text[: lead(side)] for side in (found.ours, found.theirs))
    if place or leads[0] == leads[1]:
        return between.matches[their_ids]
    mapped: list[int] = []
    for i in their_ids.tolist():
        piece, own = between.their_pieces[i], NOTHING
        if piece is not None and piece.startswith(leads[1]) and piece != leads[1]:
            own = between.by_bytes.get(leads[0] + piece[len(leads[1]) :], NOTHING)
        elif i == between.their_end and between.end is not None:
            own = between.end
        mapped.append(NOTHING if own in mapped else own)
    return np.asarray(mapped, np.int64)


def compared_tokens(entry: Entry) -> int:
    """Count the student's tokens [L] that have entries, or are in a span with a probability."""
    assert entry.spans is not None
    return int((~np.isneginf(entry.values).all(axis=-1) | (entry.spans >= 0)).sum())


def check_coverage(found: Sequence[Aligned], least: float) -> float:
    """Return the share of the student's tokens in aligned spans; ValueError below `least` shows the worst response."""
    counts = [(covered(one.spans), len(one.ours.pieces)) for one in found]
    return check_shares(np.array(counts).reshape(-1, 2), least, found.__getitem__)


def check_shares(counts: np.ndarray, least: float, response: Callable[[int], Aligned]) -> float:
    """Return the share of tokens in aligned spans, given how many there are in each response [n, 2] and how many tokens
    it has; ValueError below `least` shows the worst `response`.
    """
    inside, tokens = (int(total) for total in counts.sum(axis=0))
    share = inside / tokens if tokens else 1.0
    if share >= least:
        return share
    worst = int(np.argmin(np.where(counts[:, 1] > 0, counts[:, 0] / np.maximum(counts[:, 1], 1), np.inf)))
    raise ValueError(
        f"{share:.1%} of {tokens} response tokens are in spans of text that both tokenizers have, less than "
        f"loss.min_coverage={least}. The worst response, a bar where a common span begins:\n{shown(response(worst))}\n"
        "Do both tokenizers keep the text as it is, and cut it at the same place (model.max_length counts tokens)?"
    )


def shown(found: Aligned) -> str:
    """Show a response as both tokenizers write it, a bar where an aligned span begins."""
    rows = []
    for name, side, places in (
        ("student", found.ours, [(s.start, s.end) for s in found.spans]),
        ("teacher", found.theirs, [(s.their_start, s.their_end) for s in found.spans]),
    ):
        begins, words = {start for start, _ in places}, []
        for i, piece in enumerate(side.pieces):
            words.append(("|" if i in begins else " ") + (piece or b"<>").decode(errors="replace"))
        rows.append(f"  {name}: {''.join(words)[:200]!r}")
    return "\n".join(rows)
