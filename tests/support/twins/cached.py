"""Twins of the losses that read a teacher's cache."""

import math
from itertools import permutations

from tests.support.twins.world import LOG_SIGMOID, World, jsd


def dckd(world: World) -> float:
    config, sums, counts = world.config, [0.0, 0.0], [0, 0]
    for item in world.items:
        for slot, (sequence, entry) in enumerate(zip(item.sequences, item.entries, strict=True)):
            found = [
                *dckd_tokens(world, sequence, entry),
                *([] if entry.spans is None else dckd_spans(world, sequence, entry)),
            ]
            sums[slot] += sum(found)
            counts[slot] += len(found)
    return (
        config.sft_weight * world.nll()
        + config.chosen_weight * sums[0] / counts[0]
        + config.rejected_weight * sums[1] / counts[1]
    )


def bucket_kl(teacher: list[float], student: list[float]) -> float:
    pairs = zip([*teacher, 1 - sum(teacher)], [*student, 1 - sum(student)], strict=True)
    return sum(t * math.log(t / s) for t, s in pairs)


def dckd_tokens(world: World, sequence, entry) -> list[float]:
    """Return the divergence at each token that has entries."""
    found = []
    for place, ((before, _), ids, logps) in enumerate(zip(world.steps(sequence), entry.ids, entry.values, strict=True)):
        there = [(int(i), math.exp(float(x))) for i, x in zip(ids, logps, strict=True) if x > -math.inf]
        if not there:
            continue
        mine, theirs = merged(world, sequence, entry, place)
        p = [q * mine for q in world.p("policy", before)]
        if world.config.span_loss == "uld":
            top, other = sorted(p, reverse=True)[: len(there)], sorted((t for _, t in there), reverse=True)
            ranks = [*zip(top, other, strict=True), (mine - sum(top), theirs - sum(other))]
            found.append(sum(abs(s - t) for s, t in ranks))
        elif world.config.span_loss == "gold":
            config = world.config
            found.append(hybrid(there, p, config.hybrid_beta, config.hybrid_weights, mine, theirs))
        else:
            student, teacher = [p[i] for i, _ in there], [t for _, t in there]
            found.append(tempered_kl(world.config, teacher, student))
    return found


def merged(world: World, sequence, entry, place: int) -> tuple[float, float]:
    """Return what multiplies a token's distribution where it stands for a span of several: the probability of the
    others, of the student and of the teacher."""
    if world.config.span_merge == "none" or entry.spans is None or entry.spans[place] < 0:
        return 1.0, 1.0
    steps = [
        step
        for i, (step, span) in enumerate(zip(world.steps(sequence), entry.spans, strict=True))
        if span == entry.spans[place] and i != place
    ]
    own = math.prod(world.p("policy", before)[token] for before, token in steps)
    return own, math.exp(float(entry.span_logps[entry.spans[place]]))


def hybrid(
    there: list[tuple[int, float]], p: list[float], beta: float, weights: list[float], mine: float, other: float
) -> float:
    """Return GOLD's hybrid of one token, from the teacher's probabilities (an id below 0: not the student's) that sum
    to `other`, and the student's, that sum to `mine`."""
    both = {i: t for i, t in there if i >= 0}
    divergence = 0.0
    for i, t in both.items():
        mean = beta * t + (1 - beta) * p[i]
        divergence += beta * t * math.log(t / mean) + (1 - beta) * p[i] * math.log(p[i] / mean)
    theirs = sorted((t for i, t in there if i < 0), reverse=True)
    ours = sorted((q for i, q in enumerate(p) if i not in both), reverse=True)[: len(theirs)]
    ours += [0.0] * (len(theirs) - len(ours))
    rest = abs((other - sum(t for _, t in there)) - (mine - sum(p[i] for i in both) - sum(ours)))
    distance = sum(abs(s - t) for s, t in zip(ours, theirs, strict=True)) + rest
    return weights[0] * divergence + weights[1] * distance


def tempered_kl(config, teacher: list[float], student: list[float]) -> float:
    power, least, rest = 1 / config.teacher_temperature, min(teacher), 1 - sum(teacher)
    if config.tail == "renormalize":
        teacher, student = [t**power for t in teacher], [s / sum(student) for s in student]
        return sum(t / sum(teacher) * math.log(t / sum(teacher) / s) for t, s in zip(teacher, student, strict=True))
    # the rest as `rest / least` tokens of the least one's probability, or one token where it holds less
    rest = rest / least * least**power if rest > least else rest**power
    total = sum(t**power for t in teacher) + rest
    return bucket_kl([t**power / total for t in teacher], student)


def dckd_spans(world: World, sequence, entry) -> list[float]:
    """Return the divergence of each span of several tokens: that its text comes, or not."""
    if world.config.span_merge != "none":
        return []
    if world.config.span_loss == "uld":
        return [0.0] * len(entry.span_logps)
    found = []
    for number, logp in enumerate(entry.span_logps):
        inside = [step for step, span in zip(world.steps(sequence), entry.spans, strict=True) if span == number]
        student = math.prod(world.p("policy", before)[token] for before, token in inside)
        found.append(bucket_kl([math.exp(float(logp))], [student]))
    return found


def state_value(world: World, before: int, ids, logps) -> float:
    config = world.config
    if config.value == "logits":
        return config.shaping_weight * float(logps[0])
    teacher = [math.exp(float(x)) for x in logps]
    student = [world.p("policy", before)[int(i)] for i in ids]
    teacher, student = [*teacher, 1 - sum(teacher)], [*student, 1 - sum(student)]
    weight, other, sharp = config.shaping_weight, config.student_weight, config.value_temperature
    if config.value == "lse":
        total = sum((t**weight * s**other) ** (1 / sharp) for t, s in zip(teacher, student, strict=True))
        return sharp * math.log(total)
    top = sorted((weight * math.log(t) for t in teacher), reverse=True)
    entropy = -sum(s * math.log(s) for s in student)
    return {
        "max": top[0],
        "margin": top[0] - top[1],
        "student_entropy": entropy,
        "student_expectation": -entropy,
    }[config.value]


def tvkd(world: World) -> float:
    config, losses = world.config, []
    for item, pair in zip(world.items, world.pairs(), strict=True):
        scores = []
        for side, entry in zip((pair.w, pair.l), item.entries, strict=True):
            steps = world.steps(side)
            values = [
                state_value(world, before, *found)
                for (before, _), *found in zip(steps, entry.ids, entry.values, strict=True)
            ]
            later = values[1:]
            if config.form == "shaped":
                scores.append(config.beta * world.ratio(side) + config.discount * sum(later) - sum(values[:-1]))
            else:
                scores.append(world.logp("policy", side) - config.discount * sum(later))
        losses.append(-LOG_SIGMOID(scores[0] - scores[1]))
    return sum(losses) / len(losses) + config.nll_weight * world.nll()


def regularized(world: World, before: int, ids, advantages, teacher_logps) -> float:
    """By way of the optimum: tau T (log Z - KL(pi || pi*)), pi* normalized by hand."""
    config, rest_of = world.config, lambda p, least: max(1 - sum(p), least)
    advantages, teacher = [float(a) for a in advantages], [math.exp(float(x)) for x in teacher_logps]
    theirs = [min(t / math.exp(a), 1.0) for t, a in zip(teacher, advantages, strict=True)]
    kept = [0.0 if t < config.floor and a > 0 else a for t, a in zip(teacher, advantages, strict=True)]
    tails = math.log(rest_of(teacher, 1e-3) / rest_of(theirs, 1e-3))
    tails = 0.0 if rest_of(teacher, 1e-3) < config.floor and tails > 0 else tails
    kept.append(tails if config.rest_advantage == "tails" else 0.0)
    student = [world.p("policy", before)[int(i)] for i in ids]
    base, least = {"teacher": (teacher, 1e-3), "reference_teacher": (theirs, 1e-3), "start": (None, 0)}[
        config.kl_reference
    ]
    if base is None:
        base = [world.p("reference", before)[int(i)] for i in ids]
    base, student = [*base, rest_of(base, least)], [*student, 1 - sum(student)]
    power = 1 / config.target_temperature
    weights = [(b * math.exp(a / config.kl_weight)) ** power for b, a in zip(base, kept, strict=True)]
    divergence = sum(p * math.log(p * sum(weights) / w) for p, w in zip(student, weights, strict=True))
    return config.kl_weight / power * (math.log(sum(weights)) - divergence)


def adpa(world: World) -> float:
    config, total, count = world.config, 0.0, 0
    for item in world.items:
        entry = item.entries[1]
        for (before, _), *found in zip(
            world.steps(item.sequences[1]), entry.ids, entry.values, entry.teacher_logps, strict=True
        ):
            count += 1
            if config.is_regularized:
                total += regularized(world, before, *found)
            else:
                p, (ids, advantages, _) = world.p("policy", before), found
                total += sum(p[int(i)] * float(a) for i, a in zip(ids, advantages, strict=True))
    return config.sft_weight * world.nll() - config.gamma * total / count


def dadpo(world: World) -> float:
    config, losses = world.config, []
    for item, pair in zip(world.items, world.pairs(), strict=True):
        to_teacher = [
            world.logp("policy", side) - sum(float(row[0]) for row in entry.values)
            for side, entry in zip((pair.w, pair.l), item.entries, strict=True)
        ]
        rewards = [
            config.beta * u + config.teacher_weight * t for u, t in zip((pair.u, pair.v), to_teacher, strict=True)
        ]
        losses.append(-LOG_SIGMOID(rewards[0] - rewards[1]))
    return sum(losses) / len(losses) + config.nll_weight * world.nll()


def ctpd(world: World) -> float:
    config, losses = world.config, []
    for item in world.items:
        rewards = []
        for sign, side, entry in zip((1, -1), item.sequences, item.entries, strict=True):
            total = 0.0
            for (before, token), row in zip(world.steps(side), entry.values, strict=True):
                teacher, plus, minus = (math.exp(float(x)) for x in row)
                bounded = min(max(math.log(plus / minus), config.clamp_low), config.clamp_high)
                weight = config.weight_scale * math.exp(bounded) ** (sign * config.weight_exponent)
                total += weight * math.log(world.p("policy", before)[token] / teacher)
            rewards.append(config.beta * total)
        losses.append(-LOG_SIGMOID(rewards[0] - rewards[1]))
    return sum(losses) / len(losses) + config.nll_weight * world.nll()


def rankings(scores: list[float]) -> list[float]:
    found = []
    for order in permutations(scores):
        left, probability = list(order), 1.0
        for score in order:
            probability *= math.exp(score) / sum(math.exp(other) for other in left)
            left.remove(score)
        found.append(probability)
    return found


def pad(world: World) -> float:
    losses = []
    for item in world.items:
        own = [world.config.beta * world.mean(side, lambda s: world.logp("policy", s)) for side in item.sequences]
        theirs = [world.config.beta * float(entry.values.astype(float).mean()) for entry in item.entries]
        losses.append(jsd(rankings(own), rankings(theirs), 0.5))
    return sum(losses) / len(losses)
