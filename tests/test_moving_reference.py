"""A reference that follows the policy: how it moves, and what stands still beside it."""

import pytest
import torch
from safetensors.torch import load_file

import launch
import models
from engine.placement import Replicated
from engine.processes import Processes
from tests.support.bigram import examples, trainer_of
from tests.support.helpers import composed, write_pairs
from trainers.value_head import add_value_head


def test_a_slow_average_reaches_the_policy_where_a_head_lies_beside_it(tmp_path):
    """100 moves of 1 % are 63 % of the way; the value head has no counterpart in the reference."""
    settings = launch.settings_of(composed("model=tiny", "lr=5e-7"))
    placement = Replicated(Processes(), settings.model)
    dtype = placement.reference_dtype(moving=True)
    reference = models.load_model(settings.model, dtype=dtype, trainable=False)
    policy = models.load_model(settings.model, dtype=placement.master_dtype(), trainable=True)
    add_value_head(policy)
    start = {name: value.clone() for name, value in reference.named_parameters()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-4)  # bfloat16 has no number so near
    placement.place_policy(policy, settings.run)
    for _ in range(100):
        placement.move_reference(reference, 0.01)
    for name, value in reference.named_parameters():
        way = (value.double() - start[name].double()) / 1e-4
        assert float((way - (1 - 0.99**100)).abs().max()) < 0.05, name  # weights near 1 are rounded to 6e-8


def test_a_policy_stored_in_bfloat16_has_no_average(tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    run = ["model=tiny", f"cache_dir={tmp_path}", "datasets=[local]", f"datasets.local.train={data}"]
    slow = ["loss=dpo", "sync_reference=1", "sync_reference_rate=0.01", "model.master_dtype=bfloat16"]
    with pytest.raises(ValueError, match="sync_reference_rate=0.01 with model.master_dtype=bfloat16.*does not move"):
        launch.run_task(composed(*run, *slow))


def test_the_old_policy_of_offline_grpo_stands_still_while_the_reference_moves():
    """rho is the ratio to the policy that wrote the responses, the start; the KL term's pi_0 is the moved reference."""
    trainer = trainer_of("grpo", "loss.verifier=null", "sync_reference=1", "loss.online=false")
    items = list(trainer.items(examples(), "train"))
    for i, item in enumerate(items):  # as scored once, before the first step
        scores = trainer.token_logps_of(trainer.reference, trainer.batch_of([item]).sequences)
        items[i] = item._replace(reference_logps=(scores.detach().float().numpy(),))
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
