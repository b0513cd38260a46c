"""Two tokenizers of one text: which tokens are the same bytes, and what a teacher's entries become."""

import numpy as np
import pytest

import launch
import models
from teacher.alignment import Side, Span, align, common_spans, covered, offsets
from teacher.mixture import ABSENT
from teacher.quantities import Entry
from teacher.spans import aligned, laid_onto, response_ids, translation
from teacher.vocabulary import NOTHING, check_shared_ids, matched_ids, token_bytes
from tests.support.helpers import composed
from tests.support.tokenizers import small

TEXTS = [
    "The ant and the bee speak!",
    "naïve café? 日本語 🙂 the newt",
    "  two spaces,\n\n a break and\ttabs ",
    "x",
    "e\u0301 the decomposed, ﬁ the ligature, \u00a0 the hard space",
]


@pytest.fixture(scope="module")
def byte_level():
    return models.load_tokenizer(launch.settings_of(composed("model=tiny")).model)


def side(tokenizer, text: str, ended: bool = True) -> tuple[Side, list[int]]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*ids, tokenizer.eos_token_id] if ended else ids
    pieces = token_bytes(tokenizer)
    return Side([pieces[i] for i in ids], ended), ids


def pieces(*texts: str, ended: bool = False) -> Side:
    return Side([text.encode() for text in texts] + ([None] if ended else []), ended)


# ---- the pure function


def test_spans_begin_and_end_together():
    assert common_spans([(0, 3), (3, 5), (5, 6)], [(0, 3), (3, 4), (4, 6)], 6) == [Span(0, 1, 0, 1), Span(1, 3, 1, 3)]
    assert common_spans([(0, 6)], [(0, 1), (1, 6)], 6) == [Span(0, 1, 0, 2)]
    assert common_spans([], [(0, 1)], 1) == []
    assert common_spans([(0, 2), (2, 4)], [(0, 2), (2, 4)], 3) == [Span(0, 1, 0, 1)]  # the texts part at byte 3
    # a token without text has no place of its own: the span that it falls into is left out, the next one is not
    assert common_spans([(0, 1), (1, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)], 3) == [
        Span(0, 1, 0, 1),
        Span(3, 4, 2, 3),
    ]


def test_the_ends_of_a_turn_are_aligned_with_each_other_only_behind_the_same_text():
    both = align(pieces("a", "b", ended=True), pieces("ab", ended=True))
    assert both == [Span(0, 2, 0, 1), Span(2, 3, 1, 2)]
    assert align(pieces("a", "b", ended=True), pieces("ab")) == both[:1]
    assert align(pieces("a", "b", ended=True), pieces("a", ended=True)) == [Span(0, 1, 0, 1)]
    assert align(pieces(ended=True), pieces(ended=True)) == [Span(0, 1, 0, 1)]


def test_what_stands_behind_the_first_difference_is_in_no_span():
    assert align(pieces("so", "me", " day"), pieces("so", "me", " Day")) == [Span(0, 1, 0, 1), Span(1, 2, 1, 2)]
    assert align(pieces("some", " more"), pieces("some")) == [Span(0, 1, 0, 1)]  # one of them was cut


def test_a_space_that_a_tokenizer_writes_at_the_beginning_is_no_difference():
    assert align(pieces(" The", " ant"), pieces("The", " a", "nt")) == [Span(0, 1, 0, 1), Span(1, 2, 1, 3)]
    assert align(pieces(" ", "The"), pieces("The")) == []  # the space alone has no place in the other text
    assert offsets(pieces(" ", "The", ended=True), 1) == [(0, 0), (0, 3)]


# ---- real tokenizers


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(byte_level, kind, text):
    tokenizer = byte_level if kind == "byte" else small(kind)
    found, ids = side(tokenizer, text, ended=False)
    assert len(ids) > 0
    assert found.text in (text.encode(), b" " + text.encode())  # a unigram tokenizer begins with a space


@pytest.mark.parametrize("kinds", [("byte", "bpe"), ("bpe", "unigram"), ("unigram", "byte"), ("bpe", "bpe")])
@pytest.mark.parametrize("text", TEXTS)
def test_spans_of_two_tokenizers_are_the_same_bytes_and_the_shortest(byte_level, kinds, text):
    ours, theirs = (side(byte_level if kind == "byte" else small(kind), text)[0] for kind in kinds)
    spans = align(ours, theirs)
    for span in spans[:-1]:
        mine = b"".join(ours.pieces[span.start : span.end])
        other = b"".join(theirs.pieces[span.their_start : span.their_end])
        assert mine == other or (span.start == 0 and mine.lstrip() == other.lstrip())
        for cut in range(1, span.end - span.start):  # no shorter one within
            inner = b"".join(ours.pieces[span.start : span.start + cut]).lstrip()
            heads = [
                b"".join(theirs.pieces[span.their_start : k]).lstrip()
                for k in range(span.their_start + 1, span.their_end)
            ]
            assert not inner or inner not in heads
    assert spans[-1] == Span(len(ours.pieces) - 1, len(ours.pieces), len(theirs.pieces) - 1, len(theirs.pieces))
    # the space that the unigram tokenizer brings is a token of its own before "日": at most the first span is missing
    assert covered(spans) >= len(ours.pieces) - (spans[0].start if spans else 0)
    if kinds[0] == kinds[1]:
        assert all(span.is_single for span in spans) and covered(spans) == len(ours.pieces)


def test_characters_split_over_tokens_are_one_span_with_the_token_that_holds_them(byte_level):
    ours, theirs = Side([bytes([b]) for b in "é🙂".encode()], False), pieces("é", "🙂")
    assert align(ours, theirs) == [Span(0, 2, 0, 1), Span(2, 6, 1, 2)]
    split = Side(["日".encode()[:2], "日".encode()[2:]], False)  # neither side holds the character whole
    assert align(split, Side(["日".encode()[:1], "日".encode()[1:]], False)) == [Span(0, 2, 0, 2)]


def test_whole_words_against_bytes(byte_level):
    ours, theirs = side(small("words"), "say ant 0!")[0], side(byte_level, "say ant 0!")[0]
    spans = align(ours, theirs)
    assert [(s.end - s.start, s.their_end - s.their_start) for s in spans] == [(1, 3), (1, 4), (1, 3), (1, 1)]
    lossy, _ = side(small("words"), "say  ant 0!")  # two spaces: words do not keep them
    assert covered(align(lossy, side(byte_level, "say  ant 0!")[0])) == 1


def test_ids_are_matched_by_their_bytes_one_to_one_and_the_ends_of_a_turn_with_each_other(byte_level):
    theirs, ours = small("unigram"), small("bpe")
    found = matched_ids(theirs, ours)
    pieces_of_ours, pieces_of_theirs = token_bytes(ours), token_bytes(theirs)
    known = np.flatnonzero(found != NOTHING)
    assert len(set(found[known].tolist())) == len(known) > 100
    assert found[theirs.eos_token_id] == ours.eos_token_id
    assert all(pieces_of_theirs[i] == pieces_of_ours[found[i]] for i in known.tolist() if pieces_of_theirs[i])
    assert found[theirs.convert_tokens_to_ids("<pad>")] == ours.convert_tokens_to_ids("<pad>")
    assert found[theirs.convert_tokens_to_ids("<unk>")] == NOTHING


def test_shared_ids_that_are_other_tokens_are_refused_with_both_texts(byte_level):
    assert check_shared_ids(byte_level, byte_level, "x") == len(byte_level)
    with pytest.raises(ValueError, match=r"\d+ of the 259 ids .*first, id 0, is 'Ā' for the policy and '<pad>' there"):
        check_shared_ids(byte_level, small("bpe"), "teacher")


# ---- a teacher's entries on the student's tokens


def of_text(ours, theirs, text: str) -> tuple:
    between = translation(ours, theirs)
    ids, other = side(ours, text)[1], side(theirs, text)[1]
    return between, aligned(between, ids, other), ids, other


def drawn(other: list[int], vocabulary: int, k: int) -> Entry:
    """Draw entries whose first one is the token that comes."""
    rng = np.random.default_rng(1)
    ids = np.stack([np.r_[i, rng.permutation([x for x in range(vocabulary) if x != i])[: k - 1]] for i in other])
    return Entry(ids, np.log(0.9 * rng.dirichlet(np.ones(k), len(other))).astype(np.float32), np.full(len(other), 0.1))


def test_with_one_tokenizer_every_token_keeps_its_entries():
    bpe = small("bpe")
    between, found, _, other = of_text(bpe, bpe, TEXTS[0])
    words = [i for i, piece in enumerate(token_bytes(bpe)) if piece]
    entry = drawn(other, 340, 5)
    entry = entry._replace(ids=np.where(np.isin(entry.ids, [*words, bpe.eos_token_id]), entry.ids, words[0]))
    laid = laid_onto(found, entry, between, span_loss="kl")
    assert np.array_equal(laid.ids, entry.ids) and np.array_equal(laid.values, entry.values)
    assert (laid.spans == -1).all() and len(laid.span_logps) == 0


def test_a_span_gets_the_sum_of_its_tokens_and_a_single_token_the_matching_entries(byte_level):
    bpe = small("bpe")
    between, found, ids, other = of_text(bpe, byte_level, "The ant 7")
    entry = drawn(other, 259, 6)
    laid = laid_onto(found, entry, between, span_loss="kl")
    for span in found.spans:
        rows = slice(span.start, span.end)
        if span.is_single:
            kept = laid.values[span.start] > ABSENT
            source = entry.values[span.their_start]
            assert np.array_equal(laid.values[span.start][kept], source[kept]) and kept[0]
            assert laid.ids[span.start][0] == ids[span.start]
            assert laid.tail[span.start] == pytest.approx(1 - np.exp(source[kept]).sum(), abs=1e-6)
        else:
            number = laid.spans[span.start]
            assert (laid.spans[rows] == number).all() and (laid.values[rows] == ABSENT).all()
            logp = entry.values[span.their_start : span.their_end, 0].sum()
            assert laid.span_logps[number] == pytest.approx(logp, rel=1e-6)
    assert len(laid.span_logps) == sum(not span.is_single for span in found.spans) > 0
    short = entry._replace(
        ids=np.where(entry.ids == other[1], 0, entry.ids)
    )  # the top k lacks a token of the first span
    assert len(laid_onto(found, short, between, span_loss="kl").span_logps) == len(laid.span_logps) - 1


def test_for_golds_hybrid_entries_without_a_token_of_ours_stay_under_no_id(byte_level):
    bpe = small("bpe")
    between, found, _, other = of_text(byte_level, bpe, "The ant 7")
    entry = drawn(other, len(bpe), 40)  # most of its tokens are of several bytes
    plain, laid = (laid_onto(found, entry, between, span_loss=name) for name in ("kl", "gold"))
    single = [span for span in found.spans if span.is_single]
    for span in single:
        assert np.array_equal(laid.values[span.start], entry.values[span.their_start])
        kept = plain.values[span.start] > ABSENT
        assert np.array_equal(laid.ids[span.start] >= 0, kept)
        assert np.array_equal(laid.ids[span.start][kept], plain.ids[span.start][kept])
    assert any((laid.ids[span.start] < 0).any() for span in single)
    assert np.array_equal(laid.spans, plain.spans) and np.array_equal(laid.span_logps, plain.span_logps)


def test_the_first_tokens_entries_lose_the_space_that_only_one_tokenizer_writes():
    bpe, unigram = small("bpe"), small("unigram")
    between = translation(bpe, unigram)
    ours, theirs = ([(i, p) for i, p in enumerate(token_bytes(t)) if p and p.isascii()] for t in (bpe, unigram))
    word, ids, other = next((p, [i], [j]) for i, p in ours for j, q in theirs if q == b" " + p)
    found = aligned(between, ids, other)
    assert found.spans == [Span(0, 1, 0, 1)] and found.ours.pieces == [word]
    entry = drawn(other, len(unigram), 4)
    laid = laid_onto(found, entry, between, span_loss="kl")
    assert laid.ids[0, 0] == ids[0] and laid.values[0, 0] == entry.values[0, 0]


def test_response_ids_are_the_supervised_ones(byte_level):
    from dataloader import Tokens

    assert response_ids(Tokens([5, 6, 7], [False, True, True])) == [6, 7]
