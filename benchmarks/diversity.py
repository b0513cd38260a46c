"""How varied the right replies of an evaluation of the shop world are: a collapse shows here before it does in success.

python -m benchmarks.diversity outputs/quickstart/evaluate

Entropy in nats of (opener, closer, both verbs) of the replies that pass every check, within each tone, weighted by
how often the tone is there; 3 openers, 3 closers and 2 verbs twice make at most 3.58. At the evaluation's main
temperature.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from worlds.shop import check, parse_prompt, parse_reply


def form_of(response: str) -> tuple[str, ...]:
    """Return what a right reply may vary in."""
    reply, words = parse_reply(response), response.split()
    assert reply is not None, "a right reply follows the grammar"
    return reply.opener, reply.closer, *(word for word in words if word in ("make", "makes"))


def diversity(replies: list[tuple[str, str]]) -> float:
    """Return the entropy in nats of the right ones among (prompt, response); 0 where none is right."""
    forms: dict[str, Counter[tuple[str, ...]]] = {}
    for prompt, response in replies:
        if check(prompt, response):
            forms.setdefault(parse_prompt(prompt).tone, Counter())[form_of(response)] += 1
    right = sum(counts.total() for counts in forms.values())
    return sum(
        -count / right * math.log(count / counts.total()) for counts in forms.values() for count in counts.values()
    )


def main() -> None:
    """Print each model's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diversity", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of task=evaluate with verifier worlds.shop:check")
    for file in sorted((parser.parse_args().folder / "alpaca_eval").glob("*.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))
        print(f"{file.stem}: {diversity([(row['instruction'], row['output']) for row in rows]):.2f}")


if __name__ == "__main__":
    main()
