"""Evaluation that sharpening cannot fool: pass@k, diversity, matched entropy, judges' strengths."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from engine import export
from evaluation.asked import Asked
from evaluation.bradley_terry import ELO, cells, elo_rows, judged_elo_rows
from evaluation.matched import HIGHEST, LOWEST, TOLERANCE, matched_temperature, split_off
from evaluation.several import differing, pass_at, powers, several_metrics
from functional import entropies
from generation.hf import sample_watched
from generation.interface import forbidden_ids
from report.gather import read_evaluation
from settings.schema import Settings
from tasks import evaluate
from tasks.summarize import summarized
from tasks.summarize import table as pooled_table
from tests.support.evaluations import shop_evaluation
from worlds import shop


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one() -> None:
    assert pass_at(5, 2, 2) == pytest.approx(0.7)  # 1 - C(3, 2) / C(5, 2) = 1 - 3 / 10
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                expected = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
                assert pass_at(n, right, k) == pytest.approx(expected, abs=1e-12), (n, right, k)
    assert pass_at(1000, 1, 500) == pytest.approx(0.5)
    assert pass_at(1000, 3, 1) == pytest.approx(0.003)
    with pytest.raises(ValueError, match="n=4, right=1, k=5"):
        pass_at(4, 1, 5)
    assert powers(1) == [] and powers(8) == [2, 4, 8] and powers(11) == [2, 4, 8]


def test_pass_at_k_has_no_bias() -> None:
    p, n, k = 0.3, 6, 3
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at(n, c, k) for c, w in enumerate(chances)) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_two_replies_differ_by_chance_and_by_their_grams() -> None:
    chance, distance = differing(["a b c", "a b  c", "a b d"])
    assert chance == pytest.approx(2 / 3)  # one pair of three is equal: white space does not count
    assert distance == pytest.approx(2 / 3 * (1 - 1 / 3))  # {ab, bc} and {ab, bd}: one of three is shared
    assert differing(["yes", "no"]) == (1.0, 1.0) and differing(["yes"] * 4) == (0.0, 0.0)
    assert differing(["", "a"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="two are needed"):
        differing(["yes"])


def test_the_diversity_is_of_right_responses_alone() -> None:
    texts = [["a", "x"], ["b", "y"], ["c", "x"], ["d", "x"]]  # four samples of two prompts
    scores = [[1.0, 1.0], [0.0, 0.0], [0.5, 0.0], [1.0, 1.0]]
    found = several_metrics(texts, scores)
    assert found["n"] == 4 and set(found["pass_at"]) == {"2", "4"} and found["pass_at"]["4"] == 1.0
    assert found["pass_at"]["2"] == pytest.approx(1 - 1 / 6)
    assert found["diverse_prompts"] == 2 and found["distinct_right"] == 0.5  # a and d differ, x and x do not
    nothing = several_metrics([["a"], ["b"]], [[0.0], [1.0]])
    assert nothing["diverse_prompts"] == 0 and nothing["distinct_right"] is None


@pytest.mark.parametrize(("scale", "target"), [(0.3, 1.0), (1.0, 0.7), (4.0, 0.05), (1.0, 0.0005)])
def test_the_temperature_that_is_found_gives_the_entropy(scale: float, target: float) -> None:
    logits = scale * torch.tensor([3.0, 1.0, 0.0, -2.0, -2.5], dtype=torch.float64)
    entropy_at = lambda t: float(entropies((logits / t)[None]))  # noqa: E731
    found = matched_temperature(entropy_at, target)
    assert found.temperature is not None and LOWEST <= found.temperature <= HIGHEST
    assert abs(entropy_at(found.temperature) - target) <= max(TOLERANCE * target, 0.002)
    assert found.entropy == entropy_at(found.temperature) and len(found.trials) < 15


def test_no_temperature_is_named_where_none_gives_the_entropy() -> None:
    found = matched_temperature(lambda t: 0.01 * t, 2.0)
    assert found.temperature is None and found.entropy == pytest.approx(0.01 * HIGHEST) and found.target == 2.0
    assert matched_temperature(lambda t: 1.0 + t, 0.5).temperature is None
    jump = matched_temperature(lambda t: 0.2 if t < 1.4 else 0.9, 0.5)  # nothing between: the closest is said
    assert jump.temperature is not None and jump.entropy == 0.2 and len(jump.trials) < 20


def test_prompts_that_choose_temperatures_are_scored_nowhere() -> None:
    scored, validation = split_off(10, 4, seed=1)
    assert sorted(scored + validation) == list(range(10)) and len(validation) == 4
    assert (scored, validation) == split_off(10, 4, seed=1) != split_off(10, 4, seed=2)
    assert [len(part) for part in split_off(11, 128, seed=1)] == [6, 5]  # at most half of them
    with pytest.raises(ValueError, match="match_entropy with 1 held-out prompt"):
        split_off(1, 1, seed=1)


def test_strengths_by_a_judge_are_log_odds_against_the_opponent() -> None:
    rows = judged_elo_rows({"a": [1.0] * 30 + [0.0] * 10, "b": [0.5] * 38 + [None] * 2}, "base")
    assert set(rows) == {"base", "a", "b"} and sum(row["elo"] for row in rows.values()) == pytest.approx(0, abs=1e-6)
    # Half a win over every other one is given to each, so a and b are compared a little, too.
    assert rows["a"]["elo"] - rows["base"]["elo"] == pytest.approx(math.log(30.5 / 10.5) * ELO, rel=0.05)
    assert abs(rows["b"]["elo"] - rows["base"]["elo"]) < 5
    assert rows["a"]["ci95"][0] > rows["base"]["ci95"][1] - 60
    assert judged_elo_rows({}, "base") == {}


def test_the_verifier_s_and_the_judge_s_strengths_stand_side_by_side() -> None:
    judged = {"by": "judge", "models": judged_elo_rows({"a": [0.0] * 4}, "b")}
    found = cells({"bradley_terry": elo_rows({"a": [1.0] * 4, "b": [0.0] * 4}), "bradley_terry_judged": judged})
    assert found[0] == ["model", "Elo by the verifier, mean 0 [95 %]", "Elo by the judge, mean 0 [95 %]"]
    assert [row[0] for row in found[1:]] == ["a", "b"] and found[1][1][0] == "+" and found[1][2][0] == "-"
    alone = cells({"bradley_terry": {}, "bradley_terry_judged": judged})
    assert alone[0][1:] == ["Elo by the judge, mean 0 [95 %]"] and [row[0] for row in alone[1:]] == ["b", "a"]
    assert cells({"bradley_terry": {}}) == []


# ---- with models


def settings_for(folder: Path, name: str, **evaluation: Any) -> Settings:
    """Return the settings of an evaluation of the shop's held-out prompts."""
    return shop_evaluation(folder, f"exp_name={name}", **{"max_new_tokens": 8, "batch_size": 16, **evaluation})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold forty held-out rows, a model, the same one three times as sharp, and one that is always sure."""
    folder = tmp_path_factory.mktemp("several")
    rows = shop.generate(1)["pairs_test.jsonl"][:40]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = settings_for(folder, "x").model
    tokenizer = models.load_tokenizer(config)
    for name, factor in {"plain": 8.0, "sharp": 24.0, "sure": 1e6}.items():
        model: Any = models.load_model(replace(config, build_seed=1), trainable=False)
        with torch.no_grad():
            model.model.norm.weight.mul_(factor)  # the last norm: all logits are multiplied
        export.save_model(model, tokenizer, folder / name)
    return folder


def test_the_entropy_is_that_of_the_distribution_each_token_was_drawn_from(folder: Path) -> None:
    settings = settings_for(folder, "x", models={"plain": str(folder / "plain")})
    asked = Asked(settings, "plain", torch.device("cpu"))
    model, tokenizer = asked.model(), asked.tokenizer
    stop = models.stop_ids(tokenizer, model)
    prompts = [row.prompt for row in asked.data.prompts[:3]]
    generation = replace(settings.generation, temperature=0.5, top_p=1.0, top_k=0, max_new_tokens=6)
    for prompt, (ids, _, nats) in zip(
        prompts, sample_watched(model, tokenizer, prompts, generation, stop, len(tokenizer), 1), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        allowed = logits[:, ~forbidden_ids(tokenizer, stop, len(tokenizer), logits.shape[-1])]
        assert nats == pytest.approx(float(entropies(allowed / 0.5).sum()), rel=1e-4)
    greedy = replace(generation, temperature=0.0)
    assert sample_watched(model, tokenizer, prompts, greedy, stop, len(tokenizer), 1)[0][2] == 0.0


@pytest.mark.slow
def test_a_sharper_model_is_matched_and_scores_as_the_plain_one(folder: Path) -> None:
    named = {name: str(folder / name) for name in ("plain", "sharp", "sure")}
    settings = settings_for(
        folder,
        "e",
        models=named,
        verifier="tests.test_several:short",
        temperatures=[1.0, 0.0],
        n_samples=4,
        match_entropy="plain",
        match_prompts=16,
        majority=2,
    )
    evaluate.run(settings)
    run_dir = settings.run.run_dir
    results = json.loads((run_dir / "results.json").read_text())
    rows = results["models"]
    assert rows["plain"]["matched"]["temperature"] == 1.0
    assert rows["plain"]["matched"]["score"] == rows["plain"]["score"]
    # The same logits: temperature 3 is what makes the sharp one the plain one, and the draws have the same seeds.
    assert rows["sharp"]["matched"]["temperature"] == pytest.approx(3.0, rel=0.05)
    assert rows["sharp"]["token_entropy"] < 0.7 * rows["plain"]["token_entropy"]
    wanted = rows["plain"]["token_entropy"]
    assert rows["sharp"]["matched"]["token_entropy"] == pytest.approx(wanted, rel=0.1)  # of other prompts
    assert rows["sure"]["match"]["temperature"] is None and "matched" not in rows["sure"]
    assert all(row["n"] == 24 and set(row["samples"]["pass_at"]) == {"2", "4"} for row in rows.values())
    assert [{row["first"], row["second"]} for row in results["matched_comparisons"]] == [{"plain", "sharp"}]
    scores = json.loads((run_dir / "scores.json").read_text())
    assert set(scores) == {"1", "0", "majority", "matched"} and set(scores["matched"]) == {"plain", "sharp"}
    assert np.mean(scores["1"]["plain"]) == pytest.approx(rows["plain"]["score"])
    summary, page = (run_dir / "summary.md").read_text(), (run_dir / "report.html").read_text()
    for text in (summary, page):
        assert "entropy of plain" in text and "none reaches it" in text and "pass@4" in text
    assert 'id="temperatures"' in page and 'id="strengths"' in page and 'id="samples"' in page
    check_pooled(run_dir)


def check_pooled(run_dir: Path) -> None:
    """Check that a summary over seeds shows the pass at matched entropy, and a dash for the model without one."""
    (run_dir / "DONE").touch()
    first = read_evaluation(run_dir)
    pooled = summarized([first, first._replace(seed=2)], [["plain", "sharp"], ["sure", "plain"]])
    assert pooled["models"]["sharp"]["matched"]["n"] == 48 and "matched" not in pooled["models"]["sure"]
    assert len(pooled["matched_comparisons"]) == 1 and len(pooled["comparisons"]) == 2
    assert pooled["models"]["plain"]["samples"]["pass_at"]["4"] is not None
    lines = pooled_table(pooled).splitlines()
    assert lines[0].count("matched") == 1 and next(line for line in lines if "| sure |" in line).count(" - |") == 3


def short(prompt: str, response: str) -> float:
    """Call a response right where its characters are even in number: a coin that models cannot learn."""
    return float(len(response) % 2 == 0)


def vote(response: str) -> str:
    """Return what a response votes for: itself."""
    return response
