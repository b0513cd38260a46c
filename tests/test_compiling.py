"""model.compile: the eager run's parameters, ordinary names, and a clear refusal where nothing can be compiled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launch
import models
from engine.compiling import check_compiler, compile_blocks
from forward.rows import collate
from tests.support.helpers import composed, write_pairs
from tokens.examples import Tokens

# Two AdamW steps at lr 1e-3 in float32, kernels that add in another order: the largest difference measured was 4.6e-6.
ATOL = 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        ["loss=dpo", "loss.nll_weight=0.3", "model.gradient_accumulation_steps=2"],
        ["loss=sft", "model.use_peft=true", "model.peft.lora_dropout=0", "model.activation_checkpointing=true"],
    ],
    ids=["dpo_accumulated", "lora_checkpointed"],
)
def test_a_compiled_run_is_the_eager_run(tmp_path: Path, extra: list[str]):
    data = write_pairs(tmp_path / "pairs.jsonl", 16)
    common = [
        *extra,
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"cache_dir={tmp_path}",
        "lr=1e-3",
        "n_steps=2",
        "model.batch_size=8",
    ]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    launch.run_task(composed(*common, "exp_name=eager"))
    launch.run_task(composed(*common, "exp_name=compiled", "model.compile=true"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    eager, compiled = (load_file(tmp_path / name / "FINAL" / "model.safetensors") for name in ("eager", "compiled"))
    assert list(eager) == list(compiled)
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, atol=ATOL, rtol=0)


@pytest.mark.slow
def test_batches_of_other_lengths_do_not_compile_anew(compiled):
    torch._dynamo.reset()
    model = models.load_model(compiled, trainable=True)
    compile_blocks(model, compiled)
    graphs = []
    for length in (10, 23, 40, 41, 55, 17):
        rows = [Tokens(list(range(1, n)), [False] * 5 + [True] * (n - 6)) for n in (length, length - 3)]
        models.response_logits(model, collate(rows, 0, models.packing_of(compiled)), 259).logits.sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1] > 0


@pytest.fixture
def compiled() -> models.ModelConfig:
    return replace(launch.settings_of(composed("model=tiny")).model, compile=True)


def test_no_compiler_is_said_before_a_model_loads(monkeypatch, tmp_path, compiled):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"C\+\+ compiler on cpu, and g\+\+ is not found"):
        check_compiler(compiled, torch.device("cpu"))
    monkeypatch.setenv("CXX", "my-cxx")
    with pytest.raises(ValueError, match="my-cxx is not found"):
        check_compiler(compiled, torch.device("cpu"))
    check_compiler(replace(compiled, compile=False), torch.device("cpu"))


def test_a_reference_and_a_policy_keep_their_names_when_they_are_compiled(compiled):
    model = models.load_model(compiled, trainable=True)
    before = list(model.state_dict())
    compile_blocks(model, compiled)
    assert list(model.state_dict()) == before
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
