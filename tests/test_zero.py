"""strategy=deepspeed: DeepSpeed's engine gives the numbers of plain torch on one process, and its settings count."""

import json
import time
from pathlib import Path

import pytest
import torch

import launch
from engine import zero_settings
from engine.zero import ZeRO, stored_dtype
from engine.zero_settings import zero_section
from scripts.slurm_rank import accelerate_variables
from teacher.precision import teacher_dtype
from tests.support.helpers import ROOT, composed, rows_of, write_pairs
from tests.support.ranks import Ranks
from tests.test_placement import DEEPSPEED_FILE, needs_deepspeed
from tests.test_sharding import close

CASES = [
    "sft",
    "dpo",
    "dckd",
    "adpa",
    "gkd",
    "kto",
    "ppo",
    "lora",
    "checkpointing",
    "stage 1",
    "stage 2",
    "offload",
    "bfloat16",
]


def section(**variables: str) -> dict:
    return zero_section({f"ACCELERATE_DEEPSPEED_{key}": value for key, value in variables.items()})


@pytest.mark.parametrize("name", ["deepspeed_zero3_2gpu", "deepspeed_zero3_4gpu"])
def test_the_shipped_files_ask_for_stage_3_without_offloading(name):
    variables = accelerate_variables(ROOT / "accelerate_config" / f"{name}.yaml", nodes=1, world=2)
    assert variables["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert zero_section(variables) == {"stage": 3}


def test_a_files_stage_and_offloads_are_honored():
    assert section() == {"stage": 3}
    assert section(ZERO_STAGE="2", OFFLOAD_OPTIMIZER_DEVICE="cpu")["offload_optimizer"]["device"] == "cpu"
    assert section(OFFLOAD_PARAM_DEVICE="cpu", OFFLOAD_OPTIMIZER_DEVICE="none").keys() == {"stage", "offload_param"}
    assert section(ZERO3_INIT="true", ZERO3_SAVE_16BIT_MODEL="false") == {"stage": 3}  # always done


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ZERO_STAGE": "0"}, "zero_stage=0"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device=nvme"),
        ({"ZERO_STAGE": "2", "OFFLOAD_PARAM_DEVICE": "cpu"}, "needs zero_stage 3"),
        ({"MOE_LAYER_CLS_NAMES": "MixtralSparseMoeBlock"}, "moe_layer_cls_names"),
        ({"CONFIG_FILE": "/nowhere/ds.json"}, "/nowhere/ds.json is not there"),
    ],
)
def test_a_setting_that_is_not_honored_is_refused(variables, words):
    with pytest.raises(ValueError) as caught:
        section(**variables)
    assert words in str(caught.value)


def test_a_deepspeed_json_gives_its_zero_section_and_nothing_else(tmp_path):
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "stage3_max_live_parameters": 1e8, "reduce_bucket_size": "auto"}
    left = {"bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
    file.write_text(json.dumps({"zero_optimization": zero, **left}))
    assert section(CONFIG_FILE=str(file)) == {"stage": 3, "stage3_max_live_parameters": 1e8}
    file.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": 0.5}))
    with pytest.raises(ValueError, match="gradient_clipping"):
        section(CONFIG_FILE=str(file))


def test_without_deepspeed_the_strategy_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(zero_settings, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install.sh --deepspeed"):
        zero_settings.check_installed()


@needs_deepspeed
@pytest.mark.distributed
def test_two_processes_under_deepspeed_train_the_model_of_one(tmp_path):
    """Losses, clipped norms, rates, LoRA, checkpoints, rollouts, the moving reference: tests/support/two_zero.py."""
    printed = Ranks(folder=tmp_path, program="tests/support/two_zero.py").output(timeout=600)
    for name in CASES:
        assert f"equal {name} (" in printed, printed


def two(overrides: list[str], folder: Path) -> Ranks:
    """Start launch.py on two processes as accelerate's DeepSpeed file would."""
    return Ranks(*overrides, folder=folder, env=DEEPSPEED_FILE)


@needs_deepspeed
@pytest.mark.distributed
def test_a_killed_run_goes_on_from_deepspeeds_checkpoint(tmp_path):
    """DPO with a moving reference; the whole run is one of a single process."""
    data = write_pairs(tmp_path / "pairs.jsonl", 22)
    overrides = ["loss=dpo", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}"]
    overrides += ["lr=3e-4", "log_every=1", "n_steps=24", "save_every=4", "sync_reference=3", "sync_reference_rate=0.5"]
    run, folder, deadline = two([*overrides, "exp_name=two"], tmp_path), tmp_path / "two", time.time() + 300
    while not list(folder.glob("checkpoint-*/DONE")) and time.time() < deadline and run.poll() is None:
        time.sleep(0.02)
    run.kill()
    assert list(folder.glob("checkpoint-*/policy/*_optim_states.pt")) and not (folder / "FINAL").exists()
    with pytest.raises(ValueError, match="written by DeepSpeed"):
        launch.run_task(composed(*overrides, "exp_name=two"))  # on one process
    again = two([*overrides, "exp_name=two"], tmp_path)
    launch.run_task(composed(*overrides, "exp_name=one"))
    out = again.output(timeout=400)
    assert "resumed from" in out and "strategy=deepspeed, 2 process(es)" in out
    close(folder, tmp_path / "one")
    assert [row["step"] for row in rows_of(folder / "metrics.jsonl")] == list(range(1, 25))


def test_a_live_teacher_on_a_gpu_is_in_a_precision_that_deepspeed_takes():
    config = launch.settings_of(composed("model=tiny")).model
    assert teacher_dtype(config, "cuda") == torch.float16
    model = torch.nn.Linear(2, 2)
    assert stored_dtype(model.to(teacher_dtype(config, "cuda", ZeRO.narrow)), "reference_dtype") == torch.bfloat16
    with pytest.raises(ValueError, match="this one has float16: set model.reference_dtype=float32 or bfloat16"):
        stored_dtype(model.to(torch.float16), "reference_dtype")
