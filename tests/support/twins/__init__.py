"""A slow twin of every loss: plain Python floats, sums over lists, no torch, each written from the formula.

A twin gets the trainer's config, the items, and two functions: p(model, previous token) -> probabilities of the next
one, for `policy` and `reference`. It returns the global mean loss.
"""

from collections.abc import Callable

from tests.support.twins.cached import adpa, ctpd, dadpo, dckd, pad, tvkd
from tests.support.twins.online import aligndistil, distillm2, gkd, grpo, online_adpa, opd, opsd, ppo, reward_weighted
from tests.support.twins.preference import (
    aot,
    bco,
    bradley_terry,
    discopop,
    dpo,
    exo,
    ipo,
    kl,
    kto,
    mpo,
    nca,
    orpo,
    paired,
    robust,
    smoothed,
    tail_risk,
    token_level,
)
from tests.support.twins.world import SIGMOID, World

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
