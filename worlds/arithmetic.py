"""Small word problems in GSM8K's form, from a seed: two steps with calculator marks, judged by worlds.gsm8k.

    question  Ida has 9 figs. Dan has 3 kiwis. Ben has 4 more figs than Ida. Each fig costs $5. How much do Ben's figs
    cost?
    answer    Ben has 9+4=<<9+4=13>>13 figs.
              That is 13*5=<<13*5=65>>65.
              #### 65

The calculator does the sums; what is to be learnt is which numbers and signs to write. Most questions have several
right solutions (a+b or b+a, other words), and half of them name a number that does not matter.

`python -m worlds.arithmetic FOLDER --seed 1` writes the data; with `--tokenizer` it writes the tokenizer instead.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import NamedTuple

ITEMS = {
    "apples": "apple",
    "figs": "fig",
    "kiwis": "kiwi",
    "limes": "lime",
    "melons": "melon",
    "pears": "pear",
    "plums": "plum",
    "dates": "date",
}
NAMES = ("Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gus", "Ida")
FIRST = ("more", "fewer", "times")  # how the second person's number follows from the first one's
SECOND = ("all", "buys", "gives", "costs", "bags")  # what is asked
DISTRACTED = 0.5  # share of questions with a number that does not matter

# Test questions are drawn first: another number of training rows leaves them as they are.
TEST, TRAIN, QUESTIONS_TRAIN = 1_000, 1_500, 2_000

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<end>' }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


class Problem(NamedTuple):
    """Two people, a thing, three numbers and two relations; a bystander whose number does not matter, or none."""

    names: tuple[str, str]
    item: str
    numbers: tuple[int, int, int]
    relations: tuple[str, str]
    bystander: tuple[str, str, int] | None


def middle(problem: Problem) -> int:
    """Return the second person's number."""
    a, k, _ = problem.numbers
    return {"more": a + k, "fewer": a - k, "times": a * k}[problem.relations[0]]


def result(problem: Problem) -> int:
    """Return the answer."""
    (a, _, c), b = problem.numbers, middle(problem)
    return {"all": a + b, "buys": b + c, "gives": b - c, "costs": b * c, "bags": b // c}[problem.relations[1]]


def draw(rng: random.Random) -> Problem:
    """Draw a problem whose numbers are all at least 1 and whose division leaves no rest."""
    while True:
        one, two, three = rng.sample(NAMES, 3)
        item, other = rng.sample(list(ITEMS), 2)
        first, second = rng.choice(FIRST), rng.choice(SECOND)
        numbers = (rng.randint(2, 20), rng.randint(2, 9), rng.randint(2, 9))
        bystander = (three, other, rng.randint(2, 30)) if rng.random() < DISTRACTED else None
        problem = Problem((one, two), item, numbers, (first, second), bystander)
        divides = second != "bags" or middle(problem) % numbers[2] == 0
        if middle(problem) >= 1 and result(problem) >= 1 and divides:
            return problem


def question(problem: Problem, rng: random.Random) -> str:
    """Write the problem; the bystander stands before or after the first person."""
    (one, two), item, (a, k, c) = problem.names, problem.item, problem.numbers
    facts = [f"{one} has {a} {item}."]
    if problem.bystander:
        name, other, number = problem.bystander
        facts.insert(rng.randrange(2), f"{name} has {number} {other}.")
    relation = {
        "more": f"{two} has {k} more {item} than {one}.",
        "fewer": f"{two} has {k} fewer {item} than {one}.",
        "times": f"{two} has {k} times as many {item} as {one}.",
    }[problem.relations[0]]
    asked = {
        "all": f"How many {item} do {one} and {two} have in all?",
        "buys": f"{two} buys {c} more. How many {item} does {two} have now?",
        "gives": f"{two} gives away {c}. How many {item} does {two} have now?",
        "costs": f"Each {ITEMS[item]} costs ${c}. How much do {two}'s {item} cost?",
        "bags": f"{two} puts {c} {item} in each bag. How many bags does {two} need?",
    }[problem.relations[1]]
    return " ".join([*facts, relation, asked])


def _either(one: int, sign: str, other: int, rng: random.Random) -> str:
    """Write a commutative expression in one of its two orders."""
    return f"{one}{sign}{other}" if rng.random() < 0.5 else f"{other}{sign}{one}"


def solution(problem: Problem, rng: random.Random) -> str:
    """Write one right solution, its words and orders drawn at random."""
    (_, two), item, (a, k, c) = problem.names, problem.item, problem.numbers
    b, last = middle(problem), result(problem)
    first = {
        "more": lambda: _either(a, "+", k, rng),
        "fewer": lambda: f"{a}-{k}",
        "times": lambda: _either(a, "*", k, rng),
    }
    second = {
        "all": lambda: _either(a, "+", b, rng),
        "buys": lambda: _either(b, "+", c, rng),
        "gives": lambda: f"{b}-{c}",
        "costs": lambda: _either(b, "*", c, rng),
        "bags": lambda: f"{b}/{c}",
    }
    one, other = first[problem.relations[0]](), second[problem.relations[1]]()
    opening = rng.choice((f"{two} has", f"First {two} has"))
    closing = rng.choice(("That is", "So it is"))
    return f"{opening} {one}=<<{one}={b}>>{b} {item}.\n{closing} {other}=<<{other}={last}>>{last}.\n#### {last}"


def generate(seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the rows of every file of a seed in GSM8K's columns; no question stands in two rows."""
    rng = random.Random(f"worlds.arithmetic {seed}")
    seen: set[str] = set()

    def row(solved: bool) -> dict[str, str]:
        while True:
            problem = draw(rng)
            text = question(problem, rng)
            if text not in seen:
                seen.add(text)
                return {"question": text, "answer": solution(problem, rng) if solved else f"#### {result(problem)}"}

    return {
        "test.jsonl": [row(True) for _ in range(TEST)],
        "train.jsonl": [row(True) for _ in range(TRAIN)],
        "questions_train.jsonl": [row(False) for _ in range(QUESTIONS_TRAIN)],
    }


def write(folder: Path, seed: int) -> None:
    """Write test.jsonl and train.jsonl (solved), and questions_train.jsonl (answers alone), each whole or not at
    all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in generate(seed).items():
        partial = folder / f"{name}.tmp"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, folder / name)


# ---- the tokenizer


def vocabulary() -> list[str]:
    """Return every piece of the world: special tokens, signs, digits, and words with and without a space before
    them.
    """
    fixed = [PAD, END, UNKNOWN, "<<", ">>", "####", *"0123456789 \n.,$=+-*/()?%'#<>"]
    text = (
        "has more than fewer times as many How much do does and have in all buys gives away now Each costs cost s "
        "puts each bag bags need First That is So it"
    )
    words = [*text.split(), *ITEMS, *ITEMS.values(), *NAMES]
    return list(dict.fromkeys([*fixed, *words, *(f" {word}" for word in words)]))


def build_tokenizer(folder: Path) -> None:
    """Write the tokenizer (a word with the space before it, a digit or a sign is a token) as a Hugging Face folder."""
    # Here, because writing data needs neither package and starts at once without them.
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {piece: index for index, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|<<|>>| ?[A-Za-z]+|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, END, UNKNOWN)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(str(folder))


def main(arguments: list[str] | None = None) -> None:
    """Write the data of a seed, or the tokenizer."""
    parser = argparse.ArgumentParser(prog="python -m worlds.arithmetic", description="Write small word problems.")
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other questions (default 1)")
    parser.add_argument("--tokenizer", action="store_true", help="write the tokenizer to the folder, not the data")
    options = parser.parse_args(arguments)
    if options.tokenizer:
        build_tokenizer(options.folder)
    else:
        write(options.folder, options.seed)
    print(
        f"worlds.arithmetic: wrote {', '.join(sorted(path.name for path in options.folder.iterdir()))} to "
        f"{options.folder}"
    )


if __name__ == "__main__":
    main()
