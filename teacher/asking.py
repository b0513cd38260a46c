"""What the rows of a run ask of their teachers, known before the first step without making a row.

Whether a teacher has a sequence is found by its key. What that needs and the token store lacks, the rows in another
tokenizer's tokens or the column that names a teacher, is computed once and kept beside it (tokens/beside.py).
Letters: n rows, R rows of one table.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np

from dataloader import Example, Examples
from models import tokenizer_digest
from settings.paths import ROOT
from teacher.several import CachedTeachers, Wanted
from teacher.spans import check_shares, compared_tokens, covered
from tokens.beside import Made, beside
from tokens.columns import Sides, sides_of
from tokens.encoding import encode_example
from tokens.examples import Tokens
from tokens.store import Record, Rows, StoredTokens, pack

PAIR = ("chosen", "rejected")
SAMPLE = 64  # rows whose entries are read before the first step, to say how much of the responses is compared


class AskedRows:
    """What each row asks of whom; ValueError names a row whose teacher is not there.

    theirs: the rows in the teacher's tokens, where its tokenizer is another one. who [n]: which of the readers a row
    asks; None where all are asked.
    """

    def __init__(self, teachers: CachedTeachers, examples: Sequence[Example], num_proc: int | None = None) -> None:
        self.teachers, self.examples, self.names = teachers, examples, tuple(teachers.readers)
        self.who: np.ndarray | None = None
        self.theirs: Examples | None = None
        column = teachers.config.teacher_column
        if column is not None:
            named = besides(
                examples, {"column": column, "names": list(self.names)}, _names(column, self.names), [-1], num_proc
            )
            self.who = named.counts().reshape(len(self))  # of no rows it has no second axis
            if (self.who < 0).any():
                raise ValueError(self._unknown(int(np.argmax(self.who < 0)), column))
        if teachers.between is not None:
            self.theirs = besides(examples, _identity(teachers), _translated(teachers), [0, 0], num_proc)

    def __len__(self) -> int:
        return len(self.examples)

    def _unknown(self, row: int, column: str) -> str:
        example = self.examples[row]
        return (
            f"{example.where}: the row's column {column!r} (loss.teacher_column) says "
            f"{example.conversation.meta.get(column)!r}, and loss.teacher_cache has {', '.join(self.names)}. Name one "
            "of them in every row"
        )

    # ---- by keys alone

    @cached_property
    def _asked(self) -> Sides:
        """The sides of the rows in the tokens that the teachers are asked in."""
        return sides_of(self.examples if self.theirs is None else self.theirs)

    def lacking(self) -> np.ndarray:
        """Return which responses [n, 2] are asked of a teacher that has them not."""
        keys, there = self._asked.keys[:, :2], self._asked.lengths[:, :2] >= 0
        lacks = np.zeros(there.shape, np.bool_)
        for number, name in enumerate(self.names):
            rows = slice(None) if self.who is None else np.flatnonzero(self.who == number)
            own = keys[rows]
            held = self.teachers.readers[name].held(own.reshape(-1, own.shape[-1])).reshape(own.shape[:2])
            lacks[rows] |= ~held
        return lacks & there

    def coverage(self, lacking: np.ndarray) -> float:
        """Return the share of the responses that every teacher asked for them has."""
        there = self._asked.lengths[:, :2] >= 0
        return 1.0 - float(lacking.sum()) / max(1, int(there.sum()))

    def identity(self) -> Callable[[int], bytes]:
        """Return what gives, of each row, what tells its teachers' entries from those of others."""
        if self.who is None:
            everyone = self.teachers.identity()
            return lambda _: everyone
        known, who = [self.teachers.identity([name]) for name in self.names], self.who
        return lambda row: known[who[row]]

    # ---- of a row

    def wanted(self, row: int, example: Example | None = None) -> tuple[Wanted, ...]:
        """Return what a row's responses ask of whom; `example`: the row, where it is made already."""
        names = self.names if self.who is None else (self.names[self.who[row]],)
        example = example or self.examples[row]
        own = [getattr(example, side) for side in PAIR]
        if self.theirs is None:
            return tuple(Wanted(tokens, tokens, names, None) for tokens in own)
        other = self.theirs[row]
        return tuple(
            self._translated(tokens, getattr(other, side), names) for tokens, side in zip(own, PAIR, strict=True)
        )

    def _translated(self, own: Tokens, other: Tokens | None, names: tuple[str, ...]) -> Wanted:
        return Wanted(own, other, names, None if other is None else self.teachers.aligned(own, other))

    # ---- how much of the responses is compared

    def report(self) -> str:
        """Say which share of the response tokens is in aligned spans; ValueError below loss.min_coverage."""
        assert self.theirs is not None
        covering = self.theirs.counts().reshape(len(self), 2)
        counts = np.stack([covering, sides_of(self.examples).supervised[:, :2]], axis=-1).reshape(-1, 2)

        def response(number: int) -> Any:
            asked = self.wanted(number // 2)[number % 2]
            return asked.aligned or self.teachers.aligned(asked.tokens, None)

        share = check_shares(counts, self.teachers.config.min_coverage, response)
        rows = range(0, len(self), -(-len(self) // SAMPLE) or 1)
        asked = [one for row in rows for one in self.wanted(row)]
        compared = sum(compared_tokens(self.teachers.entry(one)) for one in asked)
        tokens = sum(one.tokens.num_supervised for one in asked)
        which = "" if len(rows) == len(self) else f" in a sample of {len(rows)} rows"
        return (
            f"alignment by bytes: {share:.1%} of {int(counts[:, 1].sum())} response tokens are in aligned spans, "
            f"{compared / max(1, tokens):.1%} are compared{which} (of the others the teacher's top k says nothing)"
        )


# ---- what is kept beside the rows


def besides(
    examples: Sequence[Example],
    identity: Mapping[str, Any],
    maker: Callable[[Rows, str], Callable[[int], Made]],
    nothing: Sequence[int],
    num_proc: int | None,
) -> Examples:
    """Return, in the order of the mix, what `maker` computes of every row of each table, given that and its source;
    rows of a list that lies in no table are laid into one.
    """
    if not isinstance(examples, Examples):
        table = pack([Record(i, e, (), e.conversation) for i, e in enumerate(examples)], as_json=False)
        count = len(examples)
        examples = Examples([Rows(table)], [""], np.zeros(count, np.int32), np.arange(count))
    tables = [
        beside(rows, identity, maker(rows, source), nothing, num_proc)
        for rows, source in zip(examples.tables, examples.sources, strict=True)
    ]
    return Examples(tables, examples.sources, examples.parts, examples.places)


def _names(column: str, names: tuple[str, ...]) -> Callable[[Rows, str], Callable[[int], Made]]:
    """Give of each row the number of the teacher that its column names; -1 where it names none."""
    numbers: dict[object, int] = {name: i for i, name in enumerate(names)}

    def number(rows: Rows, row: int) -> int:
        said = rows.conversation(row).meta.get(column)
        return numbers.get(said, -1) if isinstance(said, str) else -1

    return lambda rows, _: lambda row: (None, [number(rows, row)])


def _translated(teachers: CachedTeachers) -> Callable[[Rows, str], Callable[[int], Made]]:
    """Give each row in the teacher's tokens, and how many tokens of either response are in aligned spans.

    Text that spells a special token is read as the row's data set says: so the teacher's cache has it, too.
    """

    def made(rows: Rows, special: str, row: int) -> Made:
        told = rows.conversation(row)
        found = encode_example(teachers.tokenizer, told, teachers.model, "last", Counter(), special)
        if found is None:
            return None, [0, 0]
        counts = []
        for number, side in enumerate(PAIR):
            other = getattr(found, side)
            own = None if other is None else teachers.aligned(StoredTokens(rows, row, number), other)
            counts.append(0 if own is None else covered(own.spans))
        return found, counts

    def of(rows: Rows, source: str) -> Callable[[int], Made]:
        return lambda row: made(rows, teachers.special_tokens.get(source, "keep"), row)

    return of


def _identity(teachers: CachedTeachers) -> dict[str, Any]:
    """Return what decides the rows in the teacher's tokens, beside the rows."""
    model = teachers.model
    limits = {"max_length": model.max_length, "max_prompt_length": model.max_prompt_length}
    return {"aligned_with": tokenizer_digest(teachers.tokenizer), **limits, "alignment": _alignment_digest()}


@cache
def _alignment_digest() -> str:
    """Hash the code that finds spans."""
    files = [ROOT / "teacher" / f"{name}.py" for name in ("alignment", "asking", "spans", "vocabulary")]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
