"""What a twin sees: the items, the config and next-token probabilities as plain lists; and what many formulas share."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

LOG_SIGMOID = lambda x: -math.log(1 + math.exp(-x))  # noqa: E731
SIGMOID = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731


class World:
    """What a twin sees."""

    def __init__(self, config: Any, items: list, policy: list, reference: list, teachers: list = ()) -> None:
        self.config, self.items = config, items
        self.tables = {
            "policy": policy,
            "reference": reference,
            **{f"teacher {i}": table for i, table in enumerate(teachers)},
        }

    def p(self, model: str, previous: int) -> list[float]:
        weights = [math.exp(x) for x in self.tables[model][previous]]
        return [w / sum(weights) for w in weights]

    def steps(self, sequence) -> list[tuple[int, int]]:
        """Return (previous token, token) of the supervised ones."""
        return [(sequence.ids[t - 1], sequence.ids[t]) for t in range(len(sequence.ids)) if sequence.response[t]]

    def logp(self, model: str, sequence) -> float:
        return sum(math.log(self.p(model, before)[token]) for before, token in self.steps(sequence))

    def ratio(self, sequence, shared: int = 99) -> float:
        bounds = (
            (self.config.log_epsilon_P, self.config.log_epsilon_R)
            if getattr(self.config, "humanline", False)
            else (-9e9, 9e9)
        )
        parts = [math.log(self.p("policy", b)[t] / self.p("reference", b)[t]) for b, t in self.steps(sequence)]
        parts = [min(max(part, bounds[0]), bounds[1]) for part in parts]
        return sum(parts[:shared]) + getattr(self.config, "ld_alpha", 1.0) * sum(parts[shared:])

    def mean(self, sequence, value: Callable) -> float:
        return value(sequence) / len(self.steps(sequence))

    def nll(self, slot: int = 0) -> float:
        tokens = sum(len(self.steps(item.sequences[slot])) for item in self.items)
        return -sum(self.logp("policy", item.sequences[slot]) for item in self.items) / tokens

    def pairs(self) -> list[SimpleNamespace]:
        found = []
        for item in self.items:
            w, l = item.sequences  # noqa: E741
            shared = min(len(self.steps(w)), len(self.steps(l)))
            pair = SimpleNamespace(
                w=w,
                l=l,
                u=self.ratio(w, shared),
                v=self.ratio(l, shared),
                c=self.logp("policy", w),
                r=self.logp("policy", l),
            )
            pair.rc, pair.rr = self.logp("reference", w), self.logp("reference", l)
            pair.mc, pair.mr = pair.c / len(self.steps(w)), pair.r / len(self.steps(l))
            found.append(pair)
        return found


def tempered(p: list[float], temperature: float) -> list[float]:
    powers = [x ** (1 / temperature) for x in p]
    return [x / sum(powers) for x in powers]


def jsd_parts(student: list[float], teacher: list[float], beta: float) -> list[float]:
    """Return each token's part; the ends are the limits that the divergence is named after."""
    if beta in (0, 1):
        first, second = (teacher, student) if beta == 0 else (student, teacher)
        return [a * math.log(a / b) for a, b in zip(first, second, strict=True)]
    mixed = [beta * t + (1 - beta) * s for s, t in zip(student, teacher, strict=True)]
    return [
        beta * t * math.log(t / m) + (1 - beta) * s * math.log(s / m)
        for s, t, m in zip(student, teacher, mixed, strict=True)
    ]


def jsd(student: list[float], teacher: list[float], beta: float) -> float:
    return sum(jsd_parts(student, teacher, beta))
