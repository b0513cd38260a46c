"""Tokens per second of scoring into a cache, against the bare forward pass of the same model on the same batches.

    python -m benchmarks.cache_speed

`forward` computes every logit and keeps nothing; `score` is what task=cache does with a batch (logits of response
positions only, top k, to the host); `score + write` puts it on disk, too; the last line has two teachers.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.setup import arguments, build, compare, device, machine, sequences, size_of
from dataloader import Sequences, Tokens, collate
from teacher.cache import Meta, Writer
from teacher.quantities import quantity_named
from teacher.scoring import Scorer


class Vocabulary(SimpleNamespace):
    """What Scorer asks of a tokenizer: its length and a padding id."""

    def __len__(self) -> int:
        return int(self.size)


def writing(
    score: Callable[[list[Tokens]], list[Any]], writer: Writer, batches: list[list[Tokens]]
) -> Callable[[], None]:
    """Return a work that scores and writes the next batch; every call needs new sequences, a cache holds each once."""
    remaining = iter(batches)

    def work() -> None:
        rows = next(remaining)
        for row, arrays in zip(rows, score(rows), strict=True):
            writer.add(row.ids, row.response, arrays)
        writer.flush()

    return work


def main() -> None:
    """Print tokens per second and the ratio to the bare forward pass."""
    options = arguments(__doc__ or "")
    size = size_of(options)
    teacher, reference = build(size, 1).eval().requires_grad_(False), build(size, 2).eval().requires_grad_(False)
    tokenizer = Vocabulary(size=size.vocab, pad_token_id=0)
    one = Scorer(quantity_named("logprob"), [teacher], tokenizer, options.top_k)
    two = Scorer(quantity_named("advantage"), [teacher, reference], tokenizer, options.top_k)
    batch = sequences(size, size.rows, 0)
    padded = Sequences(*(t.to(device()) for t in collate(batch, 0)))

    @torch.inference_mode()
    def forward() -> None:
        teacher(input_ids=padded.ids, attention_mask=padded.attention.long(), use_cache=False)

    fresh = [sequences(size, size.rows, seed) for seed in range(1, 2 * (options.repeats + 1) + 1)]
    with tempfile.TemporaryDirectory() as folder:
        writers = [
            Writer(Path(folder) / quantity, Meta(quantity, options.top_k, size.vocab, "t", None, "t", "t", "d", ""))
            for quantity in ("logprob", "advantage")
        ]
        half = len(fresh) // 2
        works: dict[str, Callable[[], object]] = {
            "forward": forward,
            "score": lambda: one(batch),
            "score + write": writing(one, writers[0], fresh[:half]),
            "two teachers, score + write": writing(two, writers[1], fresh[half:]),
        }
        seconds = compare(works, options.repeats)
        for writer in writers:
            writer.close()
    tokens = size.rows * size.response
    print(f"{machine()}; {size}; K = {options.top_k}")
    print("| work | response tokens/s | time, forward = 1 |\n|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {tokens / spent:,.0f} | {spent / seconds['forward']:.2f} |")


if __name__ == "__main__":
    main()
