"""What lands on disk besides weights: a merged adapter keeps what the base model says about generating."""

from pathlib import Path

import torch
from transformers import GenerationConfig

import launch
import models
from engine.export import add_lora, save_model
from tests.support.helpers import composed


def test_a_merged_adapter_keeps_the_generation_config(tmp_path: Path):
    config = launch.settings_of(composed("model=tiny", "model.use_peft=true", "model.peft.lora_r=2")).model
    model, tokenizer = models.load_model(config, trainable=True), models.load_tokenizer(config)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 65], do_sample=True, top_p=0.8)
    adapted = add_lora(model, config)
    for state in (None, adapted.state_dict()):  # held whole, and gathered from shards
        save_model(adapted, tokenizer, tmp_path / "FINAL", state)
        kept = GenerationConfig.from_pretrained(tmp_path / "FINAL")
        assert (kept.eos_token_id, kept.do_sample, kept.top_p) == ([tokenizer.eos_token_id, 65], True, 0.8)
    assert 65 in models.stop_ids_of(
        launch.settings_of(composed("model=tiny", f"model.load_from={tmp_path}/FINAL")).model, tokenizer
    )


def test_a_reward_models_merged_adapter_has_nothing_to_generate_with(tmp_path: Path):
    config = launch.settings_of(composed("model=tiny", "model.use_peft=true", "model.peft.lora_r=2")).model
    model = models.load_model(config, trainable=True, head="reward")
    adapted = add_lora(model, config)
    with torch.no_grad():
        model.score.weight.fill_(0.5)
    save_model(adapted, models.load_tokenizer(config), tmp_path / "FINAL")
    assert not (tmp_path / "FINAL" / "generation_config.json").exists()
