"""Models and tokenizers: load, build, freeze, adapt, save; and the one function that shifts tokens.

Letters: B rows, T tokens, N response tokens of a batch (flat, row after row), V vocabulary.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dataloader import Sequences, turn_end
from schema import ModelConfig

ROOT = Path(__file__).resolve().parent

# Where a tokenizer has no chat template: a role line, the text, and the end-of-sequence token after an assistant's.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


class ResponseLogits(NamedTuple):
    """Logits [N, V] that predict the response tokens targets [N]; rows [N] says whose token each is."""

    logits: Tensor
    targets: Tensor
    rows: Tensor


def response_logits(model: torch.nn.Module, sequences: Sequences, vocab_size: int) -> ResponseLogits:
    """Run the model and keep the logits that predict response tokens, cut to the tokenizer's vocabulary.

    THE one place of the next-token shift: position t-1 predicts token t. Logits before the first needed position are
    never computed. Padding is on the right, so positions need no correction.
    """
    ids, attention, response = sequences
    needed = response[:, 1:]
    columns = needed.any(dim=0).nonzero()
    first = int(columns[0]) if len(columns) else needed.shape[1] - 1
    last = int(columns[-1]) + 1 if len(columns) else needed.shape[1]
    keep = torch.arange(first, last, device=ids.device)
    logits = model(input_ids=ids, attention_mask=attention.long(), use_cache=False, logits_to_keep=keep).logits
    mask = needed[:, first:last]
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand(mask.shape)[mask]
    return ResponseLogits(logits[mask][:, :vocab_size], ids[:, 1:][:, first:last][mask], rows)


# ---- sources


def local_source(source: str) -> str:
    """Resolve a model or tokenizer source: `package:NAME`, a folder (also below the repository), or a hub name."""
    if source.startswith("package:"):
        from smollm2 import converted  # imports gguf only when asked for

        return str(converted(source.removeprefix("package:")))
    for path in (Path(source).expanduser(), ROOT / source):
        if path.is_dir():
            return str(path)
    if source.startswith(("/", ".", "~")) or source.count("/") != 1 or source.endswith("FINAL"):
        path = Path(source).expanduser()
        near = [p.name for p in sorted(path.parent.iterdir())[:5]] if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise ValueError(f"no model folder {source!r}{hint}")
    return source


def model_source(config: ModelConfig) -> str | None:
    """Return where the weights come from: from_checkpoint, load_from or name_or_path; None if they are built."""
    source = config.from_checkpoint or config.load_from or config.name_or_path
    return local_source(source) if source else None


def _from_hub_or_folder(load: Any, source: str, what: str) -> Any:
    """Call a from_pretrained and word its failure for a person."""
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        where = "folder" if Path(source).is_dir() else "hub name (is there a network?)"
        raise ValueError(f"cannot load the {what} from {source!r}, a {where}: {str(error).splitlines()[0]}") from error


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the tokenizer, with a default chat template and a padding token where it has none."""
    named = config.tokenizer_name_or_path
    source = local_source(named) if named else model_source(config)
    if source is None:
        raise ValueError("model.build has no tokenizer: set model.tokenizer_name_or_path")
    tokenizer = _from_hub_or_folder(lambda: AutoTokenizer.from_pretrained(source), source, "tokenizer")
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    if tokenizer.pad_token_id is None:  # padding is masked by position, so sharing eos is harmless
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Return the torch dtype; auto is bfloat16 on a GPU and float32 on CPU, where bfloat16 is ten times slower."""
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_model(config: ModelConfig, *, source: str | None = None, dtype: torch.dtype | None = None, trainable: bool) -> PreTrainedModel:
    """Load or build the model; frozen and in evaluation mode unless trainable."""
    source = local_source(source) if source else model_source(config)
    dtype = dtype or torch.float32
    model = _build(config).to(dtype) if source is None else _load(config, source, dtype)
    if config.num_layers and config.num_layers < len(model.model.layers):
        del model.model.layers[config.num_layers :]
        model.config.num_hidden_layers = config.num_layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: config.num_layers]
    model.requires_grad_(trainable)
    if trainable and config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(trainable)


def _load(config: ModelConfig, source: str, dtype: torch.dtype) -> PreTrainedModel:
    attention = config.attn_implementation
    if attention == "flash_attention_2" and not torch.cuda.is_available():
        raise ValueError("model.attn_implementation=flash_attention_2 runs on GPUs only, none is here; use sdpa or leave it out")
    extra = {"attn_implementation": attention} if attention else {}
    return _from_hub_or_folder(lambda: AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra), source, "model")


def _build(config: ModelConfig) -> PreTrainedModel:
    """Build a Llama from config.build with weights that are a function of build_seed alone."""
    tokenizer = load_tokenizer(config)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        architecture = LlamaConfig(vocab_size=len(tokenizer), **special, **(config.build or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.build={config.build} is no Llama: {error}") from error
    if config.attn_implementation:
        architecture._attn_implementation = config.attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.build_seed)
        return LlamaForCausalLM(architecture)


# ---- LoRA


def add_lora(model: PreTrainedModel, config: ModelConfig) -> Any:
    """Put LoRA adapters on the model; the base stays frozen."""
    from peft import LoraConfig, get_peft_model

    peft = config.peft
    targets = peft.get("target_modules") or "all-linear"
    return get_peft_model(
        model,
        LoraConfig(
            r=peft["lora_r"], lora_alpha=peft["lora_alpha"], lora_dropout=peft["lora_dropout"],
            target_modules=targets, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip


def merged(model: Any) -> PreTrainedModel:
    """Return an ordinary model with the adapters merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


# ---- saving and identity


def save_model(model: Any, tokenizer: Any, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write an ordinary Hugging Face folder: into folder.tmp first, renamed when whole."""
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    if hasattr(model, "merge_and_unload"):
        import copy

        # Merging changes the weights in place; a copy lets training go on after an intermediate save.
        merged(copy.deepcopy(model)).save_pretrained(part)
    else:
        model.save_pretrained(part, state_dict=state_dict)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def model_digest(folder: str | Path) -> str:
    """Hash the weights and the architecture of a folder; a hub name is hashed as its name."""
    path = Path(local_source(str(folder)))
    digest = hashlib.sha256()
    if not path.is_dir():
        return hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin"), path / "config.json"]):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash what maps text to ids: vocabulary, merges, added tokens, and the chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation", None)  # state of the last call, not of the tokenizer
    backend.pop("padding", None)
    text = json.dumps(backend, sort_keys=True) + template_digest(tokenizer)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template_digest(tokenizer: Any) -> str:
    """Hash the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def stop_ids(tokenizer: Any, model: Any | None = None) -> list[int]:
    """Return the ids that end a turn: the tokenizer's and the model's eos, and what the template writes after one."""
    found = {turn_end(tokenizer).id, tokenizer.eos_token_id}
    if model is not None and getattr(model, "generation_config", None) is not None:
        own = model.generation_config.eos_token_id
        found |= set(own) if isinstance(own, list) else {own}
    return sorted(i for i in found if i is not None)
