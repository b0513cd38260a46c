"""Peak memory of the losses that look at whole distributions, at a large vocabulary: TDPO and Ra-DPO on one pair.

    python -m benchmarks.vocabulary_memory --vocab 152000 --length 2048

The logits of policy and reference [N, V] are there before (bfloat16, as a GPU's forward pass leaves them); printed is
what loss and backward add on top of them, beside the gradient of the policy's logits, which any loss needs.
"""

import argparse
import os
import subprocess
import sys
import time

import torch

from benchmarks.measure import forget_peak, held_bytes, peak_bytes
from benchmarks.setup import device, machine
from functional import row_sums, token_logps
from trainers.token_level import TDPO, RaDPO, RaDPOConfig, TDPOConfig, tdpo_loss

METHODS = {
    "dpo": None,
    "tdpo": (TDPO, TDPOConfig(0.1, 2, 0.5, 0.0)),
    "ra-dpo, paper": (RaDPO, RaDPOConfig(0.1, 2, 0.5, 0.0, 0.95, "paper")),
    "ra-dpo, reference": (RaDPO, RaDPOConfig(0.1, 2, 0.5, 0.0, 0.95, "reference")),
}


def measure(name: str, vocab: int, length: int) -> tuple[int, float]:
    """Return the bytes that one loss and its backward pass add, and seconds."""
    count = 2 * length
    generator = torch.Generator(device()).manual_seed(0)
    # Filled in place, row by row: a float32 draw of the whole would itself be the peak.
    logits, reference = (torch.empty(count, vocab, dtype=torch.bfloat16, device=device()) for _ in range(2))
    for row in range(count):
        for tensor in (logits, reference):
            tensor[row] = torch.randn(vocab, generator=generator, device=device())
    logits.requires_grad_()
    targets = torch.randint(0, vocab, (count,), generator=generator, device=device())
    rows = torch.arange(count, device=device()) // length
    forget_peak()
    before, start = held_bytes(), time.perf_counter()
    ratios = row_sums(token_logps(logits, targets) - token_logps(reference, targets), rows, 2)
    divergence = torch.zeros(2, device=device())
    if METHODS[name]:
        cls, config = METHODS[name]
        trainer = cls.__new__(cls)
        trainer.config = config
        divergence = row_sums(trainer.divergences(logits, reference), rows, 2)
    tdpo_loss(ratios[:1], ratios[1:], divergence[:1], divergence[1:], 0.1, 2, 0.5).sum().backward()
    return peak_bytes() - before, time.perf_counter() - start


def main() -> None:
    """Print a row a method, each measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--length", type=int, default=2_048)
    parser.add_argument("--method", help="measure this one here and print its bytes and seconds")
    options = parser.parse_args()
    if options.method:
        print(*measure(options.method, options.vocab, options.length))
        return
    logits = 2 * options.length * options.vocab * 2
    print(
        f"{machine()}; one pair of {options.length} tokens, V = {options.vocab}; bfloat16 logits of the pair: "
        f"{logits / 2**20:.0f} MiB"
    )
    print(
        "| loss | seconds | peak above the two models' logits, MiB | of it the logits' gradient | rest "
        "|\n|---|---|---|---|---|"
    )
    for name in METHODS:
        command = [
            sys.executable,
            "-m",
            "benchmarks.vocabulary_memory",
            f"--vocab={options.vocab}",
            f"--length={options.length}",
            "--method",
            name,
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout.split()
        peak, seconds = int(out[0]), float(out[1])
        print(
            f"| {name} | {seconds:.1f} | {peak / 2**20:.0f} | {logits / 2**20:.0f} | {(peak - logits) / 2**20:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
