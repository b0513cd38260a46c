"""task=cache: score responses with one teacher (top-k log-probabilities) or two (advantages) into run_dir/CACHE."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

import models
from dataloader import Tokens, collate, load_examples, read_generations
from functional import gather_logps, topk_logps
from models import response_logits
from settings.schema import Settings
from teacher.cache import Meta, Writer, content_key, finish


def run(settings: Settings) -> None:
    """Score every response once; a killed run goes on behind its last whole sequence."""
    if settings.cache.backend == "vllm":
        return _run_with_vllm(settings)
    state, config = PartialState(), settings.cache
    tokenizer = models.load_tokenizer(settings.model)
    sequences = _sequences(settings, tokenizer)
    dtype = models.resolve_dtype(settings.model.reference_dtype, state.device)
    if config.reference:
        check_tokenizers(tokenizer, config.reference, settings)
    teacher = models.load_model(settings.model, dtype=dtype, trainable=False).to(state.device)
    reference = None
    if config.reference:
        reference = models.load_model(settings.model, source=config.reference, dtype=dtype, trainable=False).to(
            state.device
        )
    folder = settings.run.run_dir / "CACHE"
    meta = _meta(settings, tokenizer, sequences)
    if state.is_main_process:  # meta.json first, so that the other writers compare with it
        Writer(folder, meta, 0).close()
    state.wait_for_everyone()
    writer = Writer(folder, meta, state.process_index)
    scorer = Scorer(teacher, reference, tokenizer, config.top_k, config.beta)
    _score_all(
        sequences[state.process_index :: state.num_processes], writer, scorer, config.batch_size, state.is_main_process
    )
    writer.close()
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder)
    if state.num_processes > 1:
        state.destroy_process_group()  # left to the interpreter's end, gloo's threads may abort the process


def _run_with_vllm(settings: Settings) -> None:
    """The same with vLLM's prompt_logprobs, in one process (cache.tensor_parallel spreads the model)."""
    from generation.vllm import VllmScorer, shut_down

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "cache.backend=vllm runs in one process: start it with `python launch.py`, without accelerate launch"
        )
    tokenizer = models.load_tokenizer(settings.model)
    sequences = _sequences(settings, tokenizer)
    folder = settings.run.run_dir / "CACHE"
    writer = Writer(folder, _meta(settings, tokenizer, sequences))
    if not all(writer.has(content_key(t.ids, t.response)) for t in sequences):
        scorer = VllmScorer(settings, len(tokenizer), max(len(t.ids) for t in sequences))
        _score_all(sequences, writer, scorer, settings.cache.batch_size, True)
        shut_down(scorer.llm)
    writer.close()
    _finish(folder)


def _finish(folder: Path) -> None:
    done = finish(folder)
    size = sum(f.stat().st_size for f in folder.glob("shard-*/*"))
    print(
        f"{done.quantity} cache: {done.num_sequences} sequences, {done.num_tokens} tokens, "
        f"{size / max(1, done.num_tokens):.1f} bytes per token"
    )


def _sequences(settings: Settings, tokenizer: Any) -> list[Tokens]:
    """Return what is to be scored, each content once, longest first so that memory fails at once if it does."""
    config = settings.cache
    if config.generations:
        found = [g.tokens for g in read_generations(config.generations, tokenizer) if g.response_ids]
    else:
        limit = settings.run.n_examples if config.split == "train" else settings.run.n_eval_examples
        examples = load_examples(settings.datasets, config.split, tokenizer, settings.model, limit, settings.run.seed)
        found = [t for e in examples for name in config.responses if (t := getattr(e, name)) is not None]
    if not found:
        raise ValueError(f"nothing to score: the rows have none of cache.responses={config.responses}")
    unique = {content_key(t.ids, t.response): t for t in found}
    return sorted(unique.values(), key=lambda t: -len(t.ids))


def check_tokenizers(tokenizer: Any, reference: str, settings: Settings) -> None:
    """Refuse two teachers whose tokenizers differ: their log-probabilities would be of different things."""
    from dataclasses import replace

    other = models.load_tokenizer(replace(settings.model, tokenizer_name_or_path=reference))
    ours, theirs = models.tokenizer_digest(tokenizer), models.tokenizer_digest(other)
    if ours != theirs:
        raise ValueError(
            f"cache.reference={reference} has another tokenizer or chat template (digest {theirs}) than the teacher's "
            f"({ours})"
        )


def _meta(settings: Settings, tokenizer: Any, sequences: list[Tokens]) -> Meta:
    config, source = settings.cache, models.model_source(settings.model)
    data = hashlib.sha256(b"".join(sorted(content_key(t.ids, t.response) for t in sequences))).hexdigest()[:16]
    command = settings.run.run_dir / "command.txt"
    return Meta(
        quantity="advantage" if config.reference else "logprob",
        k=config.top_k,
        vocab_size=len(tokenizer),
        teacher_digest=models.model_digest(source) if source else f"build:{settings.model.build_seed}",
        reference_digest=models.model_digest(config.reference) if config.reference else None,
        tokenizer_digest=models.tokenizer_digest(tokenizer),
        template_digest=models.template_digest(tokenizer),
        data_digest=data,
        command=command.read_text().strip() if command.is_file() else "",
        backend=config.backend,
    )


class Scorer:
    """One or two frozen teachers that score batches of sequences at the same ids."""

    def __init__(self, teacher: Any, reference: Any | None, tokenizer: Any, k: int, beta: float = 1.0) -> None:
        self.teacher, self.reference, self.k, self.beta = teacher, reference, k, beta
        self.vocab_size, self.pad_id = len(tokenizer), tokenizer.pad_token_id

    @torch.inference_mode()
    def __call__(self, rows: list[Tokens]) -> list[tuple[Any, Any, Any, Any]]:
        """Return (ids [L, K], values [L, K], tail [L], teacher log-probs [L, K] or None) of each row, as numpy
        arrays.
        """
        device = next(self.teacher.parameters()).device
        batch = collate(rows, self.pad_id)
        batch = type(batch)(*(t.to(device) for t in batch))
        out = response_logits(self.teacher, batch, self.vocab_size)
        ids, logps, tail = topk_logps(out.logits, self.k)
        values, kept = logps, None
        if self.reference is not None:
            kept = logps
            other = response_logits(self.reference, batch, self.vocab_size)
            values = self.beta * (logps - gather_logps(other.logits, ids))
        lengths = [sum(r.response) for r in rows]
        parts = [None if x is None else [p.cpu().numpy() for p in x.split(lengths)] for x in (ids, values, tail, kept)]
        return [tuple(None if p is None else p[i] for p in parts) for i in range(len(rows))]  # type: ignore[misc]


def _score_all(
    sequences: list[Tokens], writer: Writer, scorer: Callable[[list[Tokens]], Any], size: int, show: bool
) -> None:
    # Batches are the same whether a run was cut off or not: other neighbors mean other padding, and other last bits.
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    todo = [b for b in batches if not all(writer.has(content_key(t.ids, t.response)) for t in b)]
    started, tokens = time.perf_counter(), 0
    bar = tqdm(
        total=len(sequences),
        initial=len(sequences) - sum(map(len, todo)),
        desc="cache",
        mininterval=1,
        disable=not show,
    )
    for batch in todo:
        for row, (ids, values, tail, kept) in zip(batch, scorer(batch), strict=True):
            writer.add(row.ids, row.response, ids, values, tail, kept)
            tokens += len(tail)
        writer.flush()
        bar.update(len(batch))
        bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
    bar.close()
