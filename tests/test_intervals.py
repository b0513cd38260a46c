"""Intervals against numbers from elsewhere, and against how often they hold the truth."""

import numpy as np
import pytest

from evaluation.intervals import (
    bootstrap_interval,
    paired_difference,
    proportion_interval,
    score_interval,
    seed_interval,
    student_quantile,
)


def test_proportion_interval_agrees_with_published_wilson_intervals() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert proportion_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_student_quantiles_join_without_a_step_and_tend_to_the_normal() -> None:
    assert student_quantile(2) == pytest.approx(4.3027, abs=1e-4)
    assert student_quantile(40) == pytest.approx(2.0211, abs=1e-4)
    assert student_quantile(31) == pytest.approx(2.0395, abs=1e-4)
    assert student_quantile(10**9) == pytest.approx(1.959964, abs=1e-6)
    quantiles = [student_quantile(degrees) for degrees in range(1, 60)]
    assert quantiles == sorted(quantiles, reverse=True)


def test_seed_interval_of_three_seeds_is_that_of_students_t() -> None:
    # R: t.test(c(.488, .559, .436))$conf.int
    low, high = seed_interval([0.488, 0.559, 0.436]) or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(0.494333, abs=1e-6)
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.0617441 / 3**0.5, abs=1e-4)
    assert seed_interval([0.5]) is None


def test_intervals_over_prompts_hold_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    held = {"wilson": 0, "bootstrap": 0}
    for _ in range(200):
        values = (rng.random(150) < 0.3).astype(float).tolist()
        for name, (low, high) in {
            "wilson": score_interval(values),
            "bootstrap": bootstrap_interval(values, 400),
        }.items():
            held[name] += low <= 0.3 <= high
    # 200 tries at .95 have a standard deviation of 3: four of them either side.
    assert all(178 <= count <= 200 for count in held.values()), held


def test_scores_that_are_not_yes_or_no_take_the_bootstrap() -> None:
    values = [0.0, 0.5, 1.0] * 50
    assert score_interval(values) == bootstrap_interval(values)
    assert score_interval([1.0] * 10)[1] == 1.0


def test_pairing_makes_the_interval_narrower_where_prompts_differ_in_difficulty() -> None:
    rng = np.random.default_rng(1)
    easy = rng.random(400)
    first, second = (easy + 0.05).tolist(), (easy + rng.normal(0, 0.01, 400)).tolist()
    mean, (low, high) = paired_difference(first, second)
    alone = bootstrap_interval(first)
    assert low <= mean <= high
    assert mean == pytest.approx(0.05, abs=0.005)
    assert high - low < 0.1 * (alone[1] - alone[0])
    assert paired_difference(first, second) == paired_difference(first, second)


def test_scores_of_different_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 scores"):
        paired_difference([1.0, 0.0, 1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="n=0"):
        proportion_interval(0, 0)
