"""The command line: what a user mistypes or gets wrong ends in one clear error, exit code 2, and no traceback."""

import json
import os
from pathlib import Path

import pytest

import launch as launcher
from schema import ModelConfig, RunConfig, typed
from tests.helpers import composed, launch, rows_of, write_pairs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", 12)


def base(tmp_path: Path, data: Path, *more: str) -> list[str]:
    return ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}/runs", *more]


def refused(raw: dict) -> str:
    with pytest.raises(ValueError) as caught:
        launcher.run_task(raw)
    return str(caught.value)


def test_a_typo_is_one_line_with_the_nearest_key_and_no_traceback(tmp_path, data):
    run = launch(*base(tmp_path, data, "++lrr=1e-3"))
    assert run.returncode == 2 and "Did you mean 'lr'?" in run.stderr and "Traceback" not in run.stderr
    run = launch(*base(tmp_path, data, "model.bathc_size=3"))
    assert run.returncode == 2 and "batch_size" in run.stderr and "Traceback" not in run.stderr


def test_a_strategy_that_is_not_running_is_refused(tmp_path, data):
    message = refused(composed(*base(tmp_path, data, "strategy=fsdp", "exp_name=s")))
    assert "fsdp" in message and "none" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("++model.max_prompt_length=4096", "max_prompt_length"),
        ("++model.batch_size=0", "model.batch_size=0"),
        ("++loss.betta=1", "beta"),
        ("++lr=fast", "lr"),
        ("++loss.beta=-1", "loss.beta=-1"),
        ("++datasets.local.formt=hh", "format"),
        ("++train_datasets=[ultrabin]", "datasets=[NAME]"),
        ("++model.peft.lora_rank=3", "lora_r"),
        ("++model.attn_implementation=flash_attention_2", "GPU"),
        ("++model.load_from=/nowhere/FINAL", "/nowhere/FINAL"),
        ("++wandb.enable=true", "enabled"),
        ("++model.gradient_accumulation_steps=3", "divisible"),
    ],
)
def test_impossible_values_name_the_key(tmp_path, data, override, words):
    assert words in refused(composed(*base(tmp_path, data, "loss=dpo", override)))


def test_losses_with_inputs_say_what_is_missing(tmp_path, data):
    assert "loss.teacher_cache" in refused(composed(*base(tmp_path, data, "loss=dckd")))


def test_pairs_losses_refuse_rows_without_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert "chosen" in refused(composed(*base(tmp_path, tmp_path / "a.jsonl", "loss=dpo")))


def test_an_unwritable_folder_is_one_error(tmp_path, data):
    (tmp_path / "file").write_text("")
    run = launch(*base(tmp_path, data, f"cache_dir={tmp_path}/file/x"))
    assert run.returncode == 2 and "Traceback" not in run.stderr and "file" in run.stderr


def test_every_key_of_config_yaml_is_read_by_a_dataclass():
    raw = composed("model=tiny")
    settings = launcher.settings_of(raw)
    assert settings.run == typed({k: v for k, v in raw.items() if k in RunConfig.__dataclass_fields__}, RunConfig)
    assert isinstance(settings.model, ModelConfig)


def test_a_run_leaves_model_config_command_versions_and_metrics_and_a_second_one_does_nothing(tmp_path, data):
    overrides = base(
        tmp_path,
        data,
        "loss=dpo",
        "exp_name=x",
        "run_count=run1",
        "n_steps=2",
        "log_every=1",
        "++cache_reference_logprobs=true",
    )
    launcher.run_task(composed(*overrides))
    folder = tmp_path / "runs" / "x" / "run1"
    for name in (
        "FINAL/config.json",
        "FINAL/model.safetensors",
        "FINAL/tokenizer.json",
        "config.yaml",
        "command.txt",
        "versions.json",
        "DONE",
    ):
        assert (folder / name).is_file(), name
    row = rows_of(folder / "metrics.jsonl")[0]
    for key in ("step", "examples", "loss/train", "rewards_train/accuracies", "grad_norm", "lr", "tokens_per_second"):
        assert key in row, key
    assert row["loss/train"] == pytest.approx(0.693147, abs=1e-5)  # policy == reference at step 0
    before = os.stat(folder / "FINAL" / "model.safetensors").st_mtime_ns
    launcher.run_task(composed(*overrides))
    assert os.stat(folder / "FINAL" / "model.safetensors").st_mtime_ns == before
    assert "lr was" in refused(composed(*overrides, "lr=1e-2"))


def test_cached_reference_equals_live_reference_and_lora_starts_at_ln_2(tmp_path, data):
    common = base(tmp_path, data, "loss=dpo", "n_steps=3", "log_every=1", "lr=1e-3")
    launcher.run_task(composed(*common, "exp_name=live"))
    launcher.run_task(composed(*common, "exp_name=cached", "++cache_reference_logprobs=true"))
    launcher.run_task(
        composed(*common, "exp_name=loaded", f"++load_reference_logprobs={tmp_path}/runs/cached/REFERENCE")
    )
    launcher.run_task(composed(*common, "exp_name=lora", "++model.use_peft=true", "++model.peft.lora_r=4"))
    rows = {n: rows_of(tmp_path / "runs" / n / "metrics.jsonl") for n in ("live", "cached", "loaded", "lora")}
    for a, b, c in zip(rows["live"], rows["cached"], rows["loaded"], strict=True):
        # one batch scores 12 rows, the other 8: sums of float32 in another padding, measured 1e-7
        assert a["loss/train"] == pytest.approx(b["loss/train"], abs=2e-6)
        assert b["loss/train"] == c["loss/train"]
    assert rows["lora"][0]["loss/train"] == pytest.approx(0.693147, abs=1e-5)
    config = json.loads((tmp_path / "runs/lora/FINAL/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]  # merged: no adapter is left
