"""Tokens per second of scoring into a cache, against the bare forward pass of the same model on the same batches.

    python -m benchmarks.cache_speed

`forward` computes every logit of a few batches and keeps nothing; `score` is what task=cache does with them (logits of
response positions only, top k, to the host); `score + write` puts them on disk, too, in a thread. `in line` is how it
was until 2026-11-28: two passes over the logits, and each file made safe (fsync) after every batch. The last lines have
two teachers: two forward passes are their floor.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.setup import arguments, build, compare, device, machine, sequences, size_of
from dataloader import Sequences, Tokens, collate
from functional import gather_logps, topk_logps
from teacher.cache import Meta, Writer
from teacher.precision import teacher_logits
from teacher.quantities import quantity_named
from teacher.scoring import Scorer, on_host, split_rows
from teacher.writing import Scored, score_all

BATCHES = 4  # a turn of each work: a thread that writes one batch while the next is scored needs some
Batches = list[list[Tokens]]


class Vocabulary(SimpleNamespace):
    """What Scorer asks of a tokenizer: its length and a padding id."""

    def __len__(self) -> int:
        return int(self.size)


def plainly(logits: tuple[Tensor, ...], k: int) -> dict[str, Tensor]:
    """Return the arrays of logprob, or of advantage for two teachers, by two passes over the logits of each."""
    ids, logps, tail = topk_logps(logits[0], k)
    if len(logits) == 1:
        return {"ids": ids, "values": logps, "tail": tail}
    return {"ids": ids, "values": logps - gather_logps(logits[1], ids), "tail": tail, "teacher_logps": logps}


class Plain:
    """What Scorer was: the same numbers, and it waits for them."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @torch.inference_mode()
    def __call__(self, rows: list[Tokens]) -> list[Any]:
        """Return the arrays of each row."""
        batch = Sequences(*(t.to(device()) for t in collate(rows, self.scorer.pad_id)))
        logits = tuple(teacher_logits(m, batch, self.scorer.vocab_size).logits for m in self.scorer.teachers)
        return split_rows(on_host(plainly(logits, self.scorer.k)), [row.num_supervised for row in rows])


def writing(score: Callable[[list[Tokens]], Scored], writer: Writer, works: list[Batches]) -> Callable[[], None]:
    """Return a work that scores and writes the next batches; each call needs new ones, a cache holds each once."""
    remaining = iter(works)
    return lambda: score_all(next(remaining), writer, score, "", False)


def in_line(score: Callable[[list[Tokens]], list[Any]], writer: Writer, works: list[Batches]) -> Callable[[], None]:
    """Return the work of `writing` without a thread, safe on disk after every batch."""
    remaining = iter(works)

    def work() -> None:
        for rows in next(remaining):
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
    batches = [sequences(size, size.rows, seed) for seed in range(BATCHES)]
    padded = [Sequences(*(t.to(device()) for t in collate(batch, 0))) for batch in batches]

    @torch.inference_mode()
    def forward() -> None:
        for batch in padded:
            teacher(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)

    def score() -> None:
        for found in [one.begun(batch) for batch in batches]:
            found()

    fresh = [sequences(size, size.rows, seed) for seed in range(BATCHES, (options.repeats + 2) * BATCHES)]
    works_of = [fresh[start : start + BATCHES] for start in range(0, len(fresh), BATCHES)]
    with tempfile.TemporaryDirectory() as folder:

        def writer(quantity: str, codec: str, number: int) -> Writer:
            meta = Meta(quantity, options.top_k, size.vocab, "t", None, "t", "t", "d", "", codec=codec, mass=0.999)
            return Writer(Path(folder) / str(number), meta)

        logprob, advantage = "logprob", "advantage"
        works: dict[str, Callable[[], object]] = {
            "forward": forward,
            "score": score,
            "score + write": writing(one.begun, writer(logprob, "none", 0), works_of),
            "score + write, compact": writing(one.begun, writer(logprob, "compact", 1), works_of),
            "in line": in_line(Plain(one), writer(logprob, "none", 2), works_of),
            "two teachers, score + write": writing(two.begun, writer(advantage, "none", 3), works_of),
            "two teachers, in line": in_line(Plain(two), writer(advantage, "none", 4), works_of),
        }
        seconds = compare(works, options.repeats, time.process_time if options.processor else time.perf_counter)
    tokens = BATCHES * size.rows * size.response
    clock = "processor seconds of all threads" if options.processor else "seconds"
    print(f"{machine()}; {size}; K = {options.top_k}; {BATCHES} batches a turn; {clock}")
    print("| work | response tokens/s | time, forward = 1 | share of the bare forward passes |\n|---|---|---|---|")
    for name, spent in seconds.items():
        ratio = spent / seconds["forward"]
        passes = 2 if name.startswith("two") else 1
        print(f"| {name} | {tokens / spent:,.0f} | {ratio:.2f} | {passes / ratio:.2f} |")


if __name__ == "__main__":
    main()
