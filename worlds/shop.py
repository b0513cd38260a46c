"""The shop: a generated task world whose replies an exact verifier can judge, word by word.

    order : 9 figs , 5 kiwis , 8 apples , for ida , tone polite , reply :
    dear ida , 9 figs and 5 kiwis makes 14 , and 8 apples makes 22 . thank you !

A reply has to name the customer, keep the tone, copy three quantities and items, and give two running totals, so a
mistake sits on single words and credit per token matters. One word is one token. Demonstrations carry independent
flaws and are right about one time in eight; preference pairs are ordered by the verifier.

`python -m worlds.shop FOLDER --seed 1` writes the data; with `--tokenizer` it writes the tokenizer instead.
"""

import argparse
import json
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

QUANTITIES = range(1, 10)
ITEMS = ("apples", "figs", "kiwis", "limes", "melons", "pears", "plums", "dates")
NAMES = ("ada", "ben", "cora", "dan", "eva", "finn", "gus", "ida")
NO_NAME = "friend"  # what a flawed demonstration says instead of the customer's name
# Every opener is one word, so a one-layer student finds each slot of the reply at a fixed place.
OPENERS = {"polite": ("dear", "esteemed", "honoured"), "casual": ("hi", "hey", "greetings")}
CLOSERS = {
    "polite": ("thank you !", "kind regards .", "with respect ."),
    "casual": ("bye !", "see you soon !", "cheers !"),
}
VERBS = ("makes", "make")  # free variation that no check looks at
TONES = tuple(OPENERS)
CHECKS = ("grammar", "name", "tone", "items", "first_total", "second_total")

# How often a demonstration has each flaw; drawn independently of each other.
WRONG_NAME, WRONG_TONE, WRONG_ITEM, WRONG_TOTAL = 0.5, 0.35, 0.35, 0.25

SFT_TRAIN, SFT_TEST, PAIRS_TRAIN, PAIRS_TEST, PROMPTS_TEST = 8_000, 500, 4_000, 500, 1_000
DEMONSTRATIONS_PER_PAIR = 4

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"

# A prompt is its content and nothing else, so what the verifier reads is what the model reads. The end of turn is a
# token of its own, and never the padding.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ ' ' }}{% endif %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' <end>' }}{% endif %}"
    "{% endfor %}"
)


class Order(NamedTuple):
    """What the customer wants: three distinct (quantity, item), a name and a tone."""

    items: tuple[tuple[int, str], ...]
    name: str
    tone: str


class Reply(NamedTuple):
    """What a well-formed reply says."""

    opener: str
    name: str
    items: tuple[tuple[int, str], ...]
    totals: tuple[int, int]
    closer: str


def _any_of(options: Iterable[str]) -> str:
    """Return a regular expression group that matches one of the texts."""
    return "(" + "|".join(re.escape(option) for option in options) + ")"


_NUMBER = r"(\d{1,9})"  # what is longer is wrong, and Python reads no number of 5,000 digits
_PAIR = f"{_NUMBER} " + _any_of(ITEMS)
_VERB = f"(?:{'|'.join(VERBS)})"
PROMPT_PATTERN = re.compile(
    rf"order : {_PAIR} , {_PAIR} , {_PAIR} , for {_any_of(NAMES)} , tone {_any_of(TONES)} , reply :"
)
REPLY_PATTERN = re.compile(
    _any_of(sum(OPENERS.values(), ()))
    + f" {_any_of((*NAMES, NO_NAME))}"
    + rf" , {_PAIR} and {_PAIR} {_VERB} {_NUMBER} , and {_PAIR} {_VERB} {_NUMBER} \. "
    + _any_of(sum(CLOSERS.values(), ()))
)


# ---- prompts and replies


def prompt_text(order: Order) -> str:
    """Write the order as the prompt that the model gets."""
    wanted = " , ".join(f"{quantity} {item}" for quantity, item in order.items)
    return f"order : {wanted} , for {order.name} , tone {order.tone} , reply :"


def parse_prompt(prompt: str) -> Order:
    """Read a prompt back; ValueError where it is no order of this world."""
    match = PROMPT_PATTERN.fullmatch(" ".join(prompt.split()))
    if match is None:
        raise ValueError(f"not a prompt of worlds.shop: {prompt!r}; expected one like {prompt_text(EXAMPLE)!r}")
    q1, i1, q2, i2, q3, i3, name, tone = match.groups()
    return Order(((int(q1), i1), (int(q2), i2), (int(q3), i3)), name, tone)


def parse_reply(response: str) -> Reply | None:
    """Read a reply; None where it does not follow the grammar."""
    match = REPLY_PATTERN.fullmatch(" ".join(response.split()))
    if match is None:
        return None
    opener, name, q1, i1, q2, i2, first, q3, i3, second, closer = match.groups()
    items = ((int(q1), i1), (int(q2), i2), (int(q3), i3))
    return Reply(opener, name, items, (int(first), int(second)), closer)


def reply_text(reply: Reply, verbs: tuple[str, str] = ("makes", "makes")) -> str:
    """Write a reply in the world's grammar."""
    one, two, three = (f"{quantity} {item}" for quantity, item in reply.items)
    sums = f"{one} and {two} {verbs[0]} {reply.totals[0]} , and {three} {verbs[1]} {reply.totals[1]}"
    return f"{reply.opener} {reply.name} , {sums} . {reply.closer}"


def totals(order: Order) -> tuple[int, int]:
    """Return the running totals after the second and after the third item."""
    first, second, third = (quantity for quantity, _ in order.items)
    return first + second, first + second + third


EXAMPLE = Order(((9, "figs"), (5, "kiwis"), (8, "apples")), "ida", "polite")


# ---- the exact judge


def checks(prompt: str, response: str) -> dict[str, bool]:
    """Judge a reply: one verdict for each of CHECKS, all False where the grammar fails."""
    order, reply = parse_prompt(prompt), parse_reply(response)
    if reply is None:
        return dict.fromkeys(CHECKS, False)
    right = totals(order)
    return {
        "grammar": True,
        "name": reply.name == order.name,
        "tone": reply.opener in OPENERS[order.tone] and reply.closer in CLOSERS[order.tone],
        "items": reply.items == order.items,
        "first_total": reply.totals[0] == right[0],
        "second_total": reply.totals[1] == right[1],
    }


def check(prompt: str, response: str) -> float:
    """Return 1.0 where every check passes, else 0.0."""
    return float(all(checks(prompt, response).values()))


def share(prompt: str, response: str) -> float:
    """Return the share of CHECKS that pass: what orders a pair."""
    return sum(checks(prompt, response).values()) / len(CHECKS)


# ---- data


def draw_order(rng: random.Random) -> Order:
    """Draw an order."""
    items = tuple((rng.choice(QUANTITIES), item) for item in rng.sample(ITEMS, 3))
    return Order(items, rng.choice(NAMES), rng.choice(TONES))


def flawed_items(order: Order, rng: random.Random) -> tuple[tuple[int, str], ...]:
    """Return the items with one quantity off by one, or one item replaced by one that was not ordered."""
    items = list(order.items)
    place = rng.randrange(3)
    quantity, item = items[place]
    if rng.random() < 0.5:
        quantity += rng.choice((-1, 1)) if quantity > 1 else 1
    else:
        ordered = {name for _, name in order.items}
        item = rng.choice([name for name in ITEMS if name not in ordered])
    items[place] = (quantity, item)
    return tuple(items)


def demonstration(order: Order, rng: random.Random) -> str:
    """Write a reply with independent flaws."""
    tone = order.tone
    if rng.random() < WRONG_TONE:
        tone = TONES[1 - TONES.index(tone)]
    first, second = (total + rng.choice((-1, 1)) * (rng.random() < WRONG_TOTAL) for total in totals(order))
    reply = Reply(
        opener=rng.choice(OPENERS[tone]),
        name=NO_NAME if rng.random() < WRONG_NAME else order.name,
        items=flawed_items(order, rng) if rng.random() < WRONG_ITEM else order.items,
        totals=(first, second),
        closer=rng.choice(CLOSERS[tone]),
    )
    return reply_text(reply, (rng.choice(VERBS), rng.choice(VERBS)))


def draw_pair(order: Order, rng: random.Random) -> tuple[str, str]:
    """Return (chosen, rejected): the best of four demonstrations by the checks, and a strictly worse one."""
    prompt = prompt_text(order)
    while True:
        replies = [demonstration(order, rng) for _ in range(DEMONSTRATIONS_PER_PAIR)]
        passed = [sum(checks(prompt, reply).values()) for reply in replies]
        worse = [reply for reply, count in zip(replies, passed, strict=True) if count < max(passed)]
        if worse:
            return replies[passed.index(max(passed))], rng.choice(worse)


def _row(order: Order, **columns: Any) -> dict[str, Any]:
    """Return a data row with the order beside its columns, for the trainer to carry along as meta data."""
    meta = {"items": [list(pair) for pair in order.items], "name": order.name, "tone": order.tone}
    return {**columns, "order": meta}


def _turns(order: Order, reply: str | None = None) -> list[dict[str, str]]:
    """Return the messages of one exchange, the answer left out where there is none."""
    user = {"role": "user", "content": prompt_text(order)}
    return [user] if reply is None else [user, {"role": "assistant", "content": reply}]


def _sft_row(order: Order, rng: random.Random) -> dict[str, Any]:
    return _row(order, messages=_turns(order, demonstration(order, rng)))


def _pair_row(order: Order, rng: random.Random) -> dict[str, Any]:
    chosen, rejected = draw_pair(order, rng)
    return _row(order, chosen=_turns(order, chosen), rejected=_turns(order, rejected))


def _prompt_row(order: Order, rng: random.Random) -> dict[str, Any]:
    return _row(order, messages=_turns(order))


# Test files come first: a change to the number of training rows leaves the held-out prompts as they are.
FILES = (
    ("prompts_test.jsonl", PROMPTS_TEST, _prompt_row),
    ("pairs_test.jsonl", PAIRS_TEST, _pair_row),
    ("sft_test.jsonl", SFT_TEST, _sft_row),
    ("sft_train.jsonl", SFT_TRAIN, _sft_row),
    ("pairs_train.jsonl", PAIRS_TRAIN, _pair_row),
)


def generate(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every file of a seed; no prompt stands in two rows, of one file or of two."""
    rng = random.Random(f"worlds.shop {seed}")
    seen: set[Order] = set()

    def fresh() -> Order:
        while (order := draw_order(rng)) in seen:
            pass
        seen.add(order)
        return order

    return {name: [make(fresh(), rng) for _ in range(count)] for name, count, make in FILES}


# ---- knobs of the training data

FLIP_BLOCK = 50  # rows among which the share of flipped pairs is exact


class Knobs(NamedTuple):
    """What of the training pairs differs from the world as it is."""

    pairs: int = PAIRS_TRAIN  # the first so many
    flipped: float = 0.0  # share of them whose worse reply is called chosen
    extra_prompts: int | None = None  # prompts_train.jsonl: the pairs' prompts and so many more; None: no such file
    own_pairs: list[dict[str, Any]] | None = None  # pairs of task=label in the place of the demonstrations'


def is_flipped(seed: int, count: int, flipped: float) -> list[bool]:
    """Tell which of `count` rows are flipped: a fixed random subset.

    A row's place in it depends on the seed alone: fewer pairs are a prefix, and a higher share flips more rows, none
    fewer. In every block of FLIP_BLOCK rows the share is exact.
    """
    rng, found = random.Random(f"worlds.shop flips {seed}"), list[bool]()
    while len(found) < count:
        places = rng.sample(range(FLIP_BLOCK), FLIP_BLOCK)
        found += [place < round(flipped * FLIP_BLOCK) for place in places]
    return found[:count]


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """Return a pair the wrong way round."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {re.sub("^(chosen|rejected)", lambda side: other[side[0]], key): value for key, value in row.items()}


def turned_knobs(files: dict[str, list[dict[str, Any]]], seed: int, knobs: Knobs) -> dict[str, list[dict[str, Any]]]:
    """Return the files of `generate` with other training pairs; ValueError where there are not so many."""
    given = files["pairs_train.jsonl"] if knobs.own_pairs is None else knobs.own_pairs
    if knobs.pairs > len(given):
        raise ValueError(
            f"world.pairs={knobs.pairs}: there are {len(given)} pairs. Ask for at most so many, or sample more"
        )
    pairs = given[: knobs.pairs]
    flips = is_flipped(seed, len(pairs), knobs.flipped)
    result = {**files, "pairs_train.jsonl": [turned(row) if on else row for row, on in zip(pairs, flips, strict=True)]}
    if knobs.extra_prompts is not None:
        prompts = [(row.get("prompt") or row["chosen"])[0]["content"] for row in pairs]
        result["prompts_train.jsonl"] = [
            {"messages": [{"role": "user", "content": prompt}]}
            for prompt in [*prompts, *_more_prompts(files, seed, knobs.extra_prompts)]
        ]
    return result


def _more_prompts(files: dict[str, list[dict[str, Any]]], seed: int, count: int) -> list[str]:
    """Draw prompts that stand in no file; of fewer the same ones come first."""
    rng, found = random.Random(f"worlds.shop extra prompts {seed}"), list[str]()
    seen = {(row.get("messages") or row["chosen"])[0]["content"] for rows in files.values() for row in rows}
    while len(found) < count:
        prompt = prompt_text(draw_order(rng))
        if prompt not in seen:
            seen.add(prompt)
            found.append(prompt)
    return found


AS_IT_IS = Knobs()


def write(folder: Path, seed: int, knobs: Knobs = AS_IT_IS) -> None:
    """Write sft_{train,test}, pairs_{train,test} and prompts_test as .jsonl files, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in turned_knobs(generate(seed), seed, knobs).items():
        partial = folder / f"{name}.tmp"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, folder / name)


# ---- the tokenizer


def vocabulary() -> list[str]:
    """Return every word of the world, special tokens first; 80 in all."""
    fixed = [PAD, END, UNKNOWN, ":", ",", ".", "!", "order", "for", "tone", "reply", "and", *VERBS, *TONES]
    phrases = [phrase for group in (OPENERS, CLOSERS) for tone in TONES for phrase in group[tone]]
    words = [word for phrase in phrases for word in phrase.split()]
    everything = [*fixed, *ITEMS, *NAMES, NO_NAME, *words, *(str(number) for number in range(31))]
    return list(dict.fromkeys(everything))


def build_tokenizer(folder: Path) -> None:
    """Write the word-level tokenizer with its chat template as a Hugging Face folder."""
    # Here, because writing data needs neither package and starts at once without them.
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Without a decoder, words are joined by single spaces: decode(encode(text)) == text.
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
    parser = argparse.ArgumentParser(prog="python -m worlds.shop", description="Write the shop world's data.")
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other prompts and replies (default 1)")
    parser.add_argument("--tokenizer", action="store_true", help="write the tokenizer to the folder, not the data")
    options = parser.parse_args(arguments)
    if options.tokenizer:
        build_tokenizer(options.folder)
    else:
        write(options.folder, options.seed)
    print(f"worlds.shop: wrote {', '.join(sorted(path.name for path in options.folder.iterdir()))} to {options.folder}")


if __name__ == "__main__":
    main()
