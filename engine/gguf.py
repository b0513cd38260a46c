"""A model folder as GGUF, the format of llama.cpp, by llama.cpp's own converter and quantizer (task=export).

They live in an environment of their own (./install.sh --gguf), which scripts/gguf_tools.py runs in. Here is what that
needs: which folders can be converted, the folder that the converter is shown, and what is compared afterwards.

Letters: T tokens of a prompt, V vocabulary.
"""

import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import models
from settings.export_section import ExportConfig
from settings.paths import ROOT
from settings.schema import ModelConfig
from templates import render

SCRIPT = ROOT / "scripts/gguf_tools.py"
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LINKED = ("config.json", "generation_config.json", "tokenizer.model")  # as they are, beside the weights
TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it's 3.14 metres away, isn't it?",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # in m²\n\n\nprint(area(10))\n",
    "Question: 48 / 2 = 24, 1,000,000 - 7 = 999,993.  What is 12  *  12?\t\tAnswer:   144\r\n",
    "naïve café, façade, Ångström, ß, Привет, мир! 你好,世界。 こんにちは 안녕하세요 مرحبا שלום नमस्ते",
    "🚀 (emoji) 👩‍👩‍👧‍👦 \u200b zero-width, \u00a0 hard space, e\u0301 combining, ﬁ ligature, ½ ¾",
    "   leading and trailing   \n\n\n \n  \n",
    "I'VE, you'll, WE'D, he'S 'tis ''quoted'' \"double\" `code` ~tilde~ <tag attr='1'/> &amp; \\n \\u0041",
    "https://example.org/a_b-c?d=e&f=%20#g  me@example.org  2026-11-28T17:08:41Z  0x1F  1e-5",
)
CONVERSATION = [
    {"role": "user", "content": "What is 7 times 8?"},
    {"role": "assistant", "content": "7 times 8 is 56."},
    {"role": "user", "content": "Write one sentence about the sea."},
]
LONGEST = 128  # tokens of a prompt whose log-probabilities are compared


# ---- what can be exported


def tools_python(config: ExportConfig) -> Path:
    """Return the interpreter that has llama.cpp; ValueError where there is none."""
    named = config.python or os.environ.get("GGUF_PYTHON")
    python = Path(named or ROOT / ".gguf/bin/python").expanduser()
    if not python.is_file():
        where = f"{named} is no file" if named else "llama.cpp is not installed"
        raise ValueError(
            f"task=export: {where}. ./install.sh --gguf makes the environment; export.python or GGUF_PYTHON names "
            "another"
        )
    return python


def source_folder(config: ModelConfig) -> Path:
    """Return the folder of the model to export; ValueError where there is none that could be."""
    if config.num_layers is not None:
        raise ValueError(f"task=export: model.num_layers={config.num_layers} cuts the model in memory: save it first")
    source = models.model_source(config)
    if source is None:
        raise ValueError("task=export: this model is built in memory. Name a folder: ++model.load_from=RUN/FINAL")
    if Path(source).is_dir():
        check_folder(Path(source))
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
        found = snapshot_download(source, allow_patterns=wanted, local_files_only=not models.hub_reachable())
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"task=export: {source!r} is no folder, and not to be had from the hub: {reason}") from error
    check_folder(Path(found))
    return Path(found)


def check_folder(folder: Path) -> None:
    """Refuse an adapter, a model with another head than the language model's, and weights that are no safetensors."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"task=export: {folder} holds a LoRA adapter, not a model: merge it first (FINAL of a run is merged)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"task=export: {folder} has no config.json, so it is no model's folder")
    kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    if not kinds[0].endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"task=export: {folder} is a {kinds[0]}, and only a language model can be exported (a reward model's "
            "score has no place in the file)"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"task=export: {folder} has no safetensors; weights of another form may hold code")


def splitting_of(tokenizer_json: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for how a tokenizer splits text before BPE; None where only the converter may know.

    Raises ValueError for a tokenizer that has no place in the format.
    """
    model, before = tokenizer_json["model"], tokenizer_json.get("pre_tokenizer") or {}
    if model["type"] not in ("BPE", "Unigram", "WordPiece"):
        raise ValueError(f"task=export: the tokenizer is a {model['type']}, which GGUF has no place for")
    if model["type"] == "BPE" and not model["merges"]:
        raise ValueError(
            "task=export: the tokenizer is a BPE without merges (assets/byte_tokenizer: one token a byte), which "
            "llama.cpp refuses to load: model=tiny cannot be exported"
        )
    if model["type"] != "BPE" or tokenizer_json.get("normalizer") or model.get("ignore_merges"):
        return None
    parts = before.get("pretokenizers", [before])
    words = [part.get("type") for part in parts]
    if not words or words[-1] != "ByteLevel" or not parts[-1].get("use_regex", True) or parts[-1]["add_prefix_space"]:
        return None
    if len(words) == 1:
        return "gpt-2"
    return "smollm" if words == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") else None


def saved_dtype(folder: Path, config: ExportConfig) -> str:
    """Return the converter's word for export.dtype; auto is that of the saved weights."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return DTYPES.get(str(own.get("dtype") or own.get("torch_dtype")), "f32")


def stage(source: Path, tokenizer: Any, into: Path) -> None:
    """Lay out what the converter reads: the model's own files by link, and the tokenizer as it is used here."""
    into.mkdir(parents=True)
    tokenizer.save_pretrained(into)
    for file in [
        *source.glob("*.safetensors"),
        *source.glob("*.safetensors.index.json"),
        *map(source.joinpath, LINKED),
    ]:
        if file.is_file() and not (into / file.name).exists():
            (into / file.name).symlink_to(file.resolve())


# ---- the tools


class Tools(NamedTuple):
    """llama.cpp as scripts/gguf_tools.py reaches it; all that it says is appended to `log`."""

    python: Path
    log: Path

    def run(self, *arguments: str | Path) -> None:
        """Run one command; ValueError with its last line where it fails."""
        command = [str(self.python), str(SCRIPT), *map(str, arguments)]
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env={**variables, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        with self.log.open("a", encoding="utf-8") as out:
            out.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
            raise ValueError(
                f"task=export: llama.cpp's {arguments[0]} failed: {said[-1][:400]} (all of it: {self.log})"
            )

    def ask(self, file: Path, texts: Sequence[str], prompts: Sequence[list[int]], scratch: Path) -> "Answers":
        """Return what llama.cpp makes of texts and prompts."""
        questions, answers = scratch / "questions.json", scratch / "answers"
        questions.write_text(json.dumps({"texts": list(texts), "prompts": list(prompts)}), encoding="utf-8")
        self.run("ask", file, questions, answers)
        said = json.loads(answers.with_suffix(".json").read_text(encoding="utf-8"))
        with np.load(answers.with_suffix(".npz")) as arrays:
            logits = [torch.from_numpy(arrays[str(i)]) for i in range(len(prompts))]
        return Answers(said["tokens"], logits, said["facts"])


class Answers(NamedTuple):
    """What llama.cpp says of a file: ids of texts, logits [T, V] float32 of prompts, and facts of its header."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    facts: dict[str, Any]


# ---- what is compared


def sample_texts(tokenizer: Any, count: int = 200, seed: int = 0) -> list[str]:
    """Return texts on which two tokenizers show whether they are one: TEXTS, a conversation, tokens thrown together."""
    drawn = random.Random(seed)
    vocabulary = range(len(tokenizer))
    thrown = [tokenizer.decode(drawn.sample(vocabulary, 12), clean_up_tokenization_spaces=False) for _ in range(count)]
    spaced = ["  ".join(text.split()) for text in TEXTS]
    return [*TEXTS, *spaced, render(tokenizer, CONVERSATION, True), *thrown]


def first_difference(own: Sequence[int], other: Sequence[int]) -> int:
    """Return the first place where two lists of ids part."""
    parted = (i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1])
    return next(parted, min(len(own), len(other)))


def check_tokens(tokenizer: Any, texts: Sequence[str], theirs: Sequence[list[int]]) -> None:
    """Refuse a file whose tokenizer makes other ids of a text than ours, with the first place where they part."""
    for text, other in zip(texts, theirs, strict=True):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        if own != other:
            at = first_difference(own, other)
            shown = [tokenizer.convert_ids_to_tokens(ids[max(0, at - 2) : at + 4]) for ids in (own, other)]
            raise ValueError(
                "task=export: the file's tokenizer is not the model's: it would read other tokens than it learned.\n"
                f"  text   {text[:200]!r}\n  ours   {shown[0]} (from token {max(0, at - 2)})\n  theirs {shown[1]}\n"
                "  llama.cpp knows no splitting of text that does what this tokenizer does"
            )


def check_facts(tokenizer: Any, facts: dict[str, Any]) -> None:
    """Refuse a file that lost the chat template or has another end of text."""
    if facts["chat_template"] != tokenizer.chat_template:
        raise ValueError("task=export: the file's chat template is not the tokenizer's")
    if facts["eos"] != tokenizer.eos_token_id:
        raise ValueError(
            f"task=export: the file ends a text by token {facts['eos']}, the model by {tokenizer.eos_token_id}"
        )


class Agreement(NamedTuple):
    """How far a file's distributions are from the model's, over the tokens of some prompts."""

    tokens: int
    mean_kl: float  # KL(model ‖ file), nats per token
    max_kl: float
    max_gap: float  # |difference| of the log-probability of the token that follows in the prompt, nats
    same_top: float  # share of tokens with the same most probable next one


def agreement(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], prompts: Sequence[list[int]]) -> Agreement:
    """Compare logits [T, V] prompt by prompt; ValueError where the vocabularies have other sizes."""
    divergences, gaps, same = [], [], []
    for own, other, ids in zip(ours, theirs, prompts, strict=True):
        if own.shape != other.shape:
            raise ValueError(
                f"task=export: the file gives logits of shape {tuple(other.shape)}, the model {tuple(own.shape)}"
            )
        p, q = own.double().log_softmax(-1), other.double().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
        following = torch.tensor(ids[1:])[:, None]
        gaps.append((p[:-1].gather(-1, following) - q[:-1].gather(-1, following)).abs().flatten())
        same.append(p.argmax(-1) == q.argmax(-1))
    every = torch.cat(divergences)
    return Agreement(
        len(every),
        float(every.mean()),
        float(every.max()),
        float(torch.cat(gaps).max()),
        float(torch.cat(same).double().mean()),
    )


@torch.inference_mode()
def logits_of(model: Any, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return the model's logits [T, V] float32 after every token of each prompt."""
    device = next(model.parameters()).device
    return [model(torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu() for ids in prompts]


def sample_prompts(tokenizer: Any) -> list[list[int]]:
    """Return the prompts that are compared: half of TEXTS and a conversation, as ids."""
    texts = [*TEXTS[:4], render(tokenizer, CONVERSATION, True)]
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST] for text in texts]
