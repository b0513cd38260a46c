"""The one list of metrics: whatever stands in it is in every table, pooled over seeds, and never outside its range."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.intervals import seed_interval, student_quantile
from evaluation.metrics import METRICS, TRAINING, at, interval_over_seeds, metric_of, present, put, values_in
from evaluation.results import table as results_table
from evaluation.text_statistics import text_metrics
from report.gather import Evaluation
from report.tables import SECTIONS, metric_sections
from settings.schema import EvaluationConfig, typed
from tasks import report, summarize
from tasks.evaluate import rank_pairs
from tests.support.helpers import composed

# ---- intervals over seeds


def by_bisection(scores: list[float]) -> tuple[float, float]:
    """Find both ends as the p whose logit lies t standard errors from the mean's, the error carried by the slope."""
    mean, n = sum(scores) / len(scores), len(scores)
    error = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)
    logit, step = (lambda p: math.log(p) - math.log1p(-p)), 1e-7
    slope = (logit(mean + step * mean) - logit(mean - step * mean)) / (2 * step * mean)

    def end(sign: int) -> float:
        target, low, high = logit(mean) + sign * student_quantile(n - 1) * error * slope, 0.0, 1.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if logit(middle) < target else (low, middle)
        return low

    return end(-1), end(1)


@pytest.mark.parametrize(
    "scores", [[0.026, 0.007, 0.001], [0.818, 0.99, 0.607], [0.0, 0.0, 0.3], [1.0, 0.99], [0.488, 0.559, 0.436]]
)
def test_the_interval_of_a_share_is_that_of_its_logit_and_stays_between_0_and_1(scores: list[float]) -> None:
    low, high = seed_interval(scores, (0.0, 1.0)) or (math.nan, math.nan)
    assert (low, high) == pytest.approx(by_bisection(scores), abs=1e-6)
    assert 0 <= low <= sum(scores) / len(scores) <= high <= 1


def test_plain_student_t_leaves_the_range_where_the_share_s_interval_does_not() -> None:
    plain, share = seed_interval([0.026, 0.007, 0.001]), interval_over_seeds("share", [0.026, 0.007, 0.001])
    assert plain is not None and plain[0] < 0 and share is not None and share[0] > 0
    assert interval_over_seeds("nats", [0.026, 0.007, 0.001]) == plain


def test_far_from_its_bounds_it_is_student_s_t_and_differences_have_bounds_of_their_own() -> None:
    scores = [0.4990, 0.5010, 0.5003]
    assert seed_interval(scores, (0.0, 1.0)) == pytest.approx(seed_interval(scores), abs=1e-5)
    low, high = seed_interval([0.9, 0.99, 0.5], (-1.0, 1.0)) or (0.0, 0.0)
    assert -1 < low < 0.79 < high < 1
    assert (seed_interval([0.9, 0.99, 0.5]) or (0, 0))[1] > 1


def test_it_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        scores = rng.beta(3.0, 27.0, size=3)  # a mean of 0.1 that varies from seed to seed
        low, high = seed_interval(scores.tolist(), (0.0, 1.0)) or (0.0, 0.0)
        held += low <= 0.1 <= high
    assert 0.92 * tries <= held  # 0.95 and three standard errors below; a wide interval may hold it more often


def test_equal_scores_at_an_end_and_numbers_that_are_no_shares_have_an_interval_too() -> None:
    assert seed_interval([1.0, 1.0, 1.0], (0.0, 1.0)) == (1.0, 1.0)
    assert interval_over_seeds("share", [0.5]) is None
    assert interval_over_seeds("share", [0.4, 1.7]) == seed_interval([0.4, 1.7])  # a verifier's points
    assert interval_over_seeds("share", [0.4, 0.7], [3.0, -2.2]) == seed_interval([0.4, 0.7])
    with pytest.raises(ValueError, match="each must be in"):
        seed_interval([0.4, 1.7], (0.0, 1.0))


# ---- the list


def entry_of(shift: float = 0.0) -> dict[str, Any]:
    """Return a model's entry that has every metric, each with a value of its own."""
    entry: dict[str, Any] = {"folder": "x", "temperature": 1.0}
    for number, metric in enumerate(METRICS):
        value = 0.10 + 0.02 * number + shift
        put(entry, metric.key, value)
        if metric.interval:
            put(entry, metric.interval, [value - 0.01, value + 0.01])
    return entry | {"greedy": {"score": 0.9, "ci95": [0.8, 0.95]}}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_a_metric_of_the_list_is_in_every_table(metric: Any, tmp_path: Path) -> None:
    models = {"a": entry_of(), "b": entry_of(0.01)}
    value = f"{at(models['a'], metric.key):.3f}" if metric.unit not in ("tokens", "words", "count") else None
    page = metric_sections(models)
    if metric.group in SECTIONS:
        assert metric.label in page and (value is None or value in page)
    if metric.headline:
        results = {"models": models, "opponent": "o"}
        assert metric.label in results_table(results) and (value is None or value in results_table(results))
        assert dict(values_in(models["a"]))[metric.key] == at(models["a"], metric.key)
        if metric.pool == "seeds":
            written = summarize.metrics_table({"a": summarize.pooled_metrics([entry_of(), entry_of(0.01)])})
            assert f"| {metric.label} " in written
        (tmp_path / "results.json").write_text(json.dumps({"models": {"a": models["a"]}}))
        assert metric.key in report.values_of(tmp_path)


def test_the_list_names_what_evaluations_hold() -> None:
    said = text_metrics(["no", "yes yes"], [1, 2], ["no"])
    ranked = rank_pairs(np.array([[-1.0, -2.0]]), None, None) | rank_pairs(np.ones((1, 2)), np.zeros((1, 2)), "x")
    for found, groups in ((said, ["text"]), (ranked, ["pairs"])):
        listed = [metric for group in groups for metric in present([found], group)]
        intervals = {metric.interval for metric in listed if metric.interval}
        assert set(found) - {"reference"} == {metric.key for metric in listed} | intervals
    assert metric_of("greedy.score").key == "score" and metric_of("judged.win_rate").key == "judged.win_rate"
    assert metric_of("loss/eval") in TRAINING


# ---- over seeds


def evaluation(seed: int, entry: dict[str, Any], scores: list[float]) -> Evaluation:
    models = {"a": entry, "b": entry_of(0.05)}
    named = {"a": scores, "b": [0.0, 1.0, 0.0, 0.0]}
    return Evaluation(Path(f"seed_{seed}"), seed, {"models": models, "seed": seed}, {"1": named, "0": named})


def test_every_metric_that_all_seeds_have_is_pooled_with_an_interval_over_seeds() -> None:
    entries = [entry_of(shift) for shift in (0.0, 0.01, 0.03)]
    del entries[1]["empty_rate"]  # one seed lacks it
    every = [evaluation(seed, entry, [1.0, 0.0, 0.0, seed == 2]) for seed, entry in enumerate(entries, 1)]
    found = summarize.summarized(every, [["a", "b"]])["models"]["a"]
    assert found["score"] == pytest.approx((0.25 + 0.5 + 0.25) / 3) and found["n"] == 12
    assert found["ci95_over_seeds"] == list(interval_over_seeds("share", [0.25, 0.5, 0.25]) or ())
    for metric in METRICS[1:]:
        values = [at(entry, metric.key) for entry in entries]
        if metric.key == "empty_rate":
            assert at(found, metric.key) is None and metric.key not in found["over_seeds"]
            continue
        assert at(found, metric.key) == pytest.approx(sum(values) / 3)
        assert found["over_seeds"][metric.key] == pytest.approx(interval_over_seeds(metric.unit, values))
        assert not metric.interval or at(found, metric.interval) is None  # one over prompts would need their scores
    one = summarize.summarized(every[:1], [])["models"]["a"]
    assert one["refusal_rate_ci95"] == entries[0]["refusal_rate_ci95"] and one["over_seeds"] == {}


def test_the_summary_writes_scores_differences_and_the_other_metrics() -> None:
    every = [evaluation(seed, entry_of(0.01 * seed), [1.0, 0.0, 0.0, seed == 2]) for seed in (1, 2)]
    results = summarize.summarized(every, [["a", "b"], ["a", "gone"]])
    written = summarize.table(results)
    assert "| a | 0.250 | 0.500 | 0.375 |" in written and "- a - b: +0.125" in written and "gone" not in written
    assert "Other metrics, mean [95 % over seeds]:" in written and "| refused |" in written
    assert [row["second"] for row in results["greedy_comparisons"]] == ["b"] and not results["majority_comparisons"]
    assert "Differences on the same prompts, greedy" in written and "over_seeds" in results["models"]["a"]["greedy"]


def test_the_summary_shows_every_temperature_and_the_differences_there() -> None:
    every = []
    for seed in (1, 2):
        one = evaluation(seed, entry_of(0.01 * seed), [1.0, 0.0, 0.0, 0.0])
        low = {"a": [1.0, 1.0, 1.0, seed == 2], "b": [0.0, 0.0, 1.0, 0.0]}
        models = {
            name: {**entry, "other_temperatures": {"0.3": entry_of(0.02)}}
            for name, entry in one.results["models"].items()
        }
        scores = {"1": one.scores["1"], "0.3": low, "0": one.scores["0"]}
        every.append(one._replace(results={**one.results, "models": models}, scores=scores))
    results = summarize.summarized(every, [["a", "b"]])
    found = results["models"]["a"]["other_temperatures"]["0.3"]
    assert found["score"] == 0.875 and found["mean_response_tokens"] == entry_of(0.02)["mean_response_tokens"]
    written = summarize.table(results)
    verdict, head = written.split("\n")[0], written.split("\n")[2].split(" | ")
    assert verdict == results["verdict"] and verdict.startswith(
        "Over 2 seeds, at temperature 1: a and b cannot be told"
    )
    assert head.index("temperature 1") < head.index("temperature 0.3") < head.index("greedy")
    part = written.split("Differences on the same prompts, temperature 0.3:")[1].split("Differences")[0]
    assert "- a - b: +0.625" in part


def test_a_comparison_of_two_unknown_models_is_refused_and_so_is_half_a_pair() -> None:
    with pytest.raises(
        ValueError, match=r"\['adpa_plsu', 'sft'\], and neither is an evaluated model. Did you mean 'ad"
    ):
        summarize.pairs_of([["adpa_plsu", "sft"]], ["adpa_plus", "dckd"])
    section = composed()["evaluation"]
    for pair in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="two different models"):
            typed({**section, "comparisons": [pair]}, EvaluationConfig, "evaluation.")
