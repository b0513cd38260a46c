"""Models and tokenizers: load, build, freeze, adapt, save (forward/ asks them).

Letters: B rows, T tokens, N response tokens of a batch (flat, row after row), V vocabulary.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
)
from transformers import GenerationConfig as GenerationDefaults

from assets.hub import hub_reachable as hub_reachable  # beside load_model, for those who import models
from assets.sources import check_no_pickles, local_source
from forward.recomputing import recompute
from forward.responses import ResponseLogits as ResponseLogits  # beside load_model, for those who import models
from forward.responses import last_token_scores as last_token_scores
from forward.responses import response_logits as response_logits
from forward.responses import scoring as scoring
from pipeline.digests import Stamp, stamps_of, weights_hash
from settings.schema import PACKS_FROM, ModelConfig
from settings.typed import nearest
from templates import special_ids, turn_end
from templates import template_digest as template_digest  # beside the other digests, for those who import models
from templates import tokenizer_digest as tokenizer_digest

# Where a tokenizer has no chat template: "role:", a line break, the text, and the end-of-sequence token after what an
# assistant says. The prompt ends with a line break, at which no usual tokenizer merges prompt and response.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


# ---- sources


def model_source(config: ModelConfig) -> str | None:
    """Return where the weights come from: from_checkpoint, load_from or name_or_path; None if they are built."""
    source = config.from_checkpoint or config.load_from or config.name_or_path
    if not source:
        return None
    found_there = local_source(source)
    check_no_pickles(found_there, config)
    return found_there


def start_of(config: ModelConfig) -> ModelConfig:
    """Return the model that training started from, the reference: from_checkpoint moves the policy only."""
    return replace(config, from_checkpoint=None)


def _loaded(load: Callable[..., Any], source: str, what: str, **options: Any) -> Any:
    """Call a from_pretrained, without code from the hub and without questions, and word its failure for a person."""
    is_folder = Path(source).is_dir()
    offline = not is_folder and not hub_reachable()
    if offline:  # local_files_only alone still asks the hub for side files, with all its retries
        constants.HF_HUB_OFFLINE = True
    try:
        return load(source, trust_remote_code=False, local_files_only=is_folder or offline, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if offline:
            reason = "it is no local folder, not in the hub's cache, and the hub cannot be reached"
        place = "folder" if is_folder else "hub name"
        raise ValueError(f"cannot load the {what} from the {place} {source!r}: {reason}") from error


@cache
def _say_no_template(source: str) -> None:
    """Say once what conversations look like to a model whose tokenizer brings no template."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"warning: the tokenizer of {source} has no chat template: conversations are written as 'user: ...', "
            "'assistant: ...'. Is it a base model? Take one with model.tokenizer_name_or_path where it is not meant",
            flush=True,
        )


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the tokenizer, with a default chat template and a padding token where it has none."""
    named = config.tokenizer_name_or_path
    source = local_source(named) if named else model_source(config)
    if source is None:
        raise ValueError("model.build has no tokenizer: set model.tokenizer_name_or_path")
    tokenizer = _loaded(AutoTokenizer.from_pretrained, source, "tokenizer")
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {source!r} is a slow one: give a folder with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source!r} has no end-of-sequence token, so no response would ever end")
    if not tokenizer.chat_template:
        _say_no_template(source)
        tokenizer.chat_template = DEFAULT_TEMPLATE
    if tokenizer.pad_token_id is None:  # padding is masked by position, so sharing eos is harmless
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.template_date = config.template_date  # read by templates.render, saved nowhere
    return tokenizer


# ---- models


def resolve_dtype(name: str, device: torch.device | str, on_gpu: torch.dtype = torch.bfloat16) -> torch.dtype:
    """Return the torch dtype; auto is `on_gpu` on a GPU and float32 on CPU, where bfloat16 is ten times slower."""
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else on_gpu
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


class NumericPath(NamedTuple):
    """In which precision a model is asked: its weights, its computing, its last layer; and by which attention."""

    weights: torch.dtype
    compute: torch.dtype
    head: torch.dtype
    attention: str

    def __str__(self) -> str:
        """Return what a cache's meta.json has."""
        parts = (f"{name}={str(part).removeprefix('torch.')}" for name, part in self._asdict().items())
        return " ".join(parts)


def load_model(
    config: ModelConfig,
    *,
    source: str | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool,
    head: str = "lm",
    empty: bool = False,
) -> PreTrainedModel:
    """Load or build the model (float32 unless dtype says otherwise); frozen and in evaluation mode unless trainable.

    head: `lm`, or `reward` for one score a sequence (a new head gets weights that are a function of build_seed).

    empty: build it on the meta device without reading weights, for engine.sharding.receive to fill from rank 0.

    An explicit `source` is another model's folder and taken as it is; num_layers belongs to the config's own source.
    """
    check_attention(config.attn_implementation)
    folder = local_source(source) if source else model_source(config)
    if source and folder:
        check_no_pickles(folder, config)
    dtype = dtype or torch.float32
    with torch.device("meta") if empty else nullcontext():
        if folder is None:
            model = _built(config, dtype, head)
        else:
            model = (_without_weights if empty else _from_folder)(config, folder, dtype, head)
    if config.num_layers is not None and source is None:
        keep_layers(model, config.num_layers)
    model.requires_grad_(trainable)
    if trainable and config.activation_checkpointing:
        recompute(model, config)
    return model.train(trainable)


def check_attention(name: str | None) -> None:
    """Refuse an attention implementation that cannot run here or is known to compute wrong numbers."""
    key = f"model.attn_implementation={name}"
    if name is None or name in ("sdpa", "eager"):
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f"{key} runs on GPUs only and there is none here (flex_attention on CPU is wrong): use sdpa, eager or null"
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ValueError(f"{key} needs the package flash-attn, which is not installed: install it, or use sdpa")


def _auto_class(head: str) -> Any:
    return AutoModelForSequenceClassification if head == "reward" else AutoModelForCausalLM


def _from_folder(config: ModelConfig, source: str, dtype: torch.dtype, head: str) -> PreTrainedModel:
    options: dict[str, Any] = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    if head == "reward":
        options["num_labels"] = 1
    if not config.pickled_weights:
        options["use_safetensors"] = True
    with seeded(config.build_seed):
        load = _auto_class(head).from_pretrained
        model, report = _loaded(load, source, "model", dtype=dtype, output_loading_info=True, **options)
    # The library would fill what is missing with random weights and go on.
    missing = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
    missing = [name for name in missing if head != "reward" or not name.startswith("score.")]
    if missing:
        raise ValueError(f"the weights in {source!r} are not whole: {len(missing)} tensors missing, e.g. {missing[0]}")
    return model


def _without_weights(config: ModelConfig, source: str, dtype: torch.dtype, head: str) -> PreTrainedModel:
    """Return what _from_folder gives, but for the weights."""
    options: dict[str, Any] = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    architecture = _loaded(
        AutoConfig.from_pretrained, source, "model", **({"num_labels": 1} if head == "reward" else {})
    )
    model = _auto_class(head).from_config(architecture, dtype=dtype, **options)
    if model.can_generate() and (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationDefaults.from_pretrained(source)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU's generator as from `seed`, and leave it as it was; torch.manual_seed would reseed GPUs,
    too.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _built(config: ModelConfig, dtype: torch.dtype, head: str) -> PreTrainedModel:
    """Build a Llama from config.build with weights that are a function of build_seed alone."""
    tokenizer = load_tokenizer(config)
    build = config.build or {}
    known = [key for key in LlamaConfig().to_dict() if not key.startswith("_")]
    for key in build:
        if key not in known:
            raise ValueError(f"unknown key 'model.build.{key}'.{nearest(str(key), known)}")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    try:
        labels = {"num_labels": 1} if head == "reward" else {}
        architecture = LlamaConfig(**{"vocab_size": len(tokenizer), **special, **build, **labels})
        if architecture.vocab_size < len(tokenizer):
            raise ValueError(f"vocab_size {architecture.vocab_size} is below the tokenizer's {len(tokenizer)} tokens")
        with seeded(config.build_seed):
            model = _auto_class(head).from_config(architecture, dtype=torch.float32, **options)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(f"model.build={build} is no Llama: {str(error).strip().splitlines()[-1].strip()}") from error
    for parameter in model.parameters():  # model.to(dtype) would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def packing_of(config: ModelConfig) -> str:
    """Return how batches are laid: model.packing, or what `auto` is for this model.

    Graphs that are compiled are of fixed lengths, and a narrow model computes padding faster than it goes by segments.
    """
    if config.packing != "auto":
        return config.packing
    return "none" if config.compile or width_of(config) < PACKS_FROM else "prompts"


def width_of(config: ModelConfig) -> int:
    """Return the hidden size of the model that load_model(config) gives, without its weights."""
    source = model_source(config)
    if source is None:
        return int((config.build or {}).get("hidden_size", LlamaConfig().hidden_size))
    return int(_loaded(AutoConfig.from_pretrained, source, "model").get_text_config().hidden_size)


def keep_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Keep the first `num_layers` blocks of the decoder, in place; ValueError if it has fewer."""
    have = model.config.num_hidden_layers
    if not 1 <= num_layers <= have:
        raise ValueError(f"model.num_layers={num_layers} must be between 1 and the model's {have}")
    blocks = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == have)
    del blocks[num_layers:]
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:num_layers]


def set_padding(model: Any, tokenizer: Any) -> None:
    """Give a reward model and its tokenizer a padding token that ends no response, so that anybody's last token is
    ours.
    """
    stop = stop_ids(tokenizer, model)
    candidates = [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
        *sorted(special_ids(tokenizer)),
    ]
    free = [i for i in candidates if i is not None and i not in stop]
    if not free:
        raise ValueError(
            "a reward model needs a padding token that ends no response; this tokenizer has no special token left"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
    model.config.pad_token_id = free[0]


# ---- identity


def weight_stamps(folder: str | Path) -> tuple[Stamp, ...]:
    """Return the stamps of the files that model_digest reads; none where a hub name is hashed."""
    path = Path(local_source(str(folder)))
    return stamps_of(sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])) if path.is_dir() else ()


def model_digest(folder: str | Path) -> str:
    """Hash the weights and the architecture of a folder; a hub name is hashed as its name.

    A process reads weights once as long as no file of them changes its size or time: teachers have hundreds of GB.
    """
    path = Path(local_source(str(folder)))
    if not path.is_dir():
        return hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    digest = weights_hash(weight_stamps(path)).copy()
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config.pop("transformers_version", None)  # who wrote it, not what it computes
        digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def config_digest(config: ModelConfig) -> str:
    """Hash the model that load_model(config) gives: a folder's weights, or what it is built from."""
    source = model_source(config)
    if source is not None and config.num_layers is None:
        return model_digest(source)
    base = model_digest(source) if source else json.dumps([config.build, config.build_seed], sort_keys=True)
    return hashlib.sha256(f"{base} {config.num_layers}".encode()).hexdigest()[:16]


def stop_ids(tokenizer: Any, model: Any | None = None) -> list[int]:
    """Return the ids that end a turn: the tokenizer's and the model's eos, and what the template writes after one."""
    found = {turn_end(tokenizer).id, tokenizer.eos_token_id}
    if model is not None and getattr(model, "generation_config", None) is not None:
        own = model.generation_config.eos_token_id
        found |= set(own) if isinstance(own, list) else {own}
    return sorted(i for i in found if i is not None)


def stop_ids_of(config: ModelConfig, tokenizer: Any) -> list[int]:
    """Return stop_ids of the model that load_model(config) would give, without its weights."""
    source = model_source(config)
    if source is None:
        return stop_ids(tokenizer)
    for read in (GenerationDefaults.from_pretrained, _defaults_of_config):
        try:
            return stop_ids(tokenizer, SimpleNamespace(generation_config=read(source)))
        except (OSError, ValueError):  # no such file there, or nothing at all (a server's model)
            continue
    return stop_ids(tokenizer)


def _defaults_of_config(source: str) -> Any:
    return GenerationDefaults.from_model_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
