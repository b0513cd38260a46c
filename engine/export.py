"""LoRA adapters, put on and merged, and ordinary Hugging Face folders as what is written."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from models import seeded
from settings.artifacts import whole_folder
from settings.schema import ModelConfig


def add_lora(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Put LoRA adapters on the model, the same on every rank; the base stays frozen."""
    from peft import LoraConfig, get_peft_model

    peft = config.peft
    lora = LoraConfig(
        r=peft["lora_r"],
        lora_alpha=peft["lora_alpha"],
        lora_dropout=peft["lora_dropout"],
        target_modules=peft.get("target_modules") or "all-linear",
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
    )
    try:
        with seeded(config.build_seed):
            return get_peft_model(model, lora)
    except ValueError as error:
        raise ValueError(f"model.peft={peft} does not fit this model: {error}") from error


def merged(model: Any, state_dict: dict[str, Tensor] | None = None) -> PreTrainedModel:
    """Return an ordinary model on CPU with the adapters merged; the model that trains on is left alone.

    `state_dict` holds the whole weights where the model itself holds shards.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    from accelerate import init_empty_weights
    from peft import get_peft_model

    with init_empty_weights():
        base = type(model.get_base_model())(model.get_base_model().config)
        twin = get_peft_model(base, model.peft_config["default"])
    # Cloned, because a state dict aliases the weights, and merging writes in place.
    whole = {name: value.detach().cpu().clone() for name, value in (state_dict or model.state_dict()).items()}
    twin.load_state_dict(whole, assign=True)
    twin.get_base_model().tie_weights()
    whole_model = twin.merge_and_unload()
    if whole_model.can_generate():  # its own ends of turn and defaults: the architecture alone does not hold them
        whole_model.generation_config = model.get_base_model().generation_config
    return whole_model


def save_model(model: Any, tokenizer: Any, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write an ordinary Hugging Face folder (LoRA merged): whole or not at all."""
    if state_dict is not None:  # gathered weights have lost their ties: one tensor under two names again
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shared = first.setdefault(id(parameter), name)
            if shared in state_dict and name in state_dict:
                state_dict[name] = state_dict[shared]
    try:
        with whole_folder(folder) as part:
            if hasattr(model, "merge_and_unload"):
                merged(model, state_dict).save_pretrained(part)
            else:
                model.save_pretrained(part, state_dict=state_dict)
            tokenizer.save_pretrained(part)
            mode = (part / "config.json").stat().st_mode
            for file in part.iterdir():
                file.chmod(mode)  # safetensors leaves its files readable by their owner only, whatever the umask says
    except SafetensorError as error:  # a full disk, for one
        raise ValueError(f"could not write the model to {folder}: {error}") from error
