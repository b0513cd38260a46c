"""vLLM backend: continuous batching with prefix caching, on GPUs (tensor parallel) or on CPU.

Written for vLLM 0.32 (requirements/vllm.lock, vllm_gpu.lock); vLLM itself is imported only where the engine starts.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import transformers

import models
from backends.replies import FORBIDDEN, Backend, Reply, cut, forbidden_ids, in_order, reply_seed
from calculator_generation import PAUSE, Piece, reply_with_calculator, text_of
from schema import GenerationConfig, ModelConfig

CPU_KV_CACHE_BYTES = 2 << 30  # 2 GiB, or 47,000 tokens of SmolLM2-135M in float32; vLLM's default is half of the memory
MOST_BIASED = 1024  # vllm/v1/worker/gpu/sample/logit_bias.py: more ids than that cannot be forbidden


def why_not(config: ModelConfig) -> str | None:
    """Say in words why vLLM cannot serve this model here; None if it can be tried."""
    if find_spec("vllm") is None:
        return "vLLM is not installed (./install.sh --vllm)"
    if models.model_source(config) is None or config.num_layers is not None:
        return "vLLM reads a model's folder, and this model is built or cut in memory (model.build, model.num_layers)"
    return None


def start(config: ModelConfig, generation: GenerationConfig, tokenizer: Any, stop: list[int], longest: int) -> Backend:
    """Start an engine over the model's folder and return a function that samples one batch; each reply has its seed."""
    reason = why_not(config)
    if reason:
        raise ValueError(f"generation.backend=vllm: {reason}; use generation.backend=hf")
    bias = _bias(config, tokenizer, stop)
    llm = engine(config, generation.tensor_parallel, longest, seed=generation.seed)
    pauses = pause_ids(tokenizer, stop) if generation.calculator else []

    def params(room: int, seed: int) -> Any:
        return sampling_params(generation, room, [*stop, *pauses], bias, seed)

    def batch(prompts: list[list[int]], seed: int, first: int) -> Iterator[Reply]:
        requests = [(i, prompts[i], params(generation.max_new_tokens, reply_seed(seed, i))) for i in range(first, len(prompts))]
        return in_order(((i, cut(ids, stop)) for i, ids in finished(llm, requests)), first)

    def speak(prompts: list[list[int]], rooms: list[int], seed: int) -> list[Piece]:
        requests = [(i, ids, params(rooms[i], reply_seed(seed, i))) for i, ids in enumerate(prompts)]
        said = dict(finished(llm, requests))
        return [piece_of(said[i], stop, pauses) for i in range(len(prompts))]

    def calculating(prompts: list[list[int]], seed: int, first: int) -> list[Reply]:
        assert first == 0, "replies with the calculator are sampled as a whole batch"
        return reply_with_calculator(speak, tokenizer, prompts, generation.max_new_tokens, seed)

    return calculating if generation.calculator else batch


def engine(config: ModelConfig, tensor_parallel: int, max_length: int, **options: Any) -> Any:
    """Start a vLLM engine over the model's folder: token ids only, none of the folder's own sampling habits.

    Raises ValueError, with vLLM's own words, for what it cannot load.
    """
    gpu = torch.cuda.is_available()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not gpu:
        options["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        if tensor_parallel == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # else three processes import vLLM in turn
            options["distributed_executor_backend"] = "uni"
    source = models.model_source(config)
    dtype = str(models.resolve_dtype(config.policy_dtype, "cuda" if gpu else "cpu")).removeprefix("torch.")
    try:
        from vllm import LLM

        return LLM(
            model=source, skip_tokenizer_init=True, generation_config="vllm", trust_remote_code=False, dtype=dtype,
            tensor_parallel_size=tensor_parallel, max_model_len=max_length, enforce_eager=not gpu,
            enable_prefix_caching=True, **options,
        )  # fmt: skip
    except (ImportError, RuntimeError, ValueError, OSError, NotImplementedError, AssertionError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"vLLM cannot start with the model {source!r}: {reason}. VLLM_LOGGING_LEVEL=INFO shows its log; "
            "generation.backend=hf takes any model that transformers loads"
        ) from error


def sampling_params(
    generation: GenerationConfig, room: int, stop: list[int], bias: dict[int, float] | None, seed: int
) -> Any:
    """Return vLLM's parameters of one reply of at most `room` tokens: our stop ids and no others."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=generation.temperature, top_p=generation.top_p, top_k=max(0, generation.top_k), max_tokens=room,
        stop_token_ids=stop, ignore_eos=True, logit_bias=bias, seed=seed, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def finished(llm: Any, requests: Sequence[tuple[int, list[int], Any]]) -> Iterator[tuple[int, list[int]]]:
    """Run (number, prompt ids, parameters) through the engine; yield (number, reply's ids) as each is complete."""
    from vllm import TokensPrompt

    core = llm.llm_engine
    for number, ids, params in requests:
        core.add_request(str(number), TokensPrompt(prompt_token_ids=ids), params)
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                yield int(output.request_id), list(output.outputs[0].token_ids)


def pause_ids(tokenizer: Any, stop: Sequence[int]) -> list[int]:
    """Return the ids whose text holds a "=": a reply stops there for the calculator."""
    return [i for i in range(len(tokenizer)) if i not in stop and PAUSE in text_of(tokenizer, [i])]


def piece_of(ids: list[int], stop: Sequence[int], pauses: Sequence[int]) -> Piece:
    """Say why the model stopped speaking: at the end of its turn, at a "=", or out of room."""
    ids, reason = cut(ids, stop)
    return Piece(ids, "pause" if reason == "length" and ids and ids[-1] in pauses else reason)


def _bias(config: ModelConfig, tokenizer: Any, stop: list[int]) -> dict[int, float] | None:
    """Return the bias that forbids what no reply may hold, by id."""
    source = models.model_source(config)
    try:
        width = int(transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config().vocab_size)
    except OSError as error:
        raise ValueError(f"cannot read the architecture of {source!r}: {str(error).splitlines()[0]}") from error
    forbidden = forbidden_ids(tokenizer, stop, len(tokenizer), width).nonzero().flatten().tolist()
    if len(forbidden) > MOST_BIASED:
        raise ValueError(
            f"vLLM can forbid {MOST_BIASED} ids, and no reply may hold any of {len(forbidden)} ids of this model (its "
            f"softmax has {width}, the tokenizer {len(tokenizer)}): use generation.backend=hf"
        )
    return dict.fromkeys(forbidden, FORBIDDEN) or None
