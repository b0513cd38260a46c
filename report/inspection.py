"""Findings about the data that training would see: what is counted, how bad it is, and which are the worst.

A row is read once into `Facts` (ids become hashes of 64 bits, so that every finding is O(rows)); a finding is then a
pure function of those. Nothing here loads a model. How findings are ranked stands at `badness`.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from evaluation.intervals import NORMAL_975, Interval, proportion_interval

SHOWN = 5  # examples of a finding
WARNED = 3  # findings that a training run names at its start
FIRST_ROWS = 50_000  # a training run looks at so many of each split: a doctor must not delay a large one
# How bad it is for a row to be hit: it makes a result wrong, it wastes or bends training, it is worth a look.
WEIGHTS = {"high": 10.0, "middle": 3.0, "low": 1.0}
BIASED = 0.1  # of the area under the curve, away from 1/2: less is usual among human preferences


class Facts(NamedTuple):
    """What the findings need of a row. Hashes compare; lengths are tokens, one a sequence, in the order of its slots.

    `prompt` hashes the prompt's ids, or with its text at hand its roles and words. `missing_end` counts sequences that
    stop without the end of a turn though nothing was cut. `whole` are the lengths before anything was cut.
    """

    where: str
    prompt: int
    responses: tuple[int, ...]
    slots: tuple[str, ...]
    lengths: tuple[int, ...]
    supervised: tuple[int, ...]
    cut: int
    missing_end: int
    whole: tuple[int, ...] = ()
    shortened: bool = False
    oddities: tuple[str, ...] = ()
    excerpt: str = ""


class Finding(NamedTuple):
    """Something that was found in `number` of `total` `unit`, up to five of them with their place and their words."""

    name: str
    split: str
    severity: str  # high | middle | low: a key of WEIGHTS
    number: int
    total: int
    unit: str
    advice: str
    examples: list[tuple[str, str]]

    @property
    def share(self) -> float:
        """Return the share of what could be hit that is."""
        return self.number / max(1, self.total)

    @property
    def sentence(self) -> str:
        """Say it in one line."""
        return f"{self.split}: {self.name}: {self.number} of {self.total} {self.unit} ({100 * self.share:.1f} %)"


# ---- rows


def digest(ids: Sequence[int] | np.ndarray) -> int:
    """Hash token ids to 64 bits, whether they come as a list or as a view of an array."""
    return hash(np.asarray(ids, np.int32).tobytes())


def count_true(mask: Sequence[bool] | np.ndarray) -> int:
    """Count the supervised tokens of a mask."""
    return mask.count(True) if isinstance(mask, list) else int(np.count_nonzero(mask))


def facts_of(example: Any, end: int | None, max_length: int) -> Facts:
    """Read the ids of an example; `end` is the id that closes a turn. Its text is not looked at."""
    slots = [name for name in ("chosen", "rejected", "response") if getattr(example, name) is not None]
    lengths, supervised, responses = [], [], []
    cut = missing = 0
    start = len(example.prompt)
    for name in slots:
        tokens = getattr(example, name)
        ids, count = tokens.ids, len(tokens.ids)
        lengths.append(count)
        supervised.append(count_true(tokens.response))
        responses.append(digest(ids[start:]))
        if count and (end is None or int(ids[count - 1]) != end):
            cut += count >= max_length
            missing += count < max_length
    prompt = digest(example.prompt)
    return Facts(example.where, prompt, tuple(responses), tuple(slots), tuple(lengths), tuple(supervised), cut, missing)


def facts_of_stored(rows: Any, end: int | None, max_length: int) -> list[Facts]:
    """Return the same of the first rows of a token store (`Examples.stretch`); no example is made for it."""
    result, names = [], ("chosen", "rejected", "response")
    for where, prompt, sides, counts in rows.stretch(FIRST_ROWS):
        there = [k for k, ids in enumerate(sides) if ids is not None]
        lengths = tuple(len(sides[k]) for k in there)
        stops = [n for k, n in zip(there, lengths, strict=True) if n and (end is None or int(sides[k][-1]) != end)]
        cut = sum(n >= max_length for n in stops)
        responses = tuple(digest(sides[k][len(prompt) :]) for k in there)
        slots, supervised = tuple(names[k] for k in there), tuple(counts[k] for k in there)
        row = Facts(where, digest(prompt), responses, slots, lengths, supervised, cut, len(stops) - cut)
        result.append(row)
    return result


# ---- findings


def found(
    name: str,
    split: str,
    severity: str,
    hits: Sequence[tuple[str, str]],
    total: int,
    unit: str,
    advice: str,
    count: int | None = None,
) -> list[Finding]:
    """Return a finding in a list, or nothing where nothing was hit."""
    number = len(hits) if count is None else count
    return [Finding(name, split, severity, number, total, unit, advice, list(hits[:SHOWN]))] if number else []


def truncation(rows: Sequence[Facts], split: str, max_length: int) -> list[Finding]:
    """Find prompts that were shortened, responses that were cut, and responses without the end of a turn."""
    sequences = sum(len(row.lengths) for row in rows)
    cut = [(row.where, row.excerpt) for row in rows if row.cut]
    open_ended = [(row.where, row.excerpt) for row in rows if row.missing_end]
    shortened = [(row.where, row.excerpt) for row in rows if row.shortened]
    return [
        *found(
            "responses cut",
            split,
            "middle",
            cut,
            sequences,
            "responses",
            f"they are longer than model.max_length={max_length} allows and teach no end; raise it, or drop the rows",
            sum(row.cut for row in rows),
        ),
        *found(
            "prompts shortened",
            split,
            "middle",
            shortened,
            len(rows),
            "rows",
            "their oldest turns, or the left of the newest one, are gone; raise model.max_prompt_length",
        ),
        *found(
            "end of turn missing",
            split,
            "middle",
            open_ended,
            sequences,
            "responses",
            "they were not cut here and do not end with the end-of-turn token, so a model learns to go on; generations "
            "that ended for their length look so: raise generation.max_new_tokens, or drop them",
            sum(row.missing_end for row in rows),
        ),
    ]


def duplicates(rows: Sequence[Facts], split: str) -> list[Finding]:
    """Find rows that repeat another one, and rows that share their prompt with another one's other responses.

    A row that a weight above 1 takes again is one row.
    """
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    prompts: dict[int, str] = {}
    again, shared = [], []
    total = len({row.where for row in rows})
    counted: set[str] = set()
    for row in rows:
        if row.where in counted:
            continue
        counted.add(row.where)
        first, prompt = seen.get((row.prompt, row.responses)), prompts.get(row.prompt)
        if first is not None:
            again.append((f"{row.where} (as {first})", row.excerpt))
        elif prompt is not None and row.responses:
            shared.append((f"{row.where} (as {prompt})", row.excerpt))
        seen.setdefault((row.prompt, row.responses), row.where)
        prompts.setdefault(row.prompt, row.where)
    same = "the same prompt and response, again" if any(row.responses for row in rows) else "the same prompt, again"
    return [
        *found(same, split, "middle", again, total, "rows", "they count more than others; remove the copies"),
        *found(
            "a prompt with several responses",
            split,
            "low",
            shared,
            total,
            "rows",
            "as sampled data has them; without that intention prompts are repeated",
        ),
    ]


def equal_sides(rows: Sequence[Facts], split: str) -> list[Finding]:
    """Find pairs whose chosen and rejected responses are the same ids, as given or once they are cut."""
    pairs = [row for row in rows if row.slots[:2] == ("chosen", "rejected")]
    hits = [(row.where, row.excerpt) for row in pairs if row.responses[0] == row.responses[1]]
    advice = "there is nothing to prefer; remove them, or where they differ behind the cut raise model.max_length"
    return found("chosen equals rejected", split, "high", hits, len(pairs), "pairs", advice)


class LengthBias(NamedTuple):
    """How far length alone tells chosen from rejected: `auc` is P(chosen is longer), ties half, over pairs."""

    pairs: int
    longer: int
    shorter: int
    mean_difference: float  # supervised tokens, chosen minus rejected
    mean_ci95: Interval
    auc: float
    auc_ci95: Interval


def length_bias_of(rows: Sequence[Facts]) -> LengthBias | None:
    """Compare the supervised tokens of both sides; None without a pair. Intervals: normal, and Wilson's."""
    both = [row.supervised for row in rows if row.slots[:2] == ("chosen", "rejected")]
    if not both:
        return None
    gaps = np.array([chosen - rejected for chosen, rejected in both], dtype=np.float64)
    longer, shorter, number = int((gaps > 0).sum()), int((gaps < 0).sum()), len(gaps)
    half = NORMAL_975 * float(gaps.std(ddof=1)) / number**0.5 if number > 1 else float("inf")
    mean, wins = float(gaps.mean()), longer + (number - longer - shorter) / 2
    spread = (mean - half, mean + half) if number > 1 else (mean, mean)
    return LengthBias(number, longer, shorter, mean, spread, wins / number, proportion_interval(wins, number))


def length_bias(rows: Sequence[Facts], split: str) -> list[Finding]:
    """Find a preference that length alone explains: its area under the curve is 0.1 from 1/2 and its interval apart.

    The count is by how many pairs one direction outnumbers the other, so that the share is |2 AUC - 1|.
    """
    bias = length_bias_of(rows)
    if bias is None or abs(bias.auc - 0.5) < BIASED or bias.auc_ci95[0] <= 0.5 <= bias.auc_ci95[1]:
        return []
    side = "longer" if bias.auc > 0.5 else "shorter"
    low, high = bias.auc_ci95
    advice = (
        f"length alone tells the sides apart with an AUC of {bias.auc:.2f} [{low:.2f}, {high:.2f}] (chosen is "
        f"{bias.mean_difference:+.0f} tokens long on average): a model may learn length; compare with a "
        "length-normalized loss (loss=simpo), or balance the pairs"
    )
    sign = 1 if side == "longer" else -1
    rank = [(sign * (row.supervised[0] - row.supervised[1]), row) for row in rows if len(row.supervised) == 2]
    worst = sorted(rank, key=lambda item: -item[0])[:SHOWN]
    hits = [(row.where, f"chosen {row.supervised[0]}, rejected {row.supervised[1]} tokens") for _, row in worst]
    name = f"chosen is {side} more often than not"
    return found(name, split, "middle", hits, bias.pairs, "pairs", advice, abs(bias.longer - bias.shorter))


def leakage(train: Sequence[Facts], test: Sequence[Facts]) -> list[Finding]:
    """Find test rows whose prompt is trained on."""
    known: dict[int, str] = {}
    for row in train:
        known.setdefault(row.prompt, row.where)
    hits = [(f"{row.where} (as {known[row.prompt]})", row.excerpt) for row in test if row.prompt in known]
    advice = "a score on them says nothing about unseen prompts; remove them from the training rows"
    return found("prompts that are also trained on", "test", "high", hits, len(test), "rows", advice)


def id_findings(train: Sequence[Facts], test: Sequence[Facts], max_length: int) -> list[Finding]:
    """Return what ids show of both splits."""
    result = leakage(train, test)
    for split, rows in (("train", train), ("test", test)):
        result += truncation(rows, split, max_length) + duplicates(rows, split)
        result += equal_sides(rows, split) + length_bias(rows, split)
    return result


# ---- rank


def badness(finding: Finding) -> float:
    """Return WEIGHTS[severity] x share: how bad for a row that is hit, times how many are. Equal ones: by count."""
    return WEIGHTS[finding.severity] * finding.share


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Sort from the worst to the least."""
    return sorted(findings, key=lambda f: (-badness(f), -f.number, f.split, f.name))


def worst(findings: Iterable[Finding]) -> list[Finding]:
    """Return the three worst, each kind once (of train and test the worse); what is only worth a look warns nobody."""
    kinds: dict[str, Finding] = {}
    for finding in ranked(f for f in findings if f.severity != "low"):
        kinds.setdefault(finding.name, finding)
    return list(kinds.values())[:WARNED]


def warnings(train: Iterable[Any], test: Iterable[Any], end: int | None, max_length: int) -> list[str]:
    """Return the lines that a training run prints at its start: from ids alone, of each split's first 50,000 rows."""
    first, held_out = (
        facts_of_stored(part, end, max_length)
        if hasattr(part, "stretch")
        else [facts_of(e, end, max_length) for e in islice(part, FIRST_ROWS)]
        for part in (train, test)
    )
    lines = [
        f"warning: {f.sentence}: {f.advice}; first: {f.examples[0][0]}"
        for f in worst(id_findings(first, held_out, max_length))
    ]
    seen = f" (of the first {FIRST_ROWS} rows of each split)" if FIRST_ROWS in (len(first), len(held_out)) else ""
    return [*lines, f"all findings{seen}: the same command with task=inspect and another exp_name"] if lines else []
