"""How much of an advantage cache's teachers, and of what objective=regularized asks for, lies outside of its entries.

python -m benchmarks.rest_mass outputs/quickstart/cache_advantages/CACHE

Means over response tokens. The target is (pi_ref exp(A / tau))^(1/T) with tau = 1: what the aligned teacher's entries
leave out, with the rest's advantage the log-ratio of both teachers' masses there (tails), or 0 (zero).
"""

import argparse

import numpy as np
import torch

from teacher.cache import Reader
from trainers.regularized_advantage import CACHE_REST, Regularizer, log_rest, reference_teacher_logps, rest_advantages

SEQUENCES = 4_000


def target_rest(
    advantages: torch.Tensor, logps: torch.Tensor, beta: float, temperature: float, tails: bool
) -> torch.Tensor:
    """Return the target's mass [N] outside of entries with advantages and log pi_dpo [N, K]."""
    how = Regularizer(1.0, "reference_teacher", temperature, beta, floor=0.01, rest_by_tails=tails)
    base = reference_teacher_logps(advantages, logps, beta)
    kept = advantages.masked_fill((logps.exp() < how.floor) & (advantages > 0), 0.0)
    rest = rest_advantages(advantages, logps, how) + log_rest(base, CACHE_REST)
    return (torch.cat([base + kept, rest[:, None]], dim=1) / temperature).softmax(-1)[:, -1]


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rest_mass", description=__doc__)
    parser.add_argument("cache", help="CACHE folder of task=cache with cache.reference")
    reader = Reader(parser.parse_args().cache)
    found = [reader.get(*sequence) for sequence in reader.sequences(SEQUENCES)]
    advantages, logps = (
        torch.from_numpy(np.concatenate([arrays[name] for arrays in found])).double()
        for name in ("values", "teacher_logps")
    )
    reference = reference_teacher_logps(advantages, logps, reader.meta.beta)
    print(f"{len(logps)} tokens of {len(found)} responses, the top {reader.k}")
    for name, values in (("aligned teacher", logps), ("reference teacher", reference)):
        print(f"{name}: {(1 - values.exp().sum(-1)).mean():.4f}")
    for temperature in (1.0, 0.3):
        for tails in (False, True):
            rest = target_rest(advantages, logps, reader.meta.beta, temperature, tails)
            said = f"target, T = {temperature}, rest_advantage={'tails' if tails else 'zero'}"
            print(f"{said}: {rest.mean():.5f}, above 0.1 at {(rest > 0.1).double().mean():.4f} of the tokens")


if __name__ == "__main__":
    main()
