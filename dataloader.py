"""From rows to token ids to batches.

Letters: B rows, T tokens of a padded row, N response tokens of a whole batch (flat, row after row), K teacher entries.
A sequence is tokenized once (tokens/encoding.py) and kept (tokens/store.py).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from torch import Tensor

from conversations import Conversation, format_of, to_conversation
from forward.rows import Sequences as Sequences  # beside load_examples, for those who import the data loader
from forward.rows import collate as collate
from forward.rows import unsupervised as unsupervised
from pipeline.digests import content_digest
from settings.artifacts import is_done
from settings.schema import DatasetConfig, ModelConfig
from settings.terminal import clean
from templates import tokenizer_digest
from tokens.columns import Prompts, Sides
from tokens.counted import COUNTED, DROPPED, MARKS, REASON, concerns, oddities_of
from tokens.encoding import check_ids, encode_example, take_ids
from tokens.encoding import encode_prompt as encode_prompt  # beside load_examples, for those who import the data loader
from tokens.examples import Example
from tokens.examples import Tokens as Tokens
from tokens.sources import RowSource, num_rows, open_rows
from tokens.store import NotStorable, Record, Rows, Table, digest_of, pack
from tokens.writing import code_digest, store


class TopK(NamedTuple):
    """A teacher's entries, flat over the response tokens of a batch: ids [N, K] int64, values [N, K] float32.

    `teacher_logps` [N, K] comes with advantages only: the aligned teacher's log-probabilities at the same ids.
    `spans` [N] and `span_logps` [M] come from a teacher with another tokenizer only: which of the batch's M spans of
    several tokens a token is in (-1: none), and the teacher's log-probability of each.
    """

    ids: Tensor
    values: Tensor
    teacher_logps: Tensor | None = None
    spans: Tensor | None = None
    span_logps: Tensor | None = None


# ---- data sets


class Source(NamedTuple):
    """A split of a data set, opened, and what decides how its rows become tokens."""

    name: str  # as the config writes it
    dataset: str  # the name of its data set
    rows: RowSource
    format: str
    supervise: str
    on_error: str
    special_tokens: str


class Drawn(NamedTuple):
    """The rows of a source that a run uses, by number, in the order of the mix; a weight may repeat them."""

    source: Source
    numbers: np.ndarray
    total: int  # rows in the source


class Examples(Sequence[Example]):
    """The rows of a mix that keep a supervised token, made when they are asked for.

    parts [n]: which source a row is of; places [n]: its row in that source's table.
    """

    def __init__(self, tables: list[Rows], sources: list[str], parts: np.ndarray, places: np.ndarray) -> None:
        self.tables, self.sources, self.parts, self.places = tables, sources, parts, places

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, place = self.parts[index], self.places[index]
        table = self.tables[part]
        return table.example(place, f"{self.sources[part]}, row {table.table.numbers[place] + 1}")

    def sides(self) -> Sides:
        """Return lengths and keys of every row's sides; no row is made."""
        lengths = self._taken(lambda table: table.lengths[:, 1:])
        return Sides(lengths, self._taken(lambda table: table.keys), self._taken(lambda table: table.supervised))

    def prompts(self) -> Prompts:
        """Return lengths and keys of every row's prompt; no row is made."""
        return Prompts(self._taken(lambda table: table.lengths[:, 0]), self._taken(lambda table: table.prompts))

    def numbers(self) -> np.ndarray:
        """Return label and reward [n, 2] of every row, nan where it has no such number; no row is made."""
        return self._taken(lambda table: table.figures)

    def counts(self) -> np.ndarray:
        """Return what was counted [n, C] of every row; no row is made."""
        return self._taken(lambda table: table.counts)

    def part(self, row: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask of a side of a row (-1: its prompt) as views; no row is made."""
        return self.tables[self.parts[row]].part(self.places[row], side + 1)

    def _taken(self, of: Callable[[Table], np.ndarray]) -> np.ndarray:
        """Lay an array of every table in the order of the mix."""
        found = [of(rows.table) for rows in self.tables]
        result = np.empty((len(self), *found[0].shape[1:]), found[0].dtype)
        for part, array in enumerate(found):
            own = np.flatnonzero(self.parts == part)
            result[own] = array[self.places[own]]
        return result

    def stretch(self, count: int) -> Iterator[tuple[str, np.ndarray, list[np.ndarray | None], list[int]]]:
        """Give place, prompt ids, the ids of each side (None: there is none) and how many are supervised, of the first
        `count` rows: as views, without an example.
        """
        for part, place in zip(self.parts[:count].tolist(), self.places[:count].tolist(), strict=True):
            rows = self.tables[part]
            starts, lengths = rows.starts[place].tolist(), rows.table.lengths[place].tolist()
            ids = [rows.table.ids[a : a + n] if n >= 0 else None for a, n in zip(starts, lengths, strict=True)]
            where = f"{self.sources[part]}, row {rows.table.numbers[place] + 1}"
            assert ids[0] is not None, "a dropped row is not among the examples"
            yield where, ids[0], ids[1:], rows.table.supervised[place].tolist()


def load_examples(
    datasets: Mapping[str, DatasetConfig],
    split: str,
    tokenizer: Any,
    model: ModelConfig,
    limit: int | None = None,
    seed: int = 0,
    store_in: Path | None = None,
    num_proc: int | None = None,
) -> Sequence[Example]:
    """Read, tokenize and mix the `split` of every data set; what was dropped or cut is counted and printed.

    Weights mix the train split. `limit` keeps the first rows of a shuffle by `seed`. Tokens of files and folders are
    kept below `store_in`, written by `num_proc` processes (None: as many as large data keeps busy); without a place,
    and of hub data sets, they stay in memory. Raises ValueError for a missing source, a bad row, or if no row keeps a
    supervised token.
    """
    if not datasets:
        raise ValueError("no data: add datasets=[NAME], e.g. datasets=[local] datasets.local.train=my.jsonl")
    drawn: list[Drawn] = []
    for name, config in datasets.items():
        source = getattr(config, split)
        if source is None:
            if split == "test":
                continue
            raise ValueError(f"datasets.{name}.{split} is not set: give a file, a folder or hub_name:split")
        rows = open_rows(source, f"datasets.{name}.{split}")
        count = num_rows(rows, store_in)
        if not count:
            raise ValueError(f"datasets.{name}.{split}={source} has no rows")
        numbers = np.asarray(drawn_rows(count, config, split, seed, name), np.int64)
        read = (config.format, config.supervise, config.on_error, config.special_tokens)
        drawn.append(Drawn(Source(source, name, rows, *read), numbers, count))
    drawn = limited(drawn, limit, seed)
    tables = [_table(part, tokenizer, model, store_in, num_proc) for part in drawn]
    return _mixed(drawn, tables, split, model)


def drawn_rows(count: int, config: DatasetConfig, split: str, seed: int, name: str) -> list[int]:
    """Return which of a data set's `count` rows are used, by number: all of the test split, each once.

    Of the train split round(weight x count), whole repeats first and the rest drawn by `seed`; none is a ValueError.
    """
    if split != "train":  # a repeated row would narrow the intervals of an evaluation
        return list(range(count))
    repeats, rest = divmod(round(config.weight * count), count)
    if not repeats and not rest:
        raise ValueError(
            f"datasets.{name}.weight={config.weight:g} takes none of {count} rows: give at least {1 / count:.2g}, or "
            f"leave {name} out of datasets="
        )
    order = np.random.default_rng(seed).permutation(count) if config.weight % 1 else np.arange(count)
    return list(range(count)) * repeats + sorted(order[:rest].tolist())


def limited(drawn: list[Drawn], limit: int | None, seed: int) -> list[Drawn]:
    """Keep the first `limit` rows of a shuffle of all by `seed`, in their order."""
    total = sum(len(part.numbers) for part in drawn)
    if limit is None or limit >= total:
        return drawn
    kept = np.sort(np.random.default_rng(seed).permutation(total)[:limit])
    found, start = [], 0
    for part in drawn:
        stop = start + len(part.numbers)
        own = kept[(kept >= start) & (kept < stop)] - start
        found.append(part._replace(numbers=part.numbers[own]))
        start = stop
    return [part for part in found if len(part.numbers)]


def _table(drawn: Drawn, tokenizer: Any, model: ModelConfig, store_in: Path | None, num_proc: int | None) -> Rows:
    """Return the tokenized rows of a source: all that are used, each once."""
    source, own = drawn.source, tokenizer_digest(tokenizer)
    numbers = np.unique(drawn.numbers)

    def encode(wanted: Sequence[int]) -> Iterator[Record]:
        return _encoded(source, wanted, tokenizer, model, own)

    if store_in is not None and source.rows.place is not None:
        whole = len(numbers) == drawn.total
        identity = {
            "content": content_digest(source.rows.place),
            "rows": "all" if whole else hashlib.sha256(numbers.tobytes()).hexdigest(),
            "tokenizer": own,
            "max_length": model.max_length,
            "max_prompt_length": model.max_prompt_length,
            "format": source.format,
            "supervise": source.supervise,
            "on_error": source.on_error,
            "special_tokens": source.special_tokens,
            "code": code_digest(),
        }
        every = store_in / digest_of(identity | {"rows": "all"})
        if not whole and is_done(every):  # a run on all rows came before
            identity, numbers = identity | {"rows": "all"}, np.arange(drawn.total)
        try:
            return store(store_in, identity, numbers.tolist(), encode, num_proc)
        except NotStorable as error:
            print(f"{source.name}: tokenized at every start, its rows cannot be kept as JSON ({error})", flush=True)
    return Rows(pack(list(encode(numbers.tolist())), as_json=False))


def _encoded(source: Source, numbers: Sequence[int], tokenizer: Any, model: ModelConfig, own: str) -> Iterator[Record]:
    """Tokenize the rows of these numbers. `own`: the tokenizer's digest."""
    fmt = format_of(source.format, source.rows.first(), source.name)
    for number, row in zip(numbers, source.rows.tried(numbers), strict=True):
        where, counts = f"{source.name}, row {number + 1}", Counter[str]()
        try:
            if isinstance(row, ValueError):
                raise row
            example, conversation = _example(row, fmt, where, source, tokenizer, model, own, counts)
        except ValueError as error:
            if fmt == "generation":  # ids that mean something else are no bad row
                raise
            if source.on_error == "refuse":
                way_out = f"To go on without such rows: datasets.{source.dataset}.on_error=drop"
                raise ValueError(f"{error}. {way_out}") from error
            counts, example = Counter({DROPPED: 1}), None
            conversation = Conversation([{"role": "user", "content": ""}], None, None, None, {REASON: str(error)})
        yield Record(number, example, [counts[what] for what in COUNTED], conversation)


def _example(
    row: dict[str, Any],
    fmt: str,
    where: str,
    source: Source,
    tokenizer: Any,
    model: ModelConfig,
    own: str,
    counts: Counter[str],
) -> tuple[Example | None, Conversation]:
    """Tokenize a row; ValueError with its place where it cannot be read."""
    conversation = to_conversation(row, fmt, where)
    if fmt == "generation":
        check_ids(row, where, tokenizer, own)
        return take_ids(row, conversation, model, counts), conversation
    counts.update(oddities_of(conversation))
    try:
        return encode_example(
            tokenizer, conversation, model, source.supervise, counts, source.special_tokens
        ), conversation
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _mixed(drawn: list[Drawn], tables: list[Rows], split: str, model: ModelConfig) -> Sequence[Example]:
    """Lay the used rows of all sources in the order of the mix, print what was cut, and leave out what was dropped."""
    counts, parts, places, forged = np.zeros(len(COUNTED), np.int64), [], [], 0
    for i, (part, rows) in enumerate(zip(drawn, tables, strict=True)):
        place = np.searchsorted(rows.table.numbers, part.numbers)
        own = rows.table.counts[place].sum(axis=0, dtype=np.int64)
        counts += own
        forged += int(own[COUNTED.index(MARKS)]) if part.source.special_tokens == "keep" else 0
        parts.append(np.full(len(place), i, np.int32))
        places.append(place)
    names = [part.source.name for part in drawn]
    if not drawn:
        return []
    every = Examples(tables, names, np.concatenate(parts), np.concatenate(places))
    keeps = np.concatenate([rows.table.lengths[p, 0] >= 0 for rows, p in zip(tables, places, strict=True)])
    examples = Examples(tables, names, every.parts[keeps], every.places[keeps])
    dropped = np.flatnonzero(~keeps)
    report = ", ".join(f"{n} {what}" for what, n in zip(COUNTED, counts, strict=True) if n)
    if len(dropped):
        first = every[dropped[0]]
        report += f"; the first one dropped: {clean(first.conversation.meta.get(REASON, first.where))}"
    print(f"{split}: {len(examples)} of {len(every)} rows" + (f" ({report})" if report else ""), flush=True)
    for line in concerns(counts, forged, len(every), split, model):
        print(line, flush=True)
    if not len(examples):
        conversation = every[dropped[0]].conversation
        response = conversation.chosen or conversation.response or [{"content": ""}]
        raise ValueError(
            f"no {split} row keeps a supervised token ({report}). Its prompt ends with "
            f"{conversation.prompt[-1]['content'][-60:]!r} and its response begins with "
            f"{response[0]['content'][:60]!r}. Are the responses empty, or is model.max_length={model.max_length} too "
            f"short for prompts of up to {model.max_prompt_length} tokens?"
        )
    return examples


# ---- order


@lru_cache(maxsize=2)  # asked at every step
def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch, a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()
