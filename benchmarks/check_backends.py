"""The checks on a GPU that run whole tasks: responses and teacher caches by Hugging Face, vLLM and its server."""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.check_parts import Row, Scale, model_config, needs_vllm
from benchmarks.commands import VllmServer, run_here
from models import load_model, load_tokenizer
from teacher.cache import Reader

ADVANTAGE_TOLERANCE = 0.01  # nat on average between vLLM's float32 and ours, TF32 included


@contextmanager
def model_folder(scale: Scale) -> Iterator[tuple[Path, Path]]:
    """Write a model of the scale with the byte tokenizer, and prompts with responses, into a folder for a while."""
    base = Path(tempfile.mkdtemp(prefix="check_gpu_"))
    try:
        tokenizer = load_tokenizer(model_config("tiny"))
        # Its vocabulary is the tokenizer's: engines would else say tokens that are no text.
        config = model_config(scale.model)
        build = {**(config.build or {}), "vocab_size": len(tokenizer)}
        load_model(model_config(scale.model, build=build), dtype=torch.bfloat16, trainable=False).save_pretrained(
            base / "model"
        )
        tokenizer.save_pretrained(base / "model")
        with (base / "rows.jsonl").open("w", encoding="utf-8") as out:
            for i in range(scale.answers):
                out.write(json.dumps({"prompt": f"Count from {i}.", "response": f"{i} {i + 1} {i + 2}"}) + "\n")
        yield base, base / "model"
    finally:
        shutil.rmtree(base, ignore_errors=True)


def task(name: str, backend: str, scale: Scale) -> Row:
    """Run task=generate or task=cache through the command line with a backend."""
    if backend == "vllm":
        needs_vllm()
    with model_folder(scale) as (base, model):
        words = [f"task={name}", f"{'generation' if name == 'generate' else 'cache'}.backend={backend}"]
        words += ["model=base_model", f"model.name_or_path={model}", "model.max_length=1024"]
        words += ["model.max_prompt_length=512", "datasets=[local]", f"datasets.local.train={base / 'rows.jsonl'}"]
        words += [f"cache_dir={base}", "exp_name=checked"]
        words += (
            [f"generation.max_new_tokens={scale.response}"]
            if name == "generate"
            else [
                "cache.top_k=20",
                "cache.responses=[response]",
            ]
        )
        started = time.perf_counter()
        run_here(words)
        seconds = time.perf_counter() - started
        return Row(f"{name} by {backend}", f"{scale.answers} rows, start and end included", seconds)


def advantages(backend: str, scale: Scale) -> Row:
    """Ask two real vLLM servers, or engines in turn, for advantages, the reference by given ids in binary; compare with
    cache.backend=hf.
    """
    needs_vllm()
    with model_folder(scale) as (base, model):
        other = base / "other"
        width = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        build = {**(model_config(scale.model).build or {}), "vocab_size": width}
        shutil.copytree(model, other)
        load_model(
            model_config(scale.model, build=build, build_seed=7), dtype=torch.bfloat16, trainable=False
        ).save_pretrained(other)
        words = ["task=cache", "model=base_model", f"model.name_or_path={model}", "model.max_length=1024"]
        words += ["model.max_prompt_length=512", "datasets=[local]", f"datasets.local.train={base / 'rows.jsonl'}"]
        words += [f"cache_dir={base}", "cache.top_k=20", "cache.responses=[response]", "model.reference_dtype=float32"]
        run_here([*words, "exp_name=here", f"cache.reference={other}"])
        words += ["exp_name=there", f"cache.backend={backend}"]
        with ExitStack() as servers:
            asked = [f"cache.reference={other}"]
            if backend == "server":
                one, two = (servers.enter_context(VllmServer(m, n)) for m, n in ((model, "teacher"), (other, "start")))
                asked = [f"cache.base_url={one.root}/v1", f"cache.reference_base_url={two.root}/v1"]
                asked += ["cache.concurrency=64"]
            started = time.perf_counter()
            run_here([*words, *asked])
            seconds = time.perf_counter() - started
        return Row(f"advantages by {backend}", compared(base / "here/CACHE", base / "there/CACHE"), seconds)


def compared(here: Path, there: Path) -> str:
    """Say how far two caches of advantages are apart, where they hold the same ids; ValueError beyond a tolerance."""
    ours, theirs = Reader(here), Reader(there)
    same, gaps = [], []
    for ids, mask in ours.sequences(10**6):
        one, other = ours.get(ids, mask), theirs.get(ids, mask)
        equal = one["ids"] == other["ids"]
        same.append(equal.mean())
        gaps.append(np.abs(one["values"] - other["values"])[equal])
    share, worst, mean = float(np.mean(same)), float(max(g.max() for g in gaps)), float(np.concatenate(gaps).mean())
    if share < 0.95 or mean > ADVANTAGE_TOLERANCE:
        raise ValueError(f"{share:.1%} of the ids are equal; advantages differ by {mean:.4f} nat, at most {worst:.4f}")
    return f"float32, {share:.2%} of the ids equal, advantages {mean:.5f} nat apart on average, at most {worst:.4f}"
