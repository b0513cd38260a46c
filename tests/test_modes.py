"""What is learned from is run in training mode, what is only scored in evaluation mode; each finds the mode it left."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaModel

import launch
from models import scoring
from tests.support.helpers import composed, rows_of, write_pairs

SCORED = ["loss.verifier=tests.support.rewards:share_of_e", "loss.max_new_tokens=4"]
METHODS = {
    "dpo": [],  # the reference is the policy without its adapter
    "kto": [],  # z_0
    "aot": [],  # ranks
    "bco": [],  # the running mean
    "tdpo": [],  # the reference's whole distributions
    "ppo": SCORED,
    "grpo": [*SCORED, "loss.n=2"],
    "opd": ["loss.max_new_tokens=4"],
    "gkd": ["loss.max_new_tokens=4", "loss.on_policy=1"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    write_pairs(folder / "pairs.jsonl", 6)
    launch.run_task(composed(*common(folder), "exp_name=start", "n_steps=1"))
    return folder


def common(folder: Path) -> list[str]:
    data = [f"datasets.local.{split}={folder}/pairs.jsonl" for split in ("train", "test")]
    return [f"cache_dir={folder}", "model=tiny", "datasets=[local]", *data, "model.batch_size=4"]


def modes_of(overrides: list[str]) -> set[tuple[bool, bool]]:
    """Run a task and return (gradients are kept, training mode) of every pass of a decoder."""
    seen = set()

    def look(module: torch.nn.Module, inputs: object) -> None:
        if isinstance(module, LlamaModel):
            seen.add((torch.is_grad_enabled(), module.training))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        launch.run_task(composed(*overrides))
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_gradients_and_training_mode_go_together(name, base):
    """With LoRA's dropout and activation checkpointing, over two steps with an evaluation after each."""
    run = [*common(base), f"loss={name}", f"exp_name={name}", f"model.load_from={base}/start/FINAL", *METHODS[name]]
    if name in ("opd", "gkd"):
        run.append(f"loss.teacher={base}/start/FINAL")
    lora = ["model.use_peft=true", "model.peft.lora_dropout=0.5", "model.activation_checkpointing=true"]
    assert modes_of([*run, *lora, "n_steps=2", "eval_every=1"]) == {(True, True), (False, False)}


def test_a_checkpoint_moves_the_policy_and_not_the_reference(base):
    """from_checkpoint=: the reference is still the model where training started, load_from= here."""
    run = [*common(base), "loss=dpo", f"model.load_from={base}/start/FINAL", "n_steps=1", "do_first_eval=true"]
    launch.run_task(composed(*run, "exp_name=moved", "lr=1e-2", "warmup=0"))
    on = [*run, f"model.from_checkpoint={base}/moved/FINAL"]
    ways = {"live": [], "cached": ["cache_reference_logprobs=true"], "lora": ["model.use_peft=true"]}
    margins = {}
    for name, way in ways.items():
        launch.run_task(composed(*on, *way, f"exp_name=on_{name}"))
        margins[name] = rows_of(base / f"on_{name}" / "metrics.jsonl")[0]["rewards_eval/margins"]
    last = rows_of(base / "moved" / "metrics.jsonl")[-1]["rewards_eval/margins"]
    assert abs(last) > 1e-3 and margins == pytest.approx(dict.fromkeys(ways, last), rel=1e-4)


def test_a_checkpoint_alone_does_not_say_what_the_reference_is(base):
    run = [*common(base), "loss=dpo", "model.build=null", f"model.from_checkpoint={base}/start/FINAL", "exp_name=alone"]
    with pytest.raises(ValueError, match="Set model.load_from=FOLDER or .* where training started"):
        launch.run_task(composed(*run, "n_steps=1"))


def test_scoring_gives_back_the_modes_it_found():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.5)))
    model[1].eval()  # a frozen part
    with scoring(model), scoring(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]
    with pytest.raises(KeyError), scoring(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]
