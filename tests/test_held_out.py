"""Held-out rows whose teacher's signals nobody made: they tell what they can, under its own name, and no loss."""

from pathlib import Path

import pytest

import launch
from tests.support.chain import chain_of
from tests.support.helpers import composed, rows_of, write_pairs


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("held_out")
    return {**chain_of(base), "test": str(write_pairs(base / "test.jsonl", 6, start=30))}


def held_out(chain: dict[str, str], *overrides: str) -> dict[str, float]:
    """Train two steps and return the last row of an evaluation."""
    base = Path(chain["base"])
    data = ["datasets=[local]", f"datasets.local.train={chain['data']}", f"datasets.local.test={chain['test']}"]
    launch.run_task(
        composed(
            *data, f"cache_dir={base}", "model=tiny", "model.packing=none", chain["start"], "n_steps=2", *overrides
        )
    )
    name = next(word.removeprefix("exp_name=") for word in overrides if word.startswith("exp_name="))
    rows = [row for row in rows_of(base / name / "metrics.jsonl") if "loss/train" not in row]
    return rows[-1] if rows else {}


@pytest.mark.parametrize("name", ["dckd", "adpa"])
def test_the_nll_of_the_chosen_responses_is_told_and_is_not_called_the_loss(name, chain, capsys):
    base = chain["base"]
    settings = {
        "dckd": [f"loss.teacher_cache={base}/cache/CACHE"],
        "adpa": [f"loss.generations={chain['generations']}", f"loss.advantages={base}/adv/CACHE"],
    }[name]
    row = held_out(chain, f"loss={name}", *settings, "loss.sft_weight=0", f"exp_name={name}")
    assert "it tells nll_eval/chosen, no loss/eval" in capsys.readouterr().out
    assert "loss/eval" not in row
    start = f"model.load_from={base}/{name}/FINAL"
    same = held_out(chain, "loss=sft", start, "lr=1e-12", f"exp_name={name}_judged")
    assert row["nll_eval/chosen"] == pytest.approx(same["loss/eval"], rel=1e-5)


def test_a_loss_of_pairs_evaluates_nothing_instead_of_a_teacher_of_zeros(chain, capsys):
    base = chain["base"]
    common = [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={chain['data']}"]
    asked = ["task=cache", "cache.quantity=token_logp", f"model.load_from={base}/teacher/FINAL", "exp_name=tokens"]
    launch.run_task(composed(*common, *asked))
    row = held_out(chain, "loss=dadpo", f"loss.teacher_cache={base}/tokens/CACHE", "exp_name=dadpo")
    assert "does not hold the test split: nothing is evaluated on it" in capsys.readouterr().out
    assert row == {}
