"""What the benchmarks share: a model at random weights, sequences of random ids, timing and peak memory."""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import wait
from dataloader import Tokens


class Size(NamedTuple):
    """A model's size and a batch: rows of prompt + response tokens."""

    vocab: int
    hidden: int
    layers: int
    rows: int
    prompt: int
    response: int


def arguments(what: str) -> argparse.Namespace:
    """Parse the options that every benchmark has; the defaults finish in about a minute on one CPU core."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--vocab", type=int, default=32_000, help="vocabulary (default 32,000)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default 4)")
    parser.add_argument("--rows", type=int, default=4, help="sequences (pairs) in a batch (default 4)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of a sequence (default 32)")
    parser.add_argument("--response", type=int, default=96, help="response tokens of a sequence (default 96)")
    parser.add_argument("--top-k", type=int, default=50, help="teacher entries a token (default 50)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts (default 3)")
    return parser.parse_args()


def size_of(options: argparse.Namespace) -> Size:
    """Pick the sizes out of the options."""
    return Size(options.vocab, options.hidden, options.layers, options.rows, options.prompt, options.response)


def device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(size: Size, seed: int) -> LlamaForCausalLM:
    """Build a Llama from a seed: float32 on CPU, bfloat16 on GPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=3 * size.hidden,
        num_attention_heads=max(1, size.hidden // 64),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    where = device()
    return LlamaForCausalLM(config).to(where, torch.float32 if where.type == "cpu" else torch.bfloat16)


def sequences(size: Size, count: int, seed: int) -> list[Tokens]:
    """Draw sequences of random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, size.vocab, (count, size.prompt + size.response), generator=generator).tolist()
    return [Tokens(row, [False] * size.prompt + [True] * size.response) for row in ids]


def compare(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each work, after one untimed run, taking turns so that a busy machine hits all
    alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            gc.collect()
            wait()
            started = time.perf_counter()
            work()
            wait()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


def machine() -> str:
    """Name what the numbers come from."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"{name}; torch {torch.__version__}"
