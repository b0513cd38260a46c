"""task=export: a model as a file of another program (docs/export.md).

Writes EXPORT/ into the run's folder, whole or not at all:

model-TYPE.gguf    weights, tokenizer and chat template in one file, for llama.cpp and what is built on it
tokenizer.json...  tokenizer, template and configuration as here: what task=evaluate reads of a served model
export.json        source and its digest, sizes, SHA-256, what was compared, versions, command
"""

import hashlib
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import models
from engine.gguf import (
    Agreement,
    Tools,
    agreement,
    check_facts,
    check_tokens,
    logits_of,
    sample_prompts,
    sample_texts,
    saved_dtype,
    source_folder,
    splitting_of,
    stage,
    tools_python,
)
from engine.processes import Apart
from settings.artifacts import read_json, whole_folder, write_json
from settings.schema import Settings
from templates import tokenizer_digest

VERSION = 1  # of what is written; counts in the digest of a stage
FILES = ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


def run(settings: Settings) -> None:
    """Convert, compare, quantize, compare, and write EXPORT."""
    config, process = settings.export, Apart()
    if process.world_size > 1:
        raise ValueError("task=export runs in one process: start it with `python launch.py`, without accelerate launch")
    python, source = tools_python(config), source_folder(settings.model)
    tokenizer = models.load_tokenizer(settings.model)
    folder = settings.run.run_dir / "EXPORT"
    with whole_folder(folder) as part:
        scratch = part / "scratch"
        stage(source, tokenizer, scratch / "model")
        splitting = splitting_of(read_json(scratch / "model/tokenizer.json"))
        tools = Tools(python, settings.run.run_dir / "export.log")
        dtype = saved_dtype(source, config)
        first = part / f"model-{dtype}.gguf"
        print(f"converting {source} to {dtype}", flush=True)
        named = ["--pre", splitting] if splitting else []
        tools.run("convert", scratch / "model", first, "--dtype", dtype, *named)
        files = made(settings, tools, tokenizer, first, scratch)
        for name in FILES:
            if (scratch / "model" / name).is_file():
                shutil.copy(scratch / "model" / name, part / name)
        shutil.rmtree(scratch)
        write_json(part / "export.json", record(settings, source, tokenizer, files, splitting))
    for file in files:
        print(f"{folder / file['name']}: {file['bytes'] / 2**20:.0f} MiB")
    print(f"serve it: {python} -m llama_cpp.server --model {folder / files[-1]['name']}", flush=True)


def made(settings: Settings, tools: Tools, tokenizer: Any, first: Path, scratch: Path) -> list[dict[str, Any]]:
    """Compare the float file with the model, make the quantized one of it; return an entry for each file that stays."""
    config, texts = settings.export, sample_texts(tokenizer)
    prompts = sample_prompts(tokenizer) if config.check else []
    said = tools.ask(first, texts, prompts, scratch)
    check_tokens(tokenizer, texts, said.tokens)
    check_facts(tokenizer, said.facts)
    print(f"{first.name}: the same ids for {len(texts)} texts, the same chat template and end of text", flush=True)
    ours, found = [], None
    if config.check:
        model: Any = models.load_model(settings.model, dtype=torch.float32, trainable=False)
        ours = logits_of(model.to("cuda" if torch.cuda.is_available() else "cpu"), prompts)
        del model
        found = agreement(ours, said.logits, prompts)
        print(f"{first.name}: {words(found)}", flush=True)
        if not found.mean_kl <= config.max_kl:
            raise ValueError(
                f"task=export: {first.name} is {found.mean_kl:.2e} nats per token from the model, more than "
                f"export.max_kl={config.max_kl:g}: llama.cpp computes this architecture in another way, or "
                "export.dtype rounds too much"
            )
    files = [entry_of(first, said.facts, found)]
    if config.quantization == "none":
        return files
    second = first.with_name(f"model-{config.quantization}.gguf")
    print(f"quantizing to {config.quantization}", flush=True)
    tools.run("quantize", first, second, "--type", config.quantization)
    said = tools.ask(second, texts, prompts, scratch)
    check_tokens(tokenizer, texts, said.tokens)
    found = agreement(ours, said.logits, prompts) if config.check else None
    if found:
        print(f"{second.name}: {words(found)}", flush=True)
    print(f"{second.name}: matrices by type: {said.facts['tensors']}", flush=True)
    if not config.keep_float:
        first.unlink()
        files = []
    return [*files, entry_of(second, said.facts, found)]


def words(found: Agreement) -> str:
    """Say how far a file is from the model."""
    return (
        f"KL divergence from the model {found.mean_kl:.2e} nats per token (at most {found.max_kl:.2e}), the same most "
        f"probable token at {100 * found.same_top:.1f} % of {found.tokens}, log-probabilities at most "
        f"{found.max_gap:.2e} apart"
    )


def entry_of(file: Path, facts: dict[str, Any], found: Agreement | None) -> dict[str, Any]:
    """Describe a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    kept = {"name": file.name, "bytes": file.stat().st_size, "sha256": digest, "matrices": facts["tensors"]}
    kept |= {"llama_cpp_python": facts["llama_cpp_python"], "adds_bos": facts["adds_bos"]}
    return kept | {"agreement": found._asdict() if found else None}


def record(
    settings: Settings, source: Path, tokenizer: Any, files: list[dict[str, Any]], splitting: str | None
) -> dict[str, Any]:
    """Return export.json: what was made of what, by what."""
    return {
        "source": str(source),
        "source_digest": models.model_digest(source),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "splitting": splitting,
        "files": files,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "command": shlex.join([sys.executable, *sys.argv]),
    }
