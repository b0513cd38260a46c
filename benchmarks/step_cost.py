"""Time and peak memory of one DCKD and one ADPA step against one SFT step on the same tokens.

    python -m benchmarks.step_cost

Every step has 2 B rows of the same lengths: forward, the method's own `sums`, backward, AdamW. SFT learns both rows of
a pair, DCKD chosen and rejected, ADPA chosen and generated; DPO stands beside them with cached reference log-probs.
Peak memory is taken in a process of its own for each method, minus what model and optimizer hold before the step.
"""

import argparse
import gc
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.setup import (
    Size,
    arguments,
    build,
    compare,
    device,
    forget_peak,
    held_bytes,
    machine,
    peak_bytes,
    sequences,
    size_of,
)
from models import response_logits
from settings.methods import method_class
from settings.paths import CONFIG
from settings.typed import typed
from teacher.quantities import Entry
from trainers.batches import Batch, Item, make_batch

METHODS = ("sft", "dpo", "dckd", "adpa")
PEAK_OF = "STEP_COST_PEAK_OF"  # tells a child process which method to measure


def entry(size: Size, k: int, advantage: bool, rng: np.random.Generator) -> Entry:
    """Draw a teacher's entries for one response."""
    ids = np.argsort(rng.random((size.response, min(4 * k, size.vocab))), axis=1)[:, :k].astype(np.int64)
    logps = np.log(0.95 * rng.dirichlet(np.ones(k), size.response)).astype(np.float32)
    tail = np.full(size.response, 0.05, np.float32)
    return (
        Entry(ids, rng.normal(size=logps.shape).astype(np.float32), tail, logps)
        if advantage
        else Entry(ids, logps, tail, None)
    )


def trainer_of(method: str, vocab: int) -> Any:
    """Make a trainer with its default config and a vocabulary: `sums` and `counts` read nothing else."""
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        section: Any = OmegaConf.to_container(compose("config", [f"loss={method}"]).loss)
    cls = method_class(section["trainer"])
    values = {k: "-" if v == "???" else v for k, v in section.items() if k not in ("name", "trainer")}
    trainer = cls.__new__(cls)
    trainer.config, trainer.vocab_size = typed(values, cls.Config, "loss."), vocab
    return trainer


def batch_of(method: str, size: Size, k: int) -> Batch:
    """Lay the same rows out as the method's batch."""
    rng, rows = np.random.default_rng(0), sequences(size, 2 * size.rows, 0)
    items = []
    for first, second in zip(rows[: size.rows], rows[size.rows :], strict=True):
        if method == "sft":
            items += [Item((first,)), Item((second,))]
        elif method == "dpo":
            items.append(
                Item((first, second), (), tuple(np.full(size.response, -6.0, np.float32) for _ in (first, second)))
            )
        elif method == "dckd":
            items.append(Item((first, second), (entry(size, k, False, rng), entry(size, k, False, rng))))
        else:
            items.append(Item((first, second), (None, entry(size, k, True, rng))))
    return make_batch(items, 0).to(device())


def step_of(
    method: str, size: Size, k: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Return one optimizer step of the method."""
    trainer, batch = trainer_of(method, size.vocab), batch_of(method, size, k)
    counts = trainer.counts(batch)

    def step() -> None:
        sums, _ = trainer.sums(response_logits(model, batch.sequences, size.vocab), batch)
        torch.stack([total / counts[name] for name, total in sums.items()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def student(size: Size) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Build the student and its optimizer."""
    model = build(size, 1).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6)


def peak_of(method: str, size: Size, k: int) -> int:
    """Return the bytes that one step adds to its peak over model, gradients' and optimizer's own memory."""
    model, optimizer = student(size)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # allocates the moments
    optimizer.zero_grad(set_to_none=True)
    step = step_of(method, size, k, model, optimizer)
    gc.collect()
    forget_peak()
    before = held_bytes()
    step()
    return peak_bytes() - before


def measured_peak(method: str, options: argparse.Namespace) -> int:
    """Measure in a fresh process: what an earlier method freed would be used again unseen."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_cost",
        *(f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items()),
    ]
    done = subprocess.run(command, env={**os.environ, PEAK_OF: method}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-600:]}")
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Print seconds, the ratio to SFT, and peak memory of a step with its ratio."""
    options = arguments(__doc__ or "")
    size = size_of(options)
    if PEAK_OF in os.environ:
        print(peak_of(os.environ[PEAK_OF], size, options.top_k))
        return
    model, optimizer = student(size)
    seconds = compare({m: step_of(m, size, options.top_k, model, optimizer) for m in METHODS}, options.repeats)
    peaks = {m: measured_peak(m, options) for m in METHODS}
    tokens = 2 * size.rows * size.response
    print(f"{machine()}; {size}; K = {options.top_k}; {tokens} response tokens a step")
    logits = tokens * size.vocab * 4
    print(f"float32 logits of the response tokens alone: {logits / 2**20:.0f} MiB")
    print("| step | seconds | time, SFT = 1 | peak above the start, MiB | memory, SFT = 1 |\n|---|---|---|---|---|")
    for m in METHODS:
        print(
            f"| {m} | {seconds[m]:.3f} | {seconds[m] / seconds['sft']:.2f} | {peaks[m] / 2**20:.0f} | "
            f"{peaks[m] / peaks['sft']:.2f} |"
        )


if __name__ == "__main__":
    main()
