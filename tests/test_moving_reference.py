"""A reference that follows the policy: how it moves, and what stands still beside it."""

import pytest
import torch
from safetensors.torch import load_file

import launch
from functional import moved
from tests.bigram import examples, trainer_of
from tests.helpers import composed, write_pairs
from trainers.reference import attach, folder_of, score


def test_a_tensor_moves_by_its_rate_in_float32():
    """The average of a step of 1e-4 at a rate of 0.01 is lost in bfloat16, whose next number after 1 is 0.0078 away."""
    old, new = torch.ones(3), torch.ones(3, dtype=torch.bfloat16) + torch.tensor([0.0, 0.0078125, -0.5])
    average = {"w": old}
    for _ in range(100):
        average = moved(average, {"w": new}, 0.01)
    assert average["w"].dtype == torch.float32
    expected = 1 + (new.double() - 1) * (1 - 0.99**100)  # the sum of the geometric series
    torch.testing.assert_close(average["w"].double(), expected.double(), rtol=0, atol=1e-5)
    assert torch.equal(moved(average, {"w": new}, 1.0)["w"], new.float())  # a rate of 1 copies


def test_tensors_are_matched_by_name():
    old = {"a": torch.zeros(2), "b": torch.ones(2)}
    new = {"value_head.weight": torch.full((2,), 9.0), "b": torch.full((2,), 3.0), "a": torch.full((2,), 2.0)}
    found = moved(old, new, 0.5)
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"], torch.ones(2)) and torch.equal(found["b"], torch.full((2,), 2.0))
    assert torch.equal(old["a"], torch.zeros(2))  # nothing is written in place
    with pytest.raises(ValueError, match="has no 'c'"):
        moved({"c": torch.zeros(1)}, new, 0.5)


def test_a_float64_average_stays_float64():
    assert moved({"a": torch.zeros(1, dtype=torch.float64)}, {"a": torch.ones(1)}, 0.1)["a"].dtype == torch.float64


def test_the_old_policy_of_offline_grpo_stands_still_while_the_reference_moves(tmp_path):
    """rho is the ratio to the policy that wrote the responses, the start; the KL term's pi_0 is the moved reference."""
    trainer = trainer_of("grpo", "loss.verifier=null", "sync_reference=1", "loss.online=false")
    items = trainer.items(examples(), "train")
    meta = {"model": "start", "tokenizer": "", "dtype": ""}
    folder = folder_of(tmp_path, items, meta)
    score(trainer, trainer.reference, items, folder, meta)
    items = attach(items, folder, meta)
    before = [item.notes for item in trainer.noted(items)]
    with torch.no_grad():
        trainer.reference.table.add_(torch.randn(11, 11, dtype=torch.float64))
    after = [item.notes for item in trainer.noted(items)]
    assert trainer.keeps_start
    for one, two in zip(before, after, strict=True):  # columns: old, reference, advantage
        assert (one[:, 0] == two[:, 0]).all() and (one[:, 1] != two[:, 1]).any() and (one[:, 2] == two[:, 2]).all()


def test_without_a_kl_term_offline_grpo_does_not_see_its_reference_move(tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    run = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", "loss=grpo"]
    run += ["loss.beta=0", "loss.online=false", "n_steps=4", "model.batch_size=8", "lr=1e-3", "warmup=0"]
    launch.run_task(composed(*run, "exp_name=still"))
    launch.run_task(composed(*run, "exp_name=moving", "sync_reference=1"))
    still, moving = (load_file(tmp_path / name / "FINAL" / "model.safetensors") for name in ("still", "moving"))
    assert all(torch.equal(still[key], moving[key]) for key in still)
