"""A slow twin of every loss: plain Python floats, sums over lists, no torch, each written from the formula.

A twin gets the trainer's config, the items, and two functions: p(model, previous token) -> probabilities of the next
one, for `policy` and `reference`. It returns the global mean loss.
"""

import math
from collections.abc import Callable
from itertools import permutations
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


def jsd(student: list[float], teacher: list[float], beta: float) -> float:
    """KLs by hand; the ends are the limits that the divergence is named after."""
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))  # noqa: E731
    if beta in (0, 1):
        return kl(teacher, student) if beta == 0 else kl(student, teacher)
    mixture = [beta * t + (1 - beta) * s for s, t in zip(student, teacher, strict=True)]
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def tempered(p: list[float], temperature: float) -> list[float]:
    powers = [x ** (1 / temperature) for x in p]
    return [x / sum(powers) for x in powers]


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


def jsd_parts(student: list[float], teacher: list[float], beta: float) -> list[float]:
    if beta in (0, 1):
        first, second = (teacher, student) if beta == 0 else (student, teacher)
        return [a * math.log(a / b) for a, b in zip(first, second, strict=True)]
    mixed = [beta * t + (1 - beta) * s for s, t in zip(student, teacher, strict=True)]
    return [
        beta * t * math.log(t / m) + (1 - beta) * s * math.log(s / m)
        for s, t, m in zip(student, teacher, mixed, strict=True)
    ]


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


TWINS: dict[str, Callable[[World], float]] = {
    "sft": World.nll,
    "csft": World.nll,
    "dckd": dckd,
    "adpa": adpa,
    "tvkd": tvkd,
    "dadpo": dadpo,
    "ctpd": ctpd,
    "pad": pad,
    "aligndistil": aligndistil,
    "opsd": opsd,
    "online-adpa": online_adpa,
    "dpo": paired(dpo),
    "cdpo": paired(dpo),
    "robust-dpo": paired(robust),
    "ipo": ipo,
    "exo": paired(exo),
    "nca": paired(nca),
    "discopop": paired(discopop),
    "hinge": paired(lambda p, c: max(0.0, 1 - c.beta * (p.u - p.v))),
    "aot": aot,
    "bco": bco,
    "mpo": mpo,
    "sppo-hard": paired(lambda p, c: (p.u - 0.5 / c.beta) ** 2 + (p.v + 0.5 / c.beta) ** 2),
    "apo-zero": paired(lambda p, c: 1 - SIGMOID(c.beta * p.u) + SIGMOID(c.beta * p.v)),
    "apo-down": paired(lambda p, c: SIGMOID(c.beta * p.u) + 1 - SIGMOID(c.beta * (p.u - p.v))),
    "slic": paired(lambda p, c: max(0.0, c.beta - p.c + p.r)),
    "simpo": paired(lambda p, c: smoothed(c.beta * (p.mc - p.mr) - c.gamma, c.label_smoothing)),
    "cpo": paired(lambda p, c: smoothed(c.beta * (p.c - p.r), c.label_smoothing)),
    "orpo": paired(orpo),
    "tdpo": token_level(kl),
    "ra-dpo": token_level(tail_risk),
    "kto": kto,
    "kto-zero": kto,
    "bradley-terry": bradley_terry,
    "ppo": ppo,
    "grpo": grpo,
    "opd": opd,
    "iw-opd": opd,
    "gopd": opd,
    "distillm2": distillm2,
    "gkd": gkd,
    "reward-weighted-distill": reward_weighted,
}
