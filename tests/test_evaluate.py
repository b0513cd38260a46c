"""task=evaluate: who wins, which pairs are ranked right, and one small run from end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from engine import export
from evaluation.asked import held_out, pair_logps
from evaluation.win_rate import against
from rewards.verifiers import resolve_verifier
from settings.schema import Settings
from tasks import evaluate
from tests.support.evaluations import shop_evaluation
from worlds import shop


def settings_for(folder: Path, *overrides: str, **evaluation: Any) -> Settings:
    """Return the settings of an evaluation of the shop's held-out rows."""
    own = {"max_new_tokens": 24, "batch_size": 8, **evaluation}
    return shop_evaluation(folder, "exp_name=e", "model.eval_batch_size=3", *overrides, **own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold ten pairs and two models, a and b, built from two seeds."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = shop.generate(1)["pairs_test.jsonl"][:10]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = settings_for(folder).model
    for seed, name in enumerate(("a", "b")):
        model = models.load_model(replace(config, build_seed=seed), trainable=False)
        export.save_model(model, models.load_tokenizer(config), folder / name)
    return folder


def test_a_missing_verifier_says_which_half_is_missing() -> None:
    assert resolve_verifier("worlds.shop:check") is shop.check
    with pytest.raises(ValueError, match="must be written module:function"):
        resolve_verifier("worlds.shop")
    with pytest.raises(ValueError, match=r"cannot import 'worlds\.shoe'"):
        resolve_verifier("worlds.shoe:check")
    with pytest.raises(ValueError, match=r"has no function 'chek'.*check, "):
        resolve_verifier("worlds.shop:chek")


def test_a_tie_is_half_a_win() -> None:
    metrics = against([1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [3, 3, 3, 3], [3, 3, 3, 3], "other")
    assert (metrics["wins"], metrics["ties"], metrics["losses"]) == (1, 2, 1)
    assert metrics["score_difference"] == 0.0
    low, high = metrics["win_rate_ci95"]
    assert low <= 0.5 <= high


def test_pairs_are_ranked_by_the_log_ratio_and_by_log_prob_only_without_a_reference() -> None:
    logps = np.array([[-3.0, -2.0], [-1.0, -2.0], [-5.0, -5.0]])
    reference = np.array([[-6.0, -1.0], [-1.0, -2.0], [-5.0, -6.0]])
    with_reference = evaluate.rank_pairs(logps, reference, "ref")
    assert with_reference["reward_accuracy"] == pytest.approx(1 / 3)  # +4, a tie, -1
    assert with_reference["reward_margin"] == pytest.approx(1.0)
    alone = evaluate.rank_pairs(logps, None, None)
    assert alone["logprob_accuracy"] == pytest.approx(1 / 3)
    assert "reward_accuracy" not in alone


def test_what_cannot_be_evaluated_is_refused_before_a_model_loads(folder: Path) -> None:
    for change, message in [
        ({"models": {"a": "a"}, "temperatures": []}, "nothing to evaluate"),
        ({"models": {"a": "a"}, "temperatures": [], "verifier": "worlds.shop:check"}, "temperatures is empty"),
        ({"models": {"a": "a"}, "opponent": "a"}, "needs somebody who decides who wins"),
        ({"models": {"a": "a"}, "temperatures": [-1.0]}, "none may be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate.run(settings_for(folder, **change))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "KeyError.'no such order'."),
        ("nothing", "it gives None, and a score is a finite number"),
        ("no_number", "it gives nan, and a score is a finite number"),
        ("too_few", "takes 1 positional argument but 2 were given"),
    ],
)
def test_a_verifier_that_fails_or_gives_no_number_is_named_with_the_response(
    folder: Path, name: str, said: str
) -> None:
    config = settings_for(
        folder,
        f"exp_name={name}",
        models={"a": str(folder / "a")},
        temperatures=[0.0],
        verifier=f"tests.support.rewards:{name}",
        max_new_tokens=2,
    )
    config.run.run_dir.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"verifier tests.support.rewards:{name} failed on the response '.*: .*{said}"):
        evaluate.run(config)


def test_a_run_writes_scores_intervals_samples_and_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"a": str(folder / "a"), "b": str(folder / "b"), "same": str(folder / "a")}
    settings = settings_for(
        folder,
        models=named,
        verifier="worlds.shop:check",
        opponent="a",
        reward_accuracy=True,
        reference={"b": named["a"], "same": named["a"]},
        temperatures=[1.0, 0.5, 0.0],
    )
    evaluate.run(settings)
    run_dir = settings.run.run_dir
    results = json.loads((run_dir / "results.json").read_text())
    rows = results["models"]
    assert set(rows) == set(named)
    for row in rows.values():
        assert row["n"] == 10 and row["seeds"] == [1] and row["temperature"] == 1.0
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
        assert row["greedy"]["n"] == 10 and set(row["other_temperatures"]) == {"0.5"}
        assert 1 <= row["mean_response_tokens"] <= 24 and 0 <= row["eot_rate"] <= 1
    assert "win_rate" not in rows["a"] and rows["same"]["against"]["ties"] == 10 and rows["same"]["win_rate"] == 0.5
    assert "logprob_accuracy" in rows["a"] and "reward_accuracy" not in rows["a"]
    assert rows["same"]["reward_margin"] == 0.0 and rows["b"]["num_pairs"] == 10
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 10
    assert all(set(sample["responses"]) == set(named) and sample["prompt"].startswith("order : ") for sample in samples)
    assert all(sample["responses"]["same"] == sample["responses"]["a"] for sample in samples)
    assert len(json.loads((run_dir / "scores.json").read_text())["1"]["b"]) == 10
    assert (run_dir / "results.md").read_text() in capsys.readouterr().out


@torch.no_grad()
def test_pair_log_probs_are_those_of_a_plain_loop_over_tokens(folder: Path) -> None:
    settings = settings_for(folder, "model.name_or_path=" + str(folder / "b"), "model.build=null")
    tokenizer = models.load_tokenizer(settings.model)
    model = models.load_model(settings.model, trainable=False)
    pairs = held_out(settings, tokenizer).pairs
    found = pair_logps(model, tokenizer, pairs)
    for pair, row in zip(pairs, found, strict=True):
        for tokens, value in zip((pair.chosen, pair.rejected), row, strict=True):
            logps = model(torch.tensor([tokens.ids])).logits[0].double().log_softmax(-1)
            start = len(pair.prompt)
            expected = sum(float(logps[t - 1, tokens.ids[t]]) for t in range(start, len(tokens.ids)))
            assert value == pytest.approx(expected, abs=1e-4)  # float32 against float64 over 21 tokens
