"""strategy=fsdp on two CPU processes (gloo): the run of one process, clipping and odd sizes included, and its
checkpoints.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launch
import models
from engine import checkpoint, export
from engine.compiling import blocks_of
from tests.support.helpers import composed, rows_of, write_pairs
from tests.support.ranks import Ranks

# AdamW has a state to resume, and divides gradients near zero by their own size: 24 steps at lr 1e-3.
ATOL = 2e-5
# Plain SGD, so that a parameter moves by its gradient times the rate: AdamW divides a gradient near zero, which is all
# rounding, by its own size. Weights are below 2, where float32's half step is 6e-8: in 3 steps two runs part by at most
# 6 of them, 3.6e-7. Sums over 8 ragged rows in another order differ by 1e-6 of their size, and a clipped step is at
# most 0.1 long: 1e-7. Measured: 1.2e-7, where parameters move by 1e-2.
SGD = ["optimizer=SGD", "lr=0.1", "scheduler=constant", "warmup=0"]
SGD_ATOL = 5e-7


def two(overrides: list[str], folder: Path, program: str = "launch.py") -> Ranks:
    """Start two shards."""
    return Ranks(*overrides, "strategy=fsdp", folder=folder, program=program)


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    data = write_pairs(tmp_path / "pairs.jsonl", 22)
    # 265 tokens do not divide by 2: the embedding is sharded unevenly. The clip is far below the gradient's norm.
    odd = (
        "++model.build={hidden_size: 48, intermediate_size: 80, num_hidden_layers: 2, num_attention_heads: 4, "
        "num_key_value_heads: 2, vocab_size: 265}"
    )
    return [
        "loss=dpo",
        "model=tiny",
        odd,
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"cache_dir={tmp_path}",
        "lr=1e-3",
        "log_every=1",
        "model.batch_size=8",
        "model.max_grad_norm=0.05",
        "loss.nll_weight=0.3",
    ]


def close(one: Path, other: Path, atol: float = ATOL) -> None:
    first, second = (load_file(folder / "FINAL" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], atol=atol, rtol=0)
    assert json.loads((one / "FINAL/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.distributed
def test_two_shards_train_the_model_of_one_process(tmp_path, overrides):
    run = [*overrides, "n_steps=3", *SGD]
    sharded = two([*run, "exp_name=two", "model.gradient_accumulation_steps=2"], tmp_path)
    launch.run_task(composed(*run, "exp_name=one"))
    assert "strategy=fsdp, 2 process(es)" in sharded.output()
    close(tmp_path / "two", tmp_path / "one", SGD_ATOL)
    rows = [rows_of(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for one, other in zip(*rows, strict=True):
        for key in ("loss/train", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-5)
        assert one["grad_norm"] > 0.05  # clipped, on the norm over both shards


@pytest.mark.distributed
def test_a_sharded_checkpoint_resumes_on_one_process_and_on_two(tmp_path, overrides):
    schedule = ["n_steps=24", "save_every=4"]
    launch.run_task(composed(*overrides, *schedule, "exp_name=whole"))
    for name in ("to_one", "to_two"):
        run, folder = two([*overrides, *schedule, f"exp_name={name}"], tmp_path), tmp_path / name
        deadline = time.time() + 120
        while not list(folder.glob("checkpoint-*/DONE")) and time.time() < deadline and run.poll() is None:
            time.sleep(0.02)
        run.kill()
        checkpoint = next(folder.glob("checkpoint-*/DONE")).parent
        assert len(list((checkpoint / "shards").glob("*.distcp"))) == 2  # each rank wrote its part
        assert not (folder / "FINAL").exists()
    launch.run_task(composed(*overrides, *schedule, "exp_name=to_one"))
    assert "resumed from" in two([*overrides, *schedule, "exp_name=to_two"], tmp_path).output()
    for name in ("to_one", "to_two"):
        close(tmp_path / name, tmp_path / "whole")
        assert [row["step"] for row in rows_of(tmp_path / name / "metrics.jsonl")] == list(range(1, 25))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("extra", "models_read"),
    [(["loss=dpo", "loss.nll_weight=0.3"], 2), (["loss=dpo", "model.use_peft=true", "model.peft.lora_dropout=0"], 1)],
    ids=["dpo", "lora"],
)
def test_only_rank_0_reads_the_weights(tmp_path, overrides, extra, models_read):
    start = tmp_path / "start"
    settings = launch.settings_of(composed(*overrides)).model
    export.save_model(models.load_model(settings, trainable=True), models.load_tokenizer(settings), start)
    read = [o for o in overrides if not o.startswith("loss")] + [f"model.load_from={start}", "n_steps=3", *extra, *SGD]
    sharded = two([*read, "exp_name=two"], tmp_path, "tests/support/count_reads.py")
    launch.run_task(composed(*read, "exp_name=one"))
    out = sharded.output()
    assert f"rank 0 read {models_read} models" in out and "rank 1 read 0 models" in out
    close(tmp_path / "two", tmp_path / "one", SGD_ATOL)


def test_the_blocks_are_found_from_the_model_and_a_wrong_class_is_refused():
    model = models.load_model(launch.settings_of(composed("model=tiny")).model, trainable=True)
    assert blocks_of(model) == list(model.model.layers)
    assert blocks_of(model, "LlamaMLP") == [layer.mlp for layer in model.model.layers]
    with pytest.raises(ValueError, match="model.block_class to one of .*LlamaDecoderLayer"):
        blocks_of(model, "GPT2Block")


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_whole_checkpoint_is_read_back_whatever_the_optimizer_keeps(tmp_path, optimizer_class):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 2)
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        checkpoint.write_whole(tmp_path, {"model": model}, optimizer, True)
        other = torch.nn.Linear(3, 2)
        again = optimizer_class(other.parameters(), lr=0.1)
        checkpoint.read_tensors(tmp_path, {"model": other}, again)
        for one in (model, other):  # the same step from the same place
            one.zero_grad()
            one(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        again.step()
        assert torch.equal(model.weight, other.weight)
    finally:
        torch.distributed.destroy_process_group()
