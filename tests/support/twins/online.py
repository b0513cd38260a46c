"""Twins of the losses that ask a live teacher or learn from responses of the policy."""

import math

from tests.support.twins.world import World, jsd, jsd_parts, tempered


def clipped(log_ratio: float, advantage: float, clip: float) -> float:
    ratio = math.exp(log_ratio)
    return -min(advantage * ratio, advantage * min(max(ratio, 1 - clip), 1 + clip))


def notes(world: World) -> list[list[tuple]]:
    """Return for each response, for each token, (log pi, the token before, its notes)."""
    return [
        [
            (math.log(world.p("policy", before)[token]), before, [float(x) for x in row])
            for (before, token), row in zip(world.steps(item.sequences[0]), item.notes, strict=True)
        ]
        for item in world.items
    ]


def ppo(world: World) -> float:
    config, losses = world.config, []
    for logp, before, (old, _, old_value, target, advantage) in (
        token for response in notes(world) for token in response
    ):
        drift = logp - old
        if config.humanline:
            drift = min(max(drift, config.log_epsilon_P), config.log_epsilon_R)
        value = world.tables["policy"][before][1]
        errors = [(value - target) ** 2]
        if config.value_clip is not None:
            errors.append((min(max(value, old_value - config.value_clip), old_value + config.value_clip) - target) ** 2)
        losses.append(
            clipped(drift, advantage, config.clip) + config.drift_weight * drift + config.value_weight * max(errors) / 2
        )
    return sum(losses) / len(losses)


def grpo(world: World) -> float:
    config, responses = world.config, []
    for response in notes(world):
        losses = []
        for logp, _, (old, base, advantage) in response:
            drift = logp - old
            if config.humanline:
                drift = min(max(drift, config.log_epsilon_P), config.log_epsilon_R)
            losses.append(
                clipped(drift, advantage, config.clip) + config.beta * (math.exp(base - logp) - (base - logp) - 1)
            )
        responses.append(losses)
    if config.reduction == "token_mean":
        return sum(map(sum, responses)) / sum(map(len, responses))
    return sum(sum(losses) / len(losses) for losses in responses) / len(responses)


def opd(world: World) -> float:
    losses = [
        clipped(logp - old, advantage, world.config.clip)
        for response in notes(world)
        for logp, _, (old, advantage) in response
    ]
    return sum(losses) / len(losses)


def mixture_of(world: World, before) -> list[float]:
    """Return the weighted mean of the teachers' probabilities, or their weighted geometric mean."""
    config = world.config
    count = len(config.teacher) if isinstance(config.teacher, (list, dict)) else 1
    given = config.teacher_weights or [1] * count
    columns = zip(*(world.p(f"teacher {i}", before) for i in range(count)), strict=True)
    weights = [weight / sum(given) for weight in given]
    if config.mixture == "probabilities":
        return [sum(w * p for w, p in zip(weights, column, strict=True)) for column in columns]
    powers = [math.prod(p**w for w, p in zip(weights, column, strict=True)) for column in columns]
    return [power / sum(powers) for power in powers]


def gkd(world: World) -> float:
    config, losses = world.config, []
    for item in world.items:
        for before, _ in world.steps(item.sequences[0]):
            student = tempered(world.p("policy", before), config.temperature)
            teacher = tempered(mixture_of(world, before), config.temperature * config.teacher_temperature)
            losses.append(jsd(student, teacher, config.beta))
    return sum(losses) / len(losses)


def distillm2(world: World) -> float:
    config, total = world.config, 0.0
    for slot, weight in ((0, config.teacher_weight), (1, config.student_weight)):
        found = []
        for item in world.items:
            for before, _ in world.steps(item.sequences[slot]):
                first, second = world.p("teacher 0", before), world.p("policy", before)
                first, second = (first, second) if slot == 0 else (second, first)
                pairs = [(a, config.alpha * a + (1 - config.alpha) * b) for a, b in zip(first, second, strict=True)]
                found.append(sum(a * math.log(a / m) for a, m in pairs))
        total += weight * sum(found) / len(found)
    return total


def aligndistil(world: World) -> float:
    config, losses = world.config, []
    for item in world.items:
        for before, _ in world.steps(item.sequences[0]):
            student, plus, minus = (world.p(name, before) for name in ("policy", "teacher 0", "teacher 1"))
            alpha = config.extrapolation
            if config.adaptive:
                alpha = alpha * sum(abs(a - b) for a, b in zip(plus, minus, strict=True)) + 1e-3
            powers = [a ** (1 + alpha) * b**-alpha for a, b in zip(plus, minus, strict=True)]
            target = tempered([x / sum(powers) for x in powers], config.target_temperature)
            kl_to = sum(s * math.log(s / t) for s, t in zip(student, target, strict=True))
            losses.append(config.beta / alpha * kl_to)
    return sum(losses) / len(losses)


def online_adpa(world: World) -> float:
    """By way of the optimum: tau T (log Z - KL(pi || pi*)), pi* normalized by hand."""
    config, found = world.config, []
    tau, sharp = config.kl_weight, config.target_temperature
    for item in world.items:
        for before, _ in world.steps(item.sequences[0]):
            own, dpo, ref = (world.p(name, before) for name in ("policy", "teacher 0", "teacher 1"))
            base = {"teacher": dpo, "reference_teacher": ref}.get(config.kl_reference) or world.p("reference", before)
            gains = [
                d / r if d >= config.advantage_floor or d <= r else 1.0 for d, r in zip(dpo, ref, strict=True)
            ]  # exp(A)
            wanted = [(b * gain ** (1 / tau)) ** (1 / sharp) for b, gain in zip(base, gains, strict=True)]
            z = sum(wanted)
            to_optimum = sum(p * math.log(p * z / w) for p, w in zip(own, wanted, strict=True))
            found.append(tau * sharp * (math.log(z) - to_optimum))
    return -sum(found) / len(found)


def opsd(world: World) -> float:
    config, losses = world.config, []
    for item in world.items:
        seen = zip(world.steps(item.sequences[0]), world.steps(item.scored[0]), strict=True)
        for (before, _), (theirs, _) in seen:
            student = tempered(world.p("policy", before), config.temperature)
            teacher = tempered(world.p("reference", theirs), config.temperature)
            most = 9e9 if config.clip is None else config.clip
            losses.append(sum(min(part, most) for part in jsd_parts(student, teacher, config.beta)))
    return sum(losses) / len(losses)


def reward_weighted(world: World) -> float:
    config, total = world.config, 0.0
    weights = [math.exp(item.label / config.reward_temperature) for item in world.items]
    beta = {"forward": 0, "reverse": 1, "jsd": 0.5}[config.divergence]
    for item, weight in zip(world.items, weights, strict=True):
        value = -config.nll_weight * world.mean(item.sequences[0], lambda s: world.logp("policy", s))
        for before, _ in world.steps(item.sequences[0]):
            if config.kl_weight:
                teachers = [world.p(f"teacher {i}", before) for i in range(len(config.teachers))]
                mixed = [sum(column) / len(teachers) for column in zip(*teachers, strict=True)]
                value += (
                    config.kl_weight * jsd(world.p("policy", before), mixed, beta) / len(world.steps(item.sequences[0]))
                )
        total += weight * value
    return total / sum(weights)
