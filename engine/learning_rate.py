"""lr=auto: the rate that fits the kind of training and the size of the model. A rate that is given stays as it is.

The anchors are the customary rates of models of a billion parameters and more (2502.17927: SFT and DCKD 2e-5, DPO 5e-7;
GRPO in TRL 1e-6); below that the rate grows as a power of the size that meets what our worlds' models of 100,000
parameters learn with (config/pipeline/quickstart.yaml: 3e-3 and 5e-4; rewards.yaml: 2e-3). LoRA takes ten times as much
(Schulman 2025, LoRA Without Regret).
"""

import math
from collections.abc import Iterable
from itertools import combinations
from typing import Any, NamedTuple

LARGE, SMALL = 1e9, 1e5  # sizes between which the rate depends on the size
HIGHEST = 5e-3
ANCHORS = {"imitation": (2e-5, 0.55), "preference": (5e-7, 0.75), "policy_gradient": (1e-6, 0.8)}
WORDS = {
    "imitation": "SFT and distillation",
    "preference": "preferences and advantages",
    "policy_gradient": "policy gradients",
}


class Rate(NamedTuple):
    """A rate and what it was made of; written to learning_rate.json."""

    lr: float
    kind: str
    parameters: int
    lora: bool


def parameters_of(model: Any) -> int:
    """Return how many parameters a model has, adapters left out; ZeRO's shards count whole."""
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    return sum(int(getattr(p, "ds_numel", p.numel())) for name, p in named if ".lora_" not in name)


def fitting(kind: str, parameters: int, lora: bool) -> Rate:
    """Return the rate for a kind of training (a key of ANCHORS) and a size, to one digit."""
    anchor, power = ANCHORS[kind]
    size = min(max(parameters, SMALL), LARGE)
    rate = min(HIGHEST, anchor * (LARGE / size) ** power * (10 if lora else 1))
    return Rate(rounded(rate), kind, parameters, lora)


def rounded(rate: float) -> float:
    """Round to one digit."""
    return float(f"{rate:.0e}") if math.isfinite(rate) else rate


def sentence(rate: Rate) -> str:
    """Say what was chosen and why."""
    how = " with LoRA" if rate.lora else ""
    return f"lr=auto is {rate.lr:g}: {WORDS[rate.kind]}{how}, {rate.parameters:,} parameters (lr=NUMBER sets another)"


# ---- a loss that stands still


SHARE = 0.1  # of the steps after which it is looked at
LEAST_ROWS = 6  # fewer would all fall by chance too often
STILL = 0.002  # a smaller share of the loss is no movement


def ready(trained: list[dict[str, Any]], total_steps: int) -> bool:
    """Tell whether training rows are enough to look at: six of them, and 10 % of the steps."""
    return len(trained) >= LEAST_ROWS and trained[-1]["step"] >= SHARE * total_steps


def still(losses: list[float]) -> bool:
    """Tell whether the losses' halves differ by no more than 0.2 %, or no more later losses are below (or above)
    earlier ones than chance explains: Kendall's rank test at two standard errors, which takes no fall for noise.
    """
    count, half = len(losses), len(losses) // 2
    first, second = (sum(part) / half for part in (losses[:half], losses[-half:]))
    signs = sum((later > earlier) - (later < earlier) for earlier, later in combinations(losses, 2))
    error = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return abs(second - first) <= STILL * abs(first) or abs(signs) <= 2 * error


def unmoved(rows: list[dict[str, Any]], total_steps: int, lr: float, kind: str, fits: float) -> str | None:
    """Return a warning with the rate to try if the training loss has not moved after 10 % of the steps.

    A policy gradient's loss says nothing of that kind: its mean is near zero by construction.
    """
    found = [row for row in rows if "loss/train" in row]
    if kind == "policy_gradient" or not ready(found, total_steps):
        return None
    losses = [float(row["loss/train"]) for row in found]
    if not still(losses):
        return None
    tried = fits if fits >= 3 * lr else rounded(3 * lr)
    return (
        f"warning: the loss has not moved after {found[-1]['step']} of {total_steps} steps ({losses[0]:.6g} -> "
        f"{losses[-1]:.6g}) with lr={lr:g}; try lr={tried:g}"
    )
