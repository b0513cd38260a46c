"""Twins of the losses of pairs and of labels, and of a reward model's."""

import math
from collections.abc import Callable

from tests.support.twins.world import LOG_SIGMOID, SIGMOID, World


def paired(formula: Callable) -> Callable[[World], float]:
    """Average formula(pair, config) over pairs and add the NLL term."""

    def twin(world: World) -> float:
        losses = [formula(pair, world.config) for pair in world.pairs()]
        return sum(losses) / len(losses) + world.config.nll_weight * world.nll()

    return twin


def smoothed(delta: float, e: float) -> float:
    return -(1 - e) * LOG_SIGMOID(delta) - e * LOG_SIGMOID(-delta)


def dpo(pair, config) -> float:
    f = {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: -math.exp(-x),
        "alpha": lambda x: (1 - math.exp(x) ** -config.alpha) / config.alpha,
        "js": lambda x: x - math.log(1 + math.exp(x)),
    }[config.divergence]
    return smoothed(config.beta * (f(pair.u) - f(pair.v) - config.margin), config.label_smoothing)


def robust(pair, config) -> float:
    delta, e = config.beta * (pair.u - pair.v), config.label_smoothing
    return (-(1 - e) * LOG_SIGMOID(delta) + e * LOG_SIGMOID(-delta)) / (1 - 2 * e)


def ipo(world: World) -> float:
    losses = [
        (world.mean(p.w, world.ratio) - world.mean(p.l, world.ratio) - 0.5 / world.config.tau) ** 2
        for p in world.pairs()
    ]
    return sum(losses) / len(losses) + world.config.nll_weight * world.nll()


def exo(pair, config) -> float:
    q, e = SIGMOID(config.beta * (pair.u - pair.v)), config.label_smoothing
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def nca(pair, config) -> float:
    return (
        -LOG_SIGMOID(config.beta * pair.u)
        - (LOG_SIGMOID(-config.beta * pair.u) + LOG_SIGMOID(-config.beta * pair.v)) / 2
    )


def discopop(pair, config) -> float:
    delta = config.beta * (pair.u - pair.v)
    weight = SIGMOID(delta / config.temperature)
    return -(1 - weight) * LOG_SIGMOID(delta) + weight * math.exp(-delta)


def aot(world: World) -> float:
    config, pairs = world.config, world.pairs()
    if config.variant == "paired":
        a, b = sorted(p.c - p.r for p in pairs), sorted((p.c - p.r) - (p.u - p.v) for p in pairs)
    else:
        a, b = sorted(p.u for p in pairs), sorted(p.v for p in pairs)
    losses = [smoothed(config.beta * (x - y), config.label_smoothing) for x, y in zip(a, b, strict=True)]
    return sum(losses) / len(losses) + config.nll_weight * world.nll()


def bco(world: World) -> float:
    beta, pairs = world.config.beta, world.pairs()
    shift = sum(beta * (p.u + p.v) for p in pairs) / (2 * len(pairs))
    losses = [-LOG_SIGMOID(beta * p.u - shift) - LOG_SIGMOID(-(beta * p.v - shift)) for p in pairs]
    return sum(losses) / len(losses) + world.config.nll_weight * world.nll()


def mpo(world: World) -> float:
    config, pairs = world.config, world.pairs()
    preference = sum(-LOG_SIGMOID(config.beta * (p.u - p.v)) for p in pairs) / len(pairs)
    quality = bco(world) - config.nll_weight * world.nll()
    return config.preference_weight * preference + config.quality_weight * quality + config.nll_weight * world.nll()


def orpo(pair, config) -> float:
    odds = [math.exp(m) / (1 - math.exp(m)) for m in (pair.mc, pair.mr)]
    return -config.beta * LOG_SIGMOID(math.log(odds[0] / odds[1]))


def tail_risk(world: World, before: int) -> float:
    """CVaR by taking the vocabulary in the order of z until the level's mass is full; or the published form."""
    config, policy, reference = world.config, world.p("policy", before), world.p("reference", before)
    rows = sorted(((math.log(p0 / p), p0) for p, p0 in zip(policy, reference, strict=True)), reverse=True)
    if config.risk == "paper":
        left, total = config.confidence_level, 0.0
        for z, mass in rows:
            taken = min(mass, left)
            total, left = total + taken * z, left - taken
        return total / config.confidence_level
    z_values = sorted(z for z, _ in rows)
    position = (1 - config.confidence_level) * (len(z_values) - 1)
    low = int(position)
    quantile = z_values[low] + (position - low) * (z_values[min(low + 1, len(z_values) - 1)] - z_values[low])
    return sum(mass * z for z, mass in rows if z > quantile)


def token_level(divergence: Callable[[World, int], float]) -> Callable[[World], float]:
    def twin(world: World) -> float:
        config, losses = world.config, []
        for pair in world.pairs():
            chosen, rejected = (
                sum(divergence(world, before) for before, _ in world.steps(s)) for s in (pair.w, pair.l)
            )
            d = (rejected - chosen) * (1 if config.variant == 1 else config.alpha)  # the stop-gradient changes no value
            losses.append(-LOG_SIGMOID(config.beta * (pair.u - pair.v - d)))
        return sum(losses) / len(losses) + config.nll_weight * world.nll()

    return twin


def kl(world: World, before: int) -> float:
    return sum(
        p0 * math.log(p0 / p) for p, p0 in zip(world.p("policy", before), world.p("reference", before), strict=True)
    )


def kto(world: World) -> float:
    config, losses, point = world.config, [], 0.0
    if not config.zero_reference_point:
        point = max(0.0, sum(world.ratio(item.scored[0]) for item in world.items) / len(world.items))
    for item in world.items:
        gain = config.beta * (world.ratio(item.sequences[0]) - point)
        weight, value = (config.desirable_weight, gain) if item.label > 0 else (config.undesirable_weight, -gain)
        losses.append(weight * (1 - SIGMOID(value)))
    return sum(losses) / len(losses)


def bradley_terry(world: World) -> float:
    config, losses = world.config, []
    for item in world.items:
        good, bad = (world.tables["policy"][s.ids[-1]][0] for s in item.sequences)
        losses.append(-LOG_SIGMOID(good - bad - config.margin) + config.center_weight * (good + bad) ** 2)
    return sum(losses) / len(losses)
