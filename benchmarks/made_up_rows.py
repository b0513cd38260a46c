"""Rows that benchmarks make up: pairs of log-normal lengths. The standard library alone."""

import json
import math
import random
from pathlib import Path

WORDS = "ant bee cat dog elk fox gnu hen ibis jay kite lynx mole newt owl pig".split()


def write_mix(path: Path, count: int, prompt: float = 100, response: float = 200, spread: float = 0.8) -> None:
    """Write pairs whose texts have log-normal lengths in characters (medians `prompt` and `response`), which a byte
    tokenizer makes tokens.
    """
    rng = random.Random(0)

    def text(median: float) -> str:
        length = max(4, round(median * math.exp(rng.gauss(0, spread))))
        return " ".join(rng.choices(WORDS, k=length // 4 + 1))[:length].strip() or "ant"

    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = {"prompt": f"{number} {text(prompt)}", "chosen": text(response), "rejected": text(response)}
            out.write(json.dumps(row) + "\n")
