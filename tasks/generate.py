"""task=generate: the model answers prompts; token ids go in and token ids come out, rows land in generations.jsonl."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig as HFGenerationConfig

import models
from dataloader import Example, adds_bos, load_examples
from schema import GenerationConfig, Settings

Sample = tuple[list[int], str]  # response ids (the end of turn included) and why it ended: "stop" or "length"


@torch.inference_mode()
def sample(
    model: Any, tokenizer: Any, prompt_ids: list[list[int]], generation: GenerationConfig, stop: list[int],
    vocab_size: int, seed: int,
) -> list[Sample]:  # fmt: skip
    """Answer one batch of prompts with Hugging Face generate; temperature 0 is greedy.

    Prompts are padded on the left; ids from vocab_size on (padding of the embedding) are never sampled.
    """
    width = max(map(len, prompt_ids))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompt_ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids], device=model.device)
    greedy = generation.temperature == 0
    sampling = {} if greedy else {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": generation.top_k}
    beyond = list(range(vocab_size, model.get_output_embeddings().weight.shape[0]))
    config = HFGenerationConfig(
        max_new_tokens=generation.max_new_tokens, do_sample=not greedy, pad_token_id=pad, eos_token_id=stop,
        suppress_tokens=beyond or None, **sampling,
    )  # fmt: skip
    torch.manual_seed(seed)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [_until_stop(row, stop) for row in out]


def _until_stop(row: list[int], stop: list[int]) -> Sample:
    for i, token in enumerate(row):
        if token in stop:
            return row[: i + 1], "stop"
    return row, "length"


def run(settings: Settings) -> None:
    """Generate `generation.n` responses for every prompt of the split; a killed run goes on where it was."""
    tokenizer = models.load_tokenizer(settings.model)
    generation = settings.generation
    limit = settings.run.n_examples if generation.split == "train" else settings.run.n_eval_examples
    examples = load_examples(settings.datasets, generation.split, tokenizer, settings.model, limit, settings.run.seed)
    if not examples:
        raise ValueError(f"datasets have no {generation.split} split to generate for: set datasets.NAME.{generation.split}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = models.resolve_dtype(settings.model.policy_dtype, device)
    model = models.load_model(settings.model, dtype=dtype, trainable=False).to(device)
    stop = _stop_set(tokenizer, model)
    check_prompts(examples, tokenizer)
    # Longest first: a run that does not fit in memory fails at once, and rows of one batch are alike.
    jobs = sorted(((e, n) for e in unique(examples) for n in range(generation.n)), key=lambda job: -len(job[0].prompt))
    path = settings.run.run_dir / "generations.jsonl"
    done = whole_rows(path)
    batches = [jobs[i : i + generation.batch_size] for i in range(0, len(jobs), generation.batch_size)]
    first = done // generation.batch_size  # rows of a torn batch are sampled again, with the same seed
    _truncate(path, first * generation.batch_size)
    digest = models.model_digest(source) if (source := models.model_source(settings.model)) else f"build:{settings.model.build_seed}"
    started, tokens = time.perf_counter(), 0
    with path.open("a", encoding="utf-8") as out:
        bar = tqdm(total=len(jobs), initial=first * generation.batch_size, desc="generate", mininterval=1)
        for number, batch in list(enumerate(batches))[first:]:
            seed = (generation.seed * 1_000_003 + settings.run.seed) * 1_000_003 + number
            samples = sample(model, tokenizer, [e.prompt for e, _ in batch], generation, stop, len(tokenizer), seed)
            for (example, n), (ids, reason) in zip(batch, samples, strict=True):
                out.write(json.dumps(_row(example, n, ids, reason, tokenizer, settings, digest)) + "\n")
                tokens += len(ids)
            out.flush()
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
        bar.close()


def unique(examples: list[Example]) -> list[Example]:
    """Keep the first example of each prompt: responses are found by their prompt's ids."""
    return list({tuple(e.prompt): e for e in reversed(examples)}.values())[::-1]


def check_prompts(examples: list[Example], tokenizer: Any) -> None:
    """Assert one begin-of-sequence token per prompt where the tokenizer writes one."""
    if not adds_bos(tokenizer):
        return
    for example in examples:
        assert example.prompt[0] == tokenizer.bos_token_id != example.prompt[1], "a prompt must begin with exactly one BOS"


def _stop_set(tokenizer: Any, model: Any) -> list[int]:
    own, both = models.stop_ids(tokenizer), models.stop_ids(tokenizer, model)
    if own != both:
        extra = [tokenizer.decode([i]) for i in both if i not in own]
        print(f"note: the model's generation config also stops at {extra}, the tokenizer and its template do not")
    return both


def _row(example: Example, n: int, ids: list[int], reason: str, tokenizer: Any, settings: Settings, digest: str) -> dict[str, Any]:
    g = settings.generation
    return {
        "prompt": example.conversation.prompt, "prompt_ids": example.prompt, "response_ids": ids,
        "response": tokenizer.decode(ids, skip_special_tokens=True), "finish_reason": reason, "sample": n,
        "sampling": {"temperature": g.temperature, "top_p": g.top_p, "top_k": g.top_k, "max_new_tokens": g.max_new_tokens, "seed": g.seed},
        "model_digest": digest, "meta": example.conversation.meta,
    }  # fmt: skip


def whole_rows(path: Path) -> int:
    """Count the rows of a JSONL file up to the first that is torn."""
    if not path.is_file():
        return 0
    count = 0
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        count += line.endswith("\n")
    return count


def _truncate(path: Path, rows: int) -> None:
    if path.is_file():
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        part = path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(path)
