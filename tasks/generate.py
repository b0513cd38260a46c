"""task=generate: sample replies of a model to the prompts of the data sets, as token ids.

Rows are sampled in a fixed order, longest prompt first, a batch at a time, each batch from its own seed: so a batch
does not depend on what ran before it, and a killed run goes on to the very rows that it would have written.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import models
from calculator_generation import calculators
from dataloader import Example, adds_bos, load_examples
from schema import GenerationConfig, Settings

Reply = tuple[list[int], str]  # response ids with the end-of-turn token, and "stop" or "length"
Backend = Callable[[list[list[int]], int], list[Reply]]  # (prompts of one batch, seed) -> replies in their order


# ---- the Hugging Face backend


class _Forbid(LogitsProcessor):
    """Give some ids no probability."""

    def __init__(self, forbidden: Tensor) -> None:
        self.forbidden = forbidden  # [V] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take and return scores [B, V]."""
        return scores.masked_fill(self.forbidden, float("-inf"))


def forbidden_ids(tokenizer: Any, stop: Sequence[int], vocab_size: int, width: int) -> Tensor:
    """Mark what no reply may hold, [width] bool: padding of the vocabulary, and special tokens that end no turn."""
    forbidden = torch.zeros(width, dtype=torch.bool)
    forbidden[vocab_size:] = True
    special = {tokenizer.pad_token_id, *tokenizer.all_special_ids} - set(stop)
    forbidden[sorted(i for i in special if i is not None and i < width)] = True
    return forbidden


def hf_backend(model: Any, tokenizer: Any, generation: GenerationConfig, stop: list[int], vocab_size: int) -> Backend:
    """Return a function that samples one batch with model.generate."""
    width = model.get_output_embeddings().weight.shape[0]
    forbid = _Forbid(forbidden_ids(tokenizer, stop, vocab_size, width).to(model.device))
    sampling: dict[str, Any] = {"do_sample": False}
    if generation.temperature > 0:
        sampling = {
            "do_sample": True, "temperature": generation.temperature,
            "top_p": generation.top_p, "top_k": max(0, generation.top_k),
        }  # fmt: skip
    config = transformers.GenerationConfig(
        max_new_tokens=generation.max_new_tokens, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
        use_cache=True, **sampling,
    )  # fmt: skip

    @torch.inference_mode()
    def batch(prompts: list[list[int]], seed: int) -> list[Reply]:
        longest = max(map(len, prompts))
        pad = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
        attention = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in (pad, attention))
        own, model.generation_config = model.generation_config, config  # else its penalties and cuts fill our gaps
        cuda = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                torch.manual_seed(seed)
                # Position ids follow from the mask: the first token that is not padding stands at 0.
                processors = LogitsProcessorList([forbid, *calculators(generation.calculator, tokenizer, longest)])
                out = model.generate(
                    ids, attention_mask=mask, generation_config=config, logits_processor=processors
                )
        finally:
            model.generation_config = own
        return [cut(row, stop) for row in out[:, longest:].tolist()]

    return batch


def cut(ids: list[int], stop: Sequence[int]) -> Reply:
    """Cut after the first stop id; without one the reply ran into max_new_tokens."""
    for i, token in enumerate(ids):
        if token in stop:
            return ids[: i + 1], "stop"
    return ids, "length"


BACKENDS = {"hf": hf_backend}


def backend_of(name: str) -> Callable[..., Backend]:
    """Return the maker of a backend; ValueError for one that is not there."""
    if name not in BACKENDS:
        later = " (vllm comes later)" if name == "vllm" else ""
        raise ValueError(f"generation.backend={name!r} is not known{later}; use {', '.join(BACKENDS)}")
    return BACKENDS[name]


# ---- batches


def length_batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Return the indices of each batch: longest prompts first, so that little is padding and memory runs out early."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_seed(seed: int, index: int) -> int:
    """Return the seed of one batch, a function of the run's seed and the batch's index alone."""
    return int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(seed * 1_000_003 + index)))


def sample(
    model: PreTrainedModel, tokenizer: Any, prompt_ids: list[list[int]], generation: GenerationConfig,
    stop: list[int], vocab_size: int, seed: int,
) -> list[Reply]:  # fmt: skip
    """Reply once to every prompt; (response ids with the end-of-turn token, "stop" | "length") in the prompts' order.

    No reply holds an id >= vocab_size, padding, or a special token that ends no turn. Temperature 0 is greedy.
    """
    backend = backend_of(generation.backend)(model, tokenizer, generation, stop, vocab_size)
    replies: list[Reply | None] = [None] * len(prompt_ids)
    with Progress(len(prompt_ids), 0) as progress:
        for index, batch in enumerate(length_batches(prompt_ids, generation.batch_size)):
            for i, reply in zip(batch, backend([prompt_ids[i] for i in batch], batch_seed(seed, index)), strict=True):
                replies[i] = reply
                progress.add(reply)
    return [reply for reply in replies if reply is not None]


class Progress:
    """A progress bar over replies that shows tokens per second."""

    def __init__(self, total: int, done: int) -> None:
        self.bar = tqdm(total=total, initial=done, desc="generate", unit="reply", mininterval=1)
        self.tokens, self.start = 0, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def tokens_per_second(self) -> float:
        """Return generated tokens per second so far."""
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    def add(self, reply: Reply) -> None:
        """Count one reply."""
        self.tokens += len(reply[0])
        self.bar.set_postfix_str(f"{self.tokens_per_second:.0f} tokens/s", refresh=False)
        self.bar.update()


# ---- the task


class Job(NamedTuple):
    """One reply to make: the example, and which of its n samples this is."""

    example: Example
    sample: int


def run(settings: Settings) -> None:
    """Write run_dir/generations.jsonl: n replies to every prompt of the split; goes on where a killed run stopped."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "task=generate runs in one process: start it with `python launch.py`, without accelerate launch"
        )
    config, generation = settings.model, settings.generation
    make = backend_of(generation.backend)
    tokenizer = models.load_tokenizer(config)
    jobs = _jobs(settings, tokenizer)
    head = {"sampling": _sampling(settings), "model_digest": models.config_digest(config)}
    path = settings.run.run_dir / "generations.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    batches = length_batches([job.example.prompt for job in jobs], generation.batch_size)
    done = _resume(path, [jobs[i] for batch in batches for i in batch], head, generation.batch_size)
    if done == len(jobs):
        print(f"{path}: all {done} replies are there")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = models.resolve_dtype(config.policy_dtype, device)
    model: Any = models.load_model(config, dtype=dtype, trainable=False).to(device)  # type: ignore[arg-type]
    stop = models.stop_ids(tokenizer, model)
    _notes(model, tokenizer, stop, jobs, generation)
    backend = make(model, tokenizer, generation, stop, len(tokenizer))
    counts: Counter[str] = Counter()
    with path.open("a", encoding="utf-8") as out, Progress(len(jobs), done) as progress:
        for index, batch in enumerate(batches):
            if index * generation.batch_size < done:
                continue
            replies = backend([jobs[i].example.prompt for i in batch], batch_seed(generation.seed, index))
            rows = [_row(jobs[i], reply, tokenizer, stop, head) for i, reply in zip(batch, replies, strict=True)]
            out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            out.flush()
            for reply in replies:
                progress.add(reply)
                counts[reply[1]] += 1
    speed = f"{progress.tokens} tokens at {progress.tokens_per_second:.0f} tokens/s"
    print(f"{path}: {len(jobs)} replies, {speed}; {counts['stop']} ended, {counts['length']} cut by max_new_tokens")


def _jobs(settings: Settings, tokenizer: Any) -> list[Job]:
    run, generation = settings.run, settings.generation
    limit = run.n_examples if generation.split == "train" else run.n_eval_examples
    examples = load_examples(settings.datasets, generation.split, tokenizer, settings.model, limit, run.seed)
    if not examples:
        raise ValueError(
            f"no prompts: no data set has a {generation.split} source; set datasets.NAME.{generation.split}"
        )
    for example in examples:
        check_bos(tokenizer, example.prompt)
    return [Job(example, i) for example in examples for i in range(generation.n)]


def check_bos(tokenizer: Any, ids: list[int]) -> None:
    """Assert that a prompt begins with exactly one begin-of-sequence token, where the tokenizer has such a habit."""
    bos = tokenizer.bos_token_id
    if bos is not None:
        assert ids[:2] != [bos, bos], f"two begin-of-sequence tokens: {tokenizer.decode(ids[:20])!r}"
        assert not adds_bos(tokenizer) or ids[0] == bos, f"no begin-of-sequence token: {tokenizer.decode(ids[:20])!r}"


def _sampling(settings: Settings) -> dict[str, Any]:
    generation = settings.generation
    keys = ("backend", "max_new_tokens", "temperature", "top_p", "top_k", "n", "batch_size", "seed")
    calculator = {"calculator": True} if generation.calculator else {}  # older files go on without the key
    return {key: getattr(generation, key) for key in keys} | calculator


def _notes(model: Any, tokenizer: Any, stop: list[int], jobs: list[Job], generation: GenerationConfig) -> None:
    """Print what a user should know before the first reply."""
    own = models.stop_ids(tokenizer)
    if own != stop:
        words = [tokenizer.convert_ids_to_tokens(ids) for ids in (own, stop)]
        print(
            f"note: the tokenizer ends a turn with {words[0]}, the model also with others; any of {words[1]} ends a reply"
        )
    longest = max(len(job.example.prompt) for job in jobs) + generation.max_new_tokens
    positions = getattr(model.config, "max_position_embeddings", longest)
    if longest > positions:
        print(f"note: prompt and reply may take {longest} tokens, the model was made for {positions}")
    print(f"first prompt: {tokenizer.decode(jobs[0].example.prompt)[-400:]!r}", flush=True)


def _row(job: Job, reply: Reply, tokenizer: Any, stop: list[int], head: dict[str, Any]) -> dict[str, Any]:
    ids, reason = reply
    body = ids[:-1] if reason == "stop" else ids
    strange = set(body) & (set(tokenizer.all_special_ids) | set(stop))
    assert not strange, f"special tokens inside a reply: {tokenizer.convert_ids_to_tokens(sorted(strange))}"
    conversation = job.example.conversation
    return {
        "prompt": conversation.prompt,
        "prompt_ids": job.example.prompt,
        "response_ids": ids,
        "response": tokenizer.decode(body, clean_up_tokenization_spaces=False),
        "finish_reason": reason,
        "sample": job.sample,
        **head,
        "meta": conversation.meta,
    }


def _resume(path: Path, jobs: list[Job], head: dict[str, Any], batch_size: int) -> int:
    """Cut the file after its last whole batch and return how many rows stay; ValueError if they are another run's."""
    if not path.is_file():
        return 0
    keep, sizes = 0, [0]
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n") or keep == len(jobs):
                break
            try:
                row = json.loads(line)
            except ValueError:
                break  # torn by a crash of the machine
            difference = next((key for key, value in head.items() if row.get(key) != value), None)
            if row.get("prompt_ids") != jobs[keep].example.prompt or row.get("sample") != jobs[keep].sample:
                difference = "prompt"
            if difference:
                raise ValueError(
                    f"{path}, line {keep + 1}: written with another {difference}. Remove the file or choose another exp_name"
                )
            keep += 1
            sizes.append(sizes[-1] + len(line))
    if keep < len(jobs):
        keep -= keep % batch_size
    os.truncate(path, sizes[keep])
    if 0 < keep < len(jobs):
        print(f"{path}: going on after {keep} of {len(jobs)} replies")
    return keep
