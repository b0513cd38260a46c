"""What is computed of every row of a table once and kept beside it: the row in another tokenizer's tokens, or a number.

It lies where token stores lie and is written, shared and mapped as they are (writing.py). Of a table that is in memory
alone it is computed at every start. Letters: R rows, C numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from conversations import Conversation
from tokens.examples import Example
from tokens.store import Record, Rows, pack
from tokens.writing import code_digest, store

Made = tuple[Example | None, Sequence[int]]  # the row in other tokens (None: it has none there), and its numbers
EMPTY = Conversation([], None, None, None, {})  # texts are not kept twice


def beside(
    rows: Rows,
    identity: Mapping[str, Any],
    make: Callable[[int], Made],
    nothing: Sequence[int],
    num_proc: int | None = None,
) -> Rows:
    """Return a table with what `make` gives of each row of `rows`, its numbers [R, C] as `counts`; `nothing`: those of
    a dropped row.

    identity: what beside the rows themselves decides it, code that is not of this room included.
    """

    def encode(numbers: Sequence[int]) -> Iterator[Record]:
        for number in numbers:
            example, counts = make(number) if rows.table.lengths[number, 0] >= 0 else (None, nothing)
            yield Record(number, example, counts, EMPTY)

    numbers = list(range(len(rows.table.lengths)))
    if rows.folder is None:
        return Rows(pack(list(encode(numbers)), as_json=False))
    whole = {"beside": rows.folder.name, **identity, "code": code_digest()}
    return store(rows.folder.parent, whole, numbers, encode, num_proc)
