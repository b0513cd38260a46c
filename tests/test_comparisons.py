"""All pairs of models: Holm by hand, the sign-flip test against enumeration, and who may be called best."""

from itertools import product

import numpy as np
import pytest

from evaluation.comparisons import best_model, compare_all, table
from evaluation.intervals import holm, paired_p_values


def test_holm_agrees_with_values_computed_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04 -> the last may not be below the third.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])  # 2 x 0.5, then no less
    assert holm([0.04]) == [0.04] and holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.5, 1.5])


def test_p_values_are_those_of_all_sign_flips() -> None:
    differences = np.array([[1.0, 1.0, 0.0, 1.0, 1.0, -1.0, 1.0], [0.3, -0.2, 0.1, 0.4, -0.1, 0.0, 0.2]])
    signs = np.array(list(product((-1, 1), repeat=7)))
    exact = (np.abs(signs @ differences.T) >= np.abs(differences.sum(1)) - 1e-9).mean(0)
    assert exact[0] == 14 / 64  # six non-zero differences, one of them the other way: 2 x (6 + 1) of 2^6
    assert paired_p_values(differences, resamples=40_000) == pytest.approx(exact.tolist(), abs=0.01)
    assert paired_p_values(np.zeros((1, 5))) == [1.0]
    with pytest.raises(ValueError, match="at least one"):
        paired_p_values(np.zeros((0, 5)))


def test_p_values_of_models_that_are_alike_are_uniform() -> None:
    rng = np.random.default_rng(0)
    p = paired_p_values(rng.standard_normal((2_000, 60)), resamples=999)
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.015)  # three standard errors


def test_holm_keeps_false_claims_of_a_table_below_its_level() -> None:
    rng = np.random.default_rng(1)
    raw = corrected = 0
    for _ in range(200):  # tables of 8 models that are all alike
        scores = (rng.random((8, 100)) < 0.5).astype(float)
        p = paired_p_values(np.stack([scores[a] - scores[b] for a in range(8) for b in range(a)]), resamples=999)
        raw, corrected = raw + (min(p) < 0.05), corrected + (min(holm(p)) < 0.05)
    assert raw > 0.3 * 200 and corrected <= 0.09 * 200  # 5 % and two and a half standard errors


def test_nothing_inside_the_noise_is_separate_or_best() -> None:
    rng = np.random.default_rng(1)
    alike = {name: (rng.random(200) < 0.5).astype(float).tolist() for name in "abcdef"}
    rows = compare_all(alike)
    assert len(rows) == 15 and not any(row["separate"] for row in rows)
    assert best_model(dict.fromkeys(alike, {}), rows) is None
    assert all(row["difference"] >= 0 and row["p_holm"] >= row["p"] for row in rows)


def test_a_model_is_best_only_where_it_is_separate_from_every_other() -> None:
    low, middle, high = [0.0] * 60, [0.0] * 30 + [1.0] * 30, [1.0] * 58 + [0.0] * 2
    names: dict[str, dict] = {"low": {}, "middle": {}, "high": {}}
    rows = compare_all({"low": low, "middle": middle, "high": high})
    assert best_model(names, rows) == "high"
    assert [(r["first"], r["second"]) for r in rows] == [("middle", "low"), ("high", "low"), ("high", "middle")]
    near = compare_all({"low": low, "middle": middle, "high": middle[:-2] + [0.0] * 2})
    assert best_model(names, near) is None and [row["separate"] for row in near] == [True, True, False]
    assert "| middle - high | +0.033 [" in table(near) and table(near).count("| no |") == 1


def test_models_without_scores_are_left_out_and_other_prompts_are_refused() -> None:
    assert compare_all({"a": [], "b": []}) == [] and compare_all({"a": [1.0]}) == []
    with pytest.raises(ValueError, match="a: 2, b: 1"):
        compare_all({"a": [1.0, 0.0], "b": [1.0]})
