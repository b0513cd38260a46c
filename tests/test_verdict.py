"""The verdict sentence, the sheet of temperatures, and Bradley-Terry strengths."""

import math

import numpy as np
import pytest

from evaluation.bradley_terry import ELO, cells, elo_rows, strengths, wins_of
from evaluation.comparisons import compare_all
from evaluation.results import temperature_cells
from evaluation.verdict import judged_verdict, pooled_verdict, verdict


def test_two_models_strengths_are_the_log_odds_of_their_wins():
    found = strengths(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=0.0)
    assert found[0] - found[1] == pytest.approx(math.log(3), abs=1e-8)


def test_strengths_are_those_of_gradient_ascent_on_the_likelihood():
    wins = np.array([[0, 7, 9, 4], [3, 0, 6, 5], [1, 4, 0, 2], [6, 5, 8, 0]], dtype=float)
    counts, s = wins + 0.5 * (1 - np.eye(4)), np.zeros(4)
    for _ in range(5_000):
        chance = 1 / (1 + np.exp(s[None, :] - s[:, None]))
        s = s + 0.02 * (counts * (1 - chance) - counts.T * chance).sum(axis=1)
    np.testing.assert_allclose(strengths(wins), s - s.mean(), atol=1e-7)


def test_strengths_settle_where_two_groups_never_lose_to_each_other():
    wins = np.array([[0, 500, 1000, 1000], [500, 0, 1000, 1000], [0, 0, 0, 500], [0, 0, 500, 0]], dtype=float)
    found = strengths(wins)
    np.testing.assert_allclose(found, np.log(1000.5 / 0.5) / 2 * np.array([1, 1, -1, -1]), rtol=1e-9)


def test_ties_are_half_a_win_and_equal_models_have_no_points():
    assert wins_of(np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])).tolist() == [[0, 1.5], [1.5, 0]]
    rows = elo_rows({"a": [1.0] * 8, "b": [1.0] * 8})
    assert rows["a"] == {"elo": pytest.approx(0.0), "ci95": pytest.approx([0.0, 0.0])}
    assert elo_rows({"a": [1.0], "b": []}) == {}


def test_a_model_that_always_wins_has_finite_points_and_stands_first():
    rows = elo_rows({"b": [0.0] * 10, "a": [1.0] * 10})
    assert rows["a"]["elo"] - rows["b"]["elo"] == pytest.approx(math.log(10.5 / 0.5) * ELO)
    assert cells({"bradley_terry": rows})[1][0] == "a" and cells({"bradley_terry": rows})[1][1].startswith("+")


def test_the_verdict_says_above_only_of_pairs_that_are_separate():
    scores = {"a": [1.0] * 40, "b": [1.0] * 39 + [0.0], "c": [0.0] * 40}
    models = {name: {"score": float(np.mean(values))} for name, values in scores.items()}
    said = verdict(models, compare_all(scores))
    assert said.startswith("a is above c by 1.000 [1.000, 1.000]; b cannot be told apart from it (0.025 [")
    pair = {name: scores[name] for name in "ab"}
    said = verdict({name: models[name] for name in "ab"}, compare_all(pair))
    assert said.startswith("b cannot be told apart from a (0.025 [") and "above" not in said
    assert verdict({"a": models["a"]}, []) == ""


def test_the_sheet_holds_every_temperature_in_order():
    def entry(score):
        return {"score": score, "ci95": [score - 0.1, score + 0.1]}

    row = {**entry(0.5), "temperature": 1.0, "greedy": entry(0.7), "other_temperatures": {"0.3": entry(0.6)}}
    rows = temperature_cells({"models": {"a": row}, "temperatures": [1.0, 0.0, 0.3]})
    assert rows[0] == ["model", "greedy", "t 0.3", "t 1"]
    assert rows[1] == ["a", "0.700 [0.600, 0.800]", "0.600 [0.500, 0.700]", "0.500 [0.400, 0.600]"]
    assert temperature_cells({"models": {"a": row}, "temperatures": [1.0]}) == []


def test_what_a_judge_s_intervals_carry_is_said_at_equal_length_where_length_was_taken_out():
    def judged(rate: float, low: float, high: float, **more: object) -> dict[str, object]:
        return {"judged": {"opponent": "sft", "by": "judge", "win_rate": rate, "win_rate_ci95": [low, high], **more}}

    models = {"a": judged(0.7, 0.6, 0.8), "b": judged(0.4, 0.3, 0.45), "c": judged(0.5, 0.4, 0.6), "sft": {}}
    assert judged_verdict(models) == (
        "By the judge: a (0.700 [0.600, 0.800]) wins over sft; b (0.400 [0.300, 0.450]) loses to sft; "
        "c (0.500 [0.400, 0.600]) cannot be told apart from sft."
    )
    fair = {"length_controlled_win_rate": 0.52, "length_controlled_ci95": [0.41, 0.63]}
    assert judged_verdict({"a": judged(0.7, 0.6, 0.8, **fair)}) == (
        "By the judge at equal length: a (0.520 [0.410, 0.630]) cannot be told apart from sft."
    )
    assert judged_verdict({"sft": {}}) == ""


def test_over_seeds_a_pair_is_above_only_where_its_interval_leaves_out_0():
    def row(first: str, second: str, difference: float, over_seeds: list[float] | None) -> dict:
        return {
            "first": first,
            "second": second,
            "difference": difference,
            "ci95": [0, 1],
            "ci95_over_seeds": over_seeds,
        }

    rows = [
        row("a", "b", 0.057, [0.019, 0.095]),
        row("c", "a", -0.2, [-0.3, -0.1]),
        row("c", "b", 0.012, [-0.01, 0.03]),
    ]
    results = {
        "models": {"a": {"seeds": [1, 2, 3]}},
        "temperature": 1.0,
        "comparisons": rows,
        "matched_comparisons": [],
    }
    assert pooled_verdict(results) == (
        "Over 3 seeds, at temperature 1: a is above b, +0.057 [+0.019, +0.095]; c is below a, -0.200 [-0.300, -0.100]; "
        "c and b cannot be told apart (+0.012 [-0.010, +0.030])."
    )
    assert pooled_verdict({**results, "comparisons": [row("a", "b", 0.5, None)]}) == ""
    at_entropy = pooled_verdict({**results, "comparisons": [], "matched_comparisons": rows[:1]})
    assert at_entropy == "At matched entropy: a is above b, +0.057 [+0.019, +0.095]."
