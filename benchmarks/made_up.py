"""Teachers that benchmarks make up: caches of random entries, and generations.

Random entries cost a step what real ones cost; what is learned from them is nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import models
from dataloader import Example, Tokens, load_examples
from settings.schema import Settings
from teacher.cache import Meta, Writer, data_digest, finish
from templates import template_digest, tokenizer_digest

TOP_K = 50


@dataclass
class Teachers:
    """Where the made-up teachers lie."""

    logprobs: str
    advantages: str
    generations: str


def write_teachers(settings: Settings, folder: Path) -> Teachers:
    """Write a cache of log-probabilities of both responses, the rejected responses as generations, and a cache of their
    advantages.
    """
    tokenizer, run = models.load_tokenizer(settings.model), settings.run
    examples = load_examples(
        settings.datasets, "train", tokenizer, settings.model, run.n_examples, run.seed, run.tokens_dir, 1
    )
    pairs = [(e, e.chosen, e.rejected) for e in examples]
    generated = [rejected for _, _, rejected in pairs if rejected is not None]
    everything = [side for _, *sides in pairs for side in sides if side is not None]
    folder.mkdir(parents=True, exist_ok=True)
    _write_cache(folder / "logprobs", "logprob", everything, tokenizer)
    _write_cache(folder / "advantages", "advantage", generated, tokenizer)
    _write_generations(folder / "generations.jsonl", [e for e, *_ in pairs], generated, tokenizer)
    return Teachers(*(str(folder / name) for name in ("logprobs", "advantages", "generations.jsonl")))


def _write_cache(folder: Path, quantity: str, sequences: list[Tokens], tokenizer: Any) -> None:
    vocab, rng = len(tokenizer), np.random.default_rng(0)
    k = min(TOP_K, vocab // 2)
    unique = {tokens.key: tokens for tokens in sequences}
    digests = tokenizer_digest(tokenizer), template_digest(tokenizer)
    meta = Meta(quantity, k, vocab, "made up", None, *digests, data_digest(unique), "made up")
    writer = Writer(folder, meta)
    for tokens in unique.values():
        length = tokens.num_supervised
        ids = np.argsort(rng.random((length, min(4 * k, vocab))), axis=1)[:, :k]
        logps = -np.sort(-np.log(0.95 * rng.dirichlet(np.ones(k), length)), axis=1).astype(np.float32)
        arrays = {"ids": ids, "values": logps, "tail": np.full(length, 0.05, np.float32)}
        if quantity == "advantage":
            arrays |= {"values": rng.normal(size=logps.shape).astype(np.float32), "teacher_logps": logps}
        writer.add(tokens.ids, tokens.response, arrays)
    writer.close()
    finish(folder, meta, set(unique))


def _write_generations(path: Path, examples: list[Example], generated: list[Tokens], tokenizer: Any) -> None:
    with path.open("w", encoding="utf-8") as out:
        for example, tokens in zip(examples, generated, strict=True):
            start = len(example.prompt)
            row = {
                "prompt": example.conversation.prompt,
                "prompt_ids": example.prompt,
                "response_ids": tokens.ids[start:],
                "response": tokenizer.decode(tokens.ids[start:]),
                "finish_reason": "stop",
                "tokenizer_digest": tokenizer_digest(tokenizer),
            }
            out.write(json.dumps(row) + "\n")
