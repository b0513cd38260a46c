"""generations.jsonl: what a student said, as rows to show and as sequences to compute with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from conversations import Conversation, Message, Row
from pipeline.digests import content_digest
from templates import tokenizer_digest
from tokens.columns import Sides
from tokens.encoding import check_ids
from tokens.examples import Example, Tokens
from tokens.sources import RowSource, num_rows, open_lines
from tokens.store import Record, Rows, pack
from tokens.writing import code_digest, store


class Generation(NamedTuple):
    """A row of generations.jsonl."""

    prompt_ids: list[int]
    response_ids: list[int]
    prompt: list[Message]
    response: str
    finish_reason: str
    meta: dict[str, Any]

    @property
    def tokens(self) -> Tokens:
        """Return the whole sequence with the generated part supervised."""
        return Tokens(
            self.prompt_ids + self.response_ids,
            [False] * len(self.prompt_ids) + [True] * len(self.response_ids),
        )


def read_generations(path: str | Path, tokenizer: Any | None) -> list[Generation]:
    """Read generations.jsonl; ValueError names the file and what is wrong with it.

    Ids of another tokenizer than the given one are refused. None takes them unseen: to show them, not to compute.
    Whoever computes with them takes generated_sequences, which holds no text.
    """
    source = _lines_of_generations(path)
    return list(_generations(source, range(source.size()), tokenizer))


def _lines_of_generations(path: str | Path) -> RowSource:
    path = Path(path).expanduser()
    if not path.is_file():
        inside = path / "generations.jsonl"
        hint = f"give the file in it, {inside}" if inside.is_file() else "task=generate writes generations.jsonl"
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no file'}: {hint}")
    source = open_lines(path)
    if not source.size():
        raise ValueError(f"{path} has no rows: task=generate writes one a response. Was it stopped before the first?")
    return source


def _generations(source: RowSource, numbers: Sequence[int], tokenizer: Any | None) -> Iterator[Generation]:
    own = tokenizer_digest(tokenizer) if tokenizer is not None else ""
    for number, row in zip(numbers, source.pick(numbers), strict=True):
        where = f"{source.place}, line {number + 1}"
        try:
            generation = Generation(
                row["prompt_ids"],
                row["response_ids"],
                row["prompt"],
                row["response"],
                row["finish_reason"],
                row.get("meta", {}),
            )
        except KeyError as error:
            raise ValueError(f"{where}: the row has no {error}; was it written by task=generate?") from error
        if tokenizer is not None:
            check_ids(row, where, tokenizer, own)
        yield generation


class GeneratedSequences(Sequence[Tokens]):
    """The sequences of a generations.jsonl in its order, read when they are asked for: no text is held."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.table.numbers)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...

    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = self.rows.example(range(len(self))[index], "").response
        assert found is not None, "every generation is stored with its sequence, an empty response included"
        return found

    def prompt_keys(self) -> np.ndarray:
        """Return the keys [n, 16] uint8 of the prompts: rows and generations of one prompt find each other by them."""
        return self.rows.table.prompts

    def sides(self) -> Sides:
        """Return what is known of the sequences, which stand where a row has its response."""
        table = self.rows.table
        return Sides(table.lengths[:, 1:], table.keys, table.supervised)


def generated_sequences(
    path: str | Path, tokenizer: Any, store_in: Path | None = None, num_proc: int | None = None
) -> GeneratedSequences:
    """Open generations.jsonl as sequences with the generated part supervised; ValueError as read_generations.

    They are kept below `store_in` as the tokens of data sets are (load_examples); without a place, in memory.
    """
    source = _lines_of_generations(path)
    assert source.place is not None

    def encode(wanted: Sequence[int]) -> Iterator[Record]:
        for number, found in zip(wanted, _generations(source, wanted, tokenizer), strict=True):
            example = Example(found.prompt_ids, None, None, found.tokens, NO_TEXT)
            yield Record(number, example, (), NO_TEXT)

    numbers = range(num_rows(source, store_in))
    if store_in is None:
        return GeneratedSequences(Rows(pack(list(encode(numbers)), as_json=False)))
    identity = {
        "generations": content_digest(source.place),
        "tokenizer": tokenizer_digest(tokenizer),
        "code": code_digest(),
    }
    return GeneratedSequences(store(store_in, identity, numbers, encode, num_proc))


NO_TEXT = Conversation([], None, None, None, {})


def pair_row(chosen: Row, rejected: Row) -> Row:
    """Return a preference pair with the sampled ids of both responses, which stand behind one prompt's ids."""
    assert chosen["prompt_ids"] == rejected["prompt_ids"], "the responses were sampled from two prompts"
    return {
        "prompt": chosen["prompt"],
        "prompt_ids": chosen["prompt_ids"],
        "chosen": chosen["response"],
        "chosen_ids": chosen["response_ids"],
        "rejected": rejected["response"],
        "rejected_ids": rejected["response_ids"],
        "tokenizer_digest": chosen["tokenizer_digest"],
        "meta": chosen.get("meta") or {},
    }
