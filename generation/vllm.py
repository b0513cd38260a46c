"""vLLM backend: continuous batching with prefix caching, on GPUs (tensor parallel) or CPU.

Written for vLLM 0.32 (requirements/vllm.lock, vllm_gpu.lock). teacher/vllm.py takes its scores of prompts.
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import transformers

import models
from generation.calculator_hooks import forced_ids, pause_ids, piece_of
from generation.interface import Answer, derived_seed, forbidden_ids
from settings.schema import ModelConfig, Settings

CPU_KV_CACHE_GB = 2.0  # enough for 45,000 tokens of SmolLM2-135M in float32
IN_FLIGHT = 1024  # requests that the engine knows of at once: more than it can run, little to hold
MOST_BIASED = 1024  # of vLLM's sampler on GPUs
FORBIDDEN = -100.0  # vLLM's strongest bias: a factor of 4e-44 on the probability


def missing(config: ModelConfig) -> str | None:
    """Say in words why vLLM cannot serve this model here; None if it can be tried."""
    if find_spec("vllm") is None:
        return "vLLM is not installed (./install.sh --vllm)"
    if models.model_source(config) is None or config.num_layers is not None:
        return "vLLM reads a model's folder, and this model is built or cut in memory (model.build, model.num_layers)"
    return None


def own_devices(environ: Mapping[str, str], count: int, tensor_parallel: int) -> dict[str, str]:
    """Return the variable that leaves an engine the GPUs of its process alone, where several run on a machine.

    count: the GPUs that are visible. An engine numbers its GPUs from 0, whatever the process's own device is.
    """
    local, together = int(environ.get("LOCAL_RANK", "0")), int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if together == 1:
        return {}
    visible = (environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    if together * tensor_parallel > len(visible):
        raise ValueError(
            f"{together} processes with an engine of tensor_parallel={tensor_parallel} each need "
            f"{together * tensor_parallel} GPUs, and {len(visible)} are here: start fewer processes"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[local * tensor_parallel : (local + 1) * tensor_parallel])}


@cache
def _at_first() -> tuple[dict[str, str], int]:
    """Return the environment and the number of GPUs of before the first engine, which leaves itself its own ones."""
    return dict(os.environ), torch.cuda.device_count()


def keep_own_devices(tensor_parallel: int) -> None:
    """Leave this process the GPUs of its engine; an engine after another one gets the same ones."""
    environ, count = _at_first()
    os.environ |= own_devices(environ, count, tensor_parallel)


def engine(
    config: ModelConfig,
    dtype_key: str,
    max_length: int,
    tensor_parallel: int,
    kv_cache_gb: float | None,
    **options: Any,
) -> Any:
    """Start a vLLM engine over the model's folder."""
    source = models.model_source(config)
    why = missing(config)
    if why or source is None:
        raise ValueError(f"{why}; use the hf backend")
    dtype = models.resolve_dtype(getattr(config, dtype_key), "cuda" if torch.cuda.is_available() else "cpu")
    return started(source, dtype, max_length, tensor_parallel, kv_cache_gb, **options)


def started(
    source: str,
    dtype: torch.dtype,
    max_length: int,
    tensor_parallel: int,
    kv_cache_gb: float | None,
    **options: Any,
) -> Any:
    """Start a vLLM engine over a folder: no tokenizer, none of the folder's own sampling habits."""
    gpu = torch.cuda.is_available()
    if gpu:
        keep_own_devices(tensor_parallel)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not gpu and tensor_parallel == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else three processes import vLLM one by one
        options["distributed_executor_backend"] = "uni"
    if not gpu or kv_cache_gb:
        options["kv_cache_memory_bytes"] = int((kv_cache_gb or CPU_KV_CACHE_GB) * 2**30)
    try:
        from vllm import LLM

        return LLM(
            model=source,
            skip_tokenizer_init=True,
            generation_config="vllm",
            trust_remote_code=False,
            dtype=str(dtype).removeprefix("torch."),
            tensor_parallel_size=tensor_parallel,
            max_model_len=max_length,
            enforce_eager=not gpu,
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            **options,
        )
    except (ImportError, RuntimeError, ValueError, OSError, NotImplementedError, AssertionError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"vLLM cannot start with the model {source!r}: {reason}. VLLM_LOGGING_LEVEL=INFO shows its log; "
            "the hf backend takes any model that transformers loads"
        ) from error


Request = tuple[str, list[int], Any]  # id, prompt's ids, sampling parameters


def finished(llm: Any, todo: deque[int], request: Callable[[int], Request]) -> Iterator[Any]:
    """Run the request of every number in `todo` and yield each output when it is complete; more may be put in
    meanwhile.
    """
    from vllm import TokensPrompt

    core, waiting = llm.llm_engine, 0
    while todo or core.has_unfinished_requests():
        while todo and waiting < IN_FLIGHT:
            name, ids, params = request(todo.popleft())
            core.add_request(name, TokensPrompt(prompt_token_ids=ids), params)
            waiting += 1
        for output in core.step():
            if output.finished:
                waiting -= 1
                yield output


def model_width(source: str | None) -> int:
    """Return how many ids the softmax of the model in a folder is over."""
    architecture = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    return int(architecture.get_text_config().vocab_size)


def bias_against(forbidden: Sequence[int], width: int, vocab_size: int, instead: str) -> dict[int, float]:
    """Return the bias that keeps ids out of responses; ValueError if they are more than vLLM takes."""
    if len(forbidden) > MOST_BIASED:
        raise ValueError(
            f"vLLM can forbid {MOST_BIASED} ids, and no response may hold any of {len(forbidden)} ids of this model "
            f"(its softmax has {width}, the tokenizer {vocab_size}): use {instead}"
        )
    return dict.fromkeys(forbidden, FORBIDDEN)


def sampling_params(
    ends: list[int],
    bias: dict[int, float],
    room: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Any:
    """Return vLLM's parameters of at most `room` tokens: our ends and no others, each token's log-probability."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=max(0, top_k),
        max_tokens=room,
        stop_token_ids=ends,
        ignore_eos=True,
        logit_bias=bias or None,
        logprobs=0,
        seed=seed,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class VllmBackend:
    """A vLLM engine behind the interface of generation.responses; each request has a seed of its own."""

    def __init__(self, settings: Settings, tokenizer: Any, stop: list[int], max_length: int) -> None:
        generation = settings.generation
        self.generation, self.tokenizer, self.stop = generation, tokenizer, stop
        self.pauses = pause_ids(tokenizer, stop) if generation.calculator else []
        width = model_width(models.model_source(settings.model))
        forbidden = forbidden_ids(tokenizer, stop, len(tokenizer), width).nonzero().flatten().tolist()
        self.bias = bias_against(forbidden, width, len(tokenizer), "generation.backend=hf")
        self.llm = engine(
            settings.model,
            "policy_dtype",
            max_length,
            generation.tensor_parallel,
            generation.kv_cache_gb,
            seed=generation.seed,
        )

    def answers(self, prompts: Sequence[list[int]], wanted: Collection[int], seed: int) -> Iterator[Answer]:
        """Yield responses in the order in which they end; one that pauses for the calculator goes back into the
        engine.
        """
        longest, ends = self.generation.max_new_tokens, [*self.stop, *self.pauses]
        todo = deque(sorted(wanted, key=lambda i: (-len(prompts[i]), i)))
        said: dict[int, list[int]] = {}

        def request(i: int) -> Request:
            before = said.get(i, [])
            turn = derived_seed(seed, i) + len(before)  # going on with the same seed would draw the same numbers again
            how = self.generation.temperature, self.generation.top_p, self.generation.top_k
            return str(i), [*prompts[i], *before], sampling_params(ends, self.bias, longest - len(before), turn, *how)

        for output in finished(self.llm, todo, request):
            i, made = int(output.request_id), output.outputs[0]
            new, reason = piece_of(list(made.token_ids), self.stop, self.pauses)
            before = said.pop(i, [])
            ids = [*before, *new]
            if reason == "pause":
                ids = [*ids, *forced_ids(self.tokenizer, ids)][:longest]
                if len(ids) < longest:
                    said[i] = ids
                    todo.appendleft(i)
                    continue
            logps = [float(entry[token].logprob) for token, entry in zip(new, made.logprobs, strict=True)]
            # What the calculator wrote was not sampled: a response with a pause has no log-probabilities of its own.
            yield Answer(i, ids, "stop" if reason == "stop" else "length", logps if len(logps) == len(ids) else None)

    def close(self) -> None:
        """End the engine and free its memory."""
        shut_down(self.llm)
        del self.llm


def shut_down(llm: Any) -> None:
    """End an engine's processes and free its memory."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
