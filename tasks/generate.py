"""task=generate: sample replies of a model to the prompts of the data sets, as token ids.

Rows are sampled in a fixed order, longest prompt first, a batch at a time, each batch from its own seed: so a batch
does not depend on what ran before it, and a killed run goes on to the very rows that it would have written. The
backends stand in backends/; each takes prompts as token ids and gives token ids back.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import models
from backends import hf, openai, vllm
from backends.hf import hf_backend
from backends.replies import Reply, Start, stop_ids_of
from dataloader import Example, adds_bos, load_examples
from schema import GenerationConfig, ModelConfig, Settings

# How many prompts make a batch: what Hugging Face holds at once; elsewhere how far ahead replies are asked for.
BATCH_SIZES = {"hf": 32, "vllm": 1024, "openai": 1024}
STARTS: dict[str, Start] = {"hf": hf.start, "vllm": vllm.start, "openai": openai.start}


def resolved(settings: Settings) -> GenerationConfig:
    """Put what `auto` and null stand for here into the generation config; a run says what it took."""
    generation, name = settings.generation, settings.generation.backend
    if name == "auto":
        reason = vllm.why_not(settings.model)
        name = "hf" if reason else "vllm"
        print(f"generation.backend=auto: {name}" + (f" ({reason})" if reason else ""), flush=True)
    return replace(generation, backend=name, batch_size=generation.batch_size or BATCH_SIZES[name])


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
    """Reply once to every prompt with a model in memory; (response ids with the end-of-turn token, "stop" | "length") in the prompts' order.

    No reply holds an id >= vocab_size, padding, or a special token that ends no turn. Temperature 0 is greedy.
    """
    backend = hf_backend(model, tokenizer, generation, stop, vocab_size)
    size = generation.batch_size or BATCH_SIZES["hf"]
    replies: list[Reply | None] = [None] * len(prompt_ids)
    with Progress(len(prompt_ids), 0) as progress:
        for index, batch in enumerate(length_batches(prompt_ids, size)):
            found = backend([prompt_ids[i] for i in batch], batch_seed(seed, index), 0)
            for i, reply in zip(batch, found, strict=True):
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
    config, generation = settings.model, resolved(settings)
    tokenizer = models.load_tokenizer(config)
    jobs = _jobs(settings, tokenizer)
    head = {"sampling": _sampling(generation), "model_digest": _digest(config, generation)}
    path = settings.run.run_dir / "generations.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = generation.batch_size or len(jobs)
    batches = length_batches([job.example.prompt for job in jobs], size)
    done = _resume(path, [jobs[i] for batch in batches for i in batch], head, _grain(generation, size))
    if done == len(jobs):
        print(f"{path}: all {done} replies are there")
        return
    stop = stop_ids_of(config, tokenizer)
    _notes(tokenizer, stop, jobs)
    longest = max(len(job.example.prompt) for job in jobs) + generation.max_new_tokens
    backend = STARTS[generation.backend](config, generation, tokenizer, stop, longest)
    counts: Counter[str] = Counter()
    with path.open("a", encoding="utf-8") as out, Progress(len(jobs), done) as progress:
        for index, batch in enumerate(batches):
            first = min(max(0, done - index * size), len(batch))
            if first == len(batch):
                continue
            found = backend([jobs[i].example.prompt for i in batch], batch_seed(generation.seed, index), first)
            for i, reply in zip(batch[first:], found, strict=True):
                row = _row(jobs[i], reply, tokenizer, stop, head)
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                progress.add(reply)
                counts[reply[1]] += 1
    speed = f"{progress.tokens} tokens at {progress.tokens_per_second:.0f} tokens/s"
    print(f"{path}: {len(jobs)} replies, {speed}; {counts['stop']} ended, {counts['length']} cut by max_new_tokens")


def _grain(generation: GenerationConfig, size: int) -> int:
    """Return how many replies are sampled together: a batch where it has one seed, else each for itself."""
    return size if generation.backend == "hf" or generation.calculator else 1


def _digest(config: ModelConfig, generation: GenerationConfig) -> str:
    """Hash the model that replies; of one behind a server only the name is known."""
    return openai.digest_of(generation) if generation.backend == "openai" else models.config_digest(config)


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


def _sampling(generation: GenerationConfig) -> dict[str, Any]:
    keys = ["backend", "max_new_tokens", "temperature", "top_p", "top_k", "n", "batch_size", "seed"]
    if generation.backend == "openai":
        keys.append("model_name")
    # Older files go on without these keys.
    more = {key: True for key in ("calculator", "retokenize") if getattr(generation, key)}
    return {key: getattr(generation, key) for key in keys} | more


def _notes(tokenizer: Any, stop: list[int], jobs: list[Job]) -> None:
    """Print what a user should know before the first reply."""
    own = models.stop_ids(tokenizer)
    if own != stop:
        words = [tokenizer.convert_ids_to_tokens(ids) for ids in (own, stop)]
        print(
            f"note: the tokenizer ends a turn with {words[0]}, the model also with others; any of {words[1]} ends a reply"
        )
    print(f"first prompt: {tokenizer.decode(jobs[0].example.prompt)[-400:]!r}", flush=True)


def _row(job: Job, reply: Reply, tokenizer: Any, stop: list[int], head: dict[str, Any]) -> dict[str, Any]:
    ids, reason = reply
    body = ids[:-1] if reason == "stop" else ids
    strange = set(body) & (set(tokenizer.all_special_ids) | set(stop))
    if strange:
        raise ValueError(
            f"special tokens inside a reply, {tokenizer.convert_ids_to_tokens(sorted(strange))}: the "
            f"{head['sampling']['backend']} backend did not keep to what no reply may hold"
        )
    conversation = job.example.conversation
    return {
        "prompt": conversation.prompt,
        "prompt_ids": job.example.prompt,
        "response_ids": ids,
        "response": tokenizer.decode(body, clean_up_tokenization_spaces=False),
        "finish_reason": reason,
        "sample": job.sample,
        **({"retokenized": True} if "retokenize" in head["sampling"] else {}),
        **head,
        "meta": conversation.meta,
    }


def _resume(path: Path, jobs: list[Job], head: dict[str, Any], grain: int) -> int:
    """Cut the file after its last whole group of `grain` rows and return how many rows stay; ValueError if they are another run's."""
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
        keep -= keep % grain
    os.truncate(path, sizes[keep])
    if 0 < keep < len(jobs):
        print(f"{path}: going on after {keep} of {len(jobs)} replies")
    return keep
