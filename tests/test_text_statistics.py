"""Text statistics: what counts as a refusal, a repetition, a loop."""

import numpy as np
import pytest

from evaluation.text_statistics import ends_in_loop, refuses, repeated_grams, text_metrics

PHRASES = ["I can't", "i'm sorry, but"]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I’m sorry,\n but no.", True),  # a typeset apostrophe, a line break
        ("Well: I CAN'T do that", True),
        ("I can do that", False),
        ("Here is the poem you want. " * 8 + "I can't go on.", False),  # past the opening
        ("", False),
    ],
)
def test_a_refusal_is_a_phrase_in_the_opening(text: str, refused: bool) -> None:
    assert refuses(text, PHRASES) == refused


def test_repeated_4grams_are_counted_by_hand() -> None:
    assert repeated_grams("a b c d") == 0.0  # one
    assert repeated_grams("a b c") == 0.0  # none
    assert repeated_grams("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repeated_grams("x " * 13) == pytest.approx(9 / 10)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("fine so far " + "and so on " * 5, True),
        ("it begins. " + "one two three four five six " * 3 + "one two", True),  # cut inside a turn
        ("one two three four five six " * 2, False),  # twice is no loop
        ("no no no", False),  # too short to be one
        ("word " + "ha" * 40, True),  # no spaces
        ("the end of a text that has nothing to say twice, and stops", False),
        ("so on " * 20 + "and then it ended well after all of this talk", False),  # a loop that was left
        ("", False),
    ],
)
def test_a_loop_is_an_end_that_says_the_same_three_times(text: str, loops: bool) -> None:
    assert ends_in_loop(text) == loops


def test_the_metrics_of_a_model_are_those_of_its_responses() -> None:
    texts = ["I can't", "a b c d a b c d", "ho " * 10, " "]
    metrics = text_metrics(texts, [3, 8, 11, 1], PHRASES)
    assert (metrics["refusal_rate"], metrics["loop_rate"], metrics["empty_rate"]) == (0.25, 0.25, 0.25)
    assert metrics["repeated_4grams"] == pytest.approx((0 + 1 / 5 + 6 / 7 + 0) / 4)
    assert (metrics["mean_response_tokens"], metrics["p50_response_tokens"]) == (5.75, 5.5)
    assert metrics["p95_response_tokens"] == pytest.approx(np.quantile([3, 8, 11, 1], 0.95))
    low, high = metrics["refusal_rate_ci95"]
    assert 0 < low < 0.25 < high < 1
    with pytest.raises(ValueError, match="no responses"):
        text_metrics([], [], PHRASES)
