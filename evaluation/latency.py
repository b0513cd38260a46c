"""How long responses take: time to the first token, then per token, on prompts of the data set, with cached keys and
values.

A timed batch is B real prompts, padded on the left (hf) or put in together (vllm), each answered greedily with exactly
N new tokens. Every batch has other prompts; the first WARMUP batches are not timed. Letters: B prompts, N new tokens.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import StoppingCriteria, StoppingCriteriaList

import models
from dataloader import Example
from engine import meter
from generation.hf import left_padded
from generation.vllm import engine, shut_down
from settings.schema import EvaluationConfig, ModelConfig, Settings

WARMUP = 2  # batches: compilation, caches of kernels, pages of memory


class Timing(NamedTuple):
    """One batch: seconds until all prompts have their first token, then those of every step, and the steps' tokens."""

    first_token: float
    steps: list[float]
    decoded: int


Timed = Callable[[list[list[int]]], Timing]


def check_latency(config: EvaluationConfig, num_processes: int) -> None:
    """Refuse timings that cannot be had, before a model loads."""
    if not config.latency:
        return
    if num_processes > 1:
        raise ValueError(
            f"evaluation.latency=true times a model that has the machine for itself, and {num_processes} processes "
            "run: "
            "start it with `python launch.py`, without accelerate launch"
        )
    if "vllm" in config.latency_backends and find_spec("vllm") is None:
        raise ValueError(
            "evaluation.latency_backends has vllm, which is not installed: ./install.sh --vllm, or leave it out"
        )


# ---- hf


class _Clock(StoppingCriteria):
    """Asked after every token: notes the time and never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [now(device)]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Take input_ids [B, so far]; return False for each of them."""
        self.times.append(now(self.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Return the seconds of the clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hf_timed(model: Any, tokenizer: Any, new_tokens: int) -> Timed:
    """Return a function that times one batch with model.generate."""
    config = transformers.GenerationConfig(
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=models.stop_ids(tokenizer, model),
        pad_token_id=tokenizer.pad_token_id,
    )

    @torch.inference_mode()
    def timed(prompts: list[list[int]]) -> Timing:
        """Time one batch of prompts."""
        ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
        own, model.generation_config = model.generation_config, config  # else its penalties and cuts fill our gaps
        try:
            clock = _Clock(model.device)
            out = model.generate(
                ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([clock])
            )
        finally:
            model.generation_config = own
        assert out.shape == (len(prompts), ids.shape[1] + new_tokens), (
            f"a response of another length: {tuple(out.shape)}"
        )
        spans = np.diff(clock.times).tolist()
        return Timing(spans[0], spans[1:], len(prompts) * (new_tokens - 1))

    return timed


# ---- vllm


def vllm_timed(llm: Any, new_tokens: int) -> Timed:
    """Return a function that times one batch in a vLLM engine; no prefix of an earlier batch is kept."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
    )

    def timed(prompts: list[list[int]]) -> Timing:
        """Time one batch of prompts."""
        core = llm.llm_engine
        assert llm.reset_prefix_cache(), "vLLM keeps the prefixes of an earlier batch"
        said, first, before, steps = dict.fromkeys(map(str, range(len(prompts))), 0), 0.0, 0, []
        start = last = time.perf_counter()
        for name, ids in zip(said, prompts, strict=True):
            core.add_request(name, TokensPrompt(prompt_token_ids=ids), params)
        while core.has_unfinished_requests():
            outputs = core.step()
            at = time.perf_counter()
            if not outputs:
                continue
            for output in outputs:
                said[output.request_id] = len(output.outputs[0].token_ids)
            if first:
                steps.append(at - last)
            elif all(said.values()):
                first, before = at - start, sum(said.values())
            last = at
        assert set(said.values()) == {new_tokens}, f"responses of other lengths: {said}"
        return Timing(first, steps, sum(said.values()) - before)

    return timed


# ---- metrics


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles."""
    p5, p50, p95 = np.quantile(values, [0.05, 0.5, 0.95])
    return {"mean": float(np.mean(values)), "p5": float(p5), "p50": float(p50), "p95": float(p95)}


def batches_of(prompts: Sequence[list[int]], batch_size: int, count: int) -> list[list[list[int]]]:
    """Return `count` batches of prompts in their order; from the start again where there are too few."""
    return [[prompts[(k * batch_size + i) % len(prompts)] for i in range(batch_size)] for k in range(count)]


def timing_metrics(timings: Sequence[Timing]) -> dict[str, Any]:
    """Return the spread over batches of the first token and of the speed, and over steps of every further token."""
    return {
        "first_token_ms": spread([1e3 * one.first_token for one in timings]),
        "token_ms": spread([1e3 * step for one in timings for step in one.steps]),
        "decode_tokens_per_second": spread([one.decoded / sum(one.steps) for one in timings]),
    }


def device_name(device: torch.device, backend: str) -> str:
    """Name the device, a CPU with the threads that the backend uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    threads = f"{torch.get_num_threads()} thread(s)" if backend == "hf" else "threads as vLLM binds them"
    return f"{name or 'CPU'}, {threads}"


def latency_rows(
    settings: Settings, config: ModelConfig, model: Any, tokenizer: Any, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Time a loaded model at every batch size with every backend; a row for each, as latency.json holds them."""
    wanted = settings.evaluation
    prompts = [example.prompt for example in examples]
    rows = []
    for backend in wanted.latency_backends:
        device = model.device
        if backend == "hf":
            rows += _rows(
                settings, backend, hf_timed(model, tokenizer, wanted.latency_new_tokens), prompts, device, model.dtype
            )
            continue
        model.to("cpu")  # vLLM wants the device's memory
        length = max(map(len, prompts)) + wanted.latency_new_tokens
        llm = engine(config, "policy_dtype", length, 1, wanted.latency_kv_cache_gb)
        try:
            timed = vllm_timed(llm, wanted.latency_new_tokens)
            rows += _rows(settings, backend, timed, prompts, device, models.resolve_dtype(config.policy_dtype, device))
        finally:
            shut_down(llm)
            model.to(device)
    return rows


def _rows(
    settings: Settings,
    backend: str,
    timed: Timed,
    prompts: Sequence[list[int]],
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    wanted, rows = settings.evaluation, []
    for size in wanted.latency_batch_sizes:
        batches = batches_of(prompts, size, WARMUP + wanted.latency_repetitions)
        for batch in batches[:WARMUP]:
            timed(batch)
        fresh = meter.restart_peak()
        timings = [timed(batch) for batch in batches[WARMUP:]]
        lengths = [len(ids) for batch in batches[WARMUP:] for ids in batch]
        rows.append(
            {
                "backend": backend,
                "batch_size": size,
                **timing_metrics(timings),
                **_peak(backend, device, fresh),
                "new_tokens": wanted.latency_new_tokens,
                "repetitions": wanted.latency_repetitions,
                "warmup": WARMUP,
                "kv_cache": True,
                "prompt_tokens": {"min": min(lengths), "p50": float(np.median(lengths)), "max": max(lengths)},
                "prompts": f"{len(prompts)} held-out prompts of {', '.join(settings.datasets)}",
                "device": device_name(device, backend),
                "dtype": str(dtype).removeprefix("torch."),
                "torch": torch.__version__,
                "backend_version": version("transformers") if backend == "hf" else import_module("vllm").__version__,
            }
        )
        print(
            f"latency, {backend}, batch {size}: {rows[-1]['first_token_ms']['p50']:.1f} ms to the first token, "
            f"{rows[-1]['decode_tokens_per_second']['p50']:.1f} tokens/s",
            flush=True,
        )
    return rows


def _peak(backend: str, device: torch.device, fresh: bool) -> dict[str, Any]:
    """Return the peak memory of the timed batches, weights included, and what it is the memory of."""
    if device.type == "cuda":  # vLLM's engine has a process of its own and takes all it may for its cache
        known = backend == "hf"
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if known else None,
            "peak_memory_of": "allocated on the GPU",
        }
    since = "during the timed batches" if fresh else "since the process began"
    return {
        "peak_memory_bytes": meter.peak_resident_bytes(),
        "peak_memory_of": f"resident set of the process {since}",
    }


def table(timed: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the timings as a Markdown table with what was timed on; empty where nothing was."""
    rows = []
    for name, entries in timed.items():
        for one in entries:
            first, token, speed, peak = (
                one["first_token_ms"],
                one["token_ms"],
                one["decode_tokens_per_second"],
                one["peak_memory_bytes"],
            )
            rows.append(
                f"| {name} | {one['backend']} | {one['batch_size']} | {first['p50']:.1f} / {first['p95']:.1f} | "
                f"{token['p50']:.2f} / "
                f"{token['p95']:.2f} | {speed['p50']:.1f} | {f'{peak / 1e9:.2f}' if peak else '-'} |"
            )
    if not rows:
        return ""
    columns = (
        "model",
        "backend",
        "batch",
        "first token, ms p50 / p95",
        "next token, ms p50 / p95",
        "decode tokens/s, p50",
        "peak GB",
    )
    one = next(entries[0] for entries in timed.values() if entries)
    lengths = one["prompt_tokens"]
    note = (
        f"{one['device']}, {one['dtype']}; {one['prompts']} ({lengths['min']} to {lengths['max']} tokens), "
        f"{one['new_tokens']} new tokens a "
        f"response, {one['repetitions']} timed batches after {one['warmup']} that are not timed; keys and values are "
        "cached.\n"
    )
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *rows]) + f"\n\n{note}"
