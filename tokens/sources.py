"""Rows from files, folders and the hub, as they are: conversations.py reads what they say.

A source is a local JSONL/JSON/Parquet file, a folder of such files or one written by `datasets.save_to_disk`, or
`hub_name:split` (`hub_name#config:split` where it has several).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from conversations import Row
from pipeline.digests import content_digest
from settings.artifacts import parsed_row, write_json
from settings.paths import found, hint_for

ROWS_AT_ONCE = 1000  # of a table of `datasets` turned into Python objects


class RowSource(NamedTuple):
    """Rows that are read when they are asked for. place: the file or folder, None for a hub data set.

    size: counts the rows. tried: yields the rows of ascending numbers; of one that cannot be parsed the error.
    """

    place: Path | None
    size: Callable[[], int]
    tried: Callable[[Sequence[int]], Iterator[Row | ValueError]]

    def pick(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of ascending numbers; ValueError at the first that cannot be parsed."""
        for row in self.tried(numbers):
            if isinstance(row, ValueError):
                raise row
            yield row

    def first(self) -> Row:
        """Return the first row that can be parsed, which tells the format; ValueError of the first one without any."""
        found = next(self.tried([0]))
        if isinstance(found, ValueError):
            whole = (row for row in self.tried(range(self.size())) if not isinstance(row, ValueError))
            found = next(whole, found)
        if isinstance(found, ValueError):
            raise found
        return found


def read_rows(source: str, key: str = "datasets") -> list[Row]:
    """Return the rows of a local file, a saved `datasets` folder, or `hub_name:split`. `key` is for messages."""
    rows = open_rows(source, key)
    return list(rows.pick(range(rows.size())))


def open_rows(source: str, key: str = "datasets") -> RowSource:
    """Find a local file, a folder, or `hub_name:split`, without reading all of it. `key` is for messages.

    A folder is one of `datasets.save_to_disk`, or holds .parquet or .jsonl files, which are read in the order of their
    names.
    """
    path = found(source) or Path(source).expanduser()
    if path.suffix in (".jsonl", ".ndjson"):
        return _from_lines(_existing(path, key), [path])
    if path.suffix == ".json":
        listed = cache(lambda: _json_list(_existing(path, key)))
        return RowSource(_existing(path, key), lambda: len(listed()), lambda numbers: (listed()[i] for i in numbers))
    if path.suffix == ".parquet":
        return _from_arrow(_existing(path, key), lambda: _parquet([path]))
    if path.is_dir():
        for suffix in (".parquet", ".jsonl"):
            files = sorted(file for file in path.glob(f"*{suffix}") if not file.name.startswith("."))
            if files and not (path / "state.json").is_file():
                return _from_lines(path, files) if suffix == ".jsonl" else _from_arrow(path, lambda: _parquet(files))  # noqa: B023
        return _from_arrow(path, lambda: _saved(path, key, source))
    if ":" not in source:
        raise ValueError(f"{key}={source}: no such file or folder; a hub data set is written hub_name:split")
    return _from_arrow(None, lambda: _hub(source, key))


def open_lines(path: Path) -> RowSource:
    """Open a JSONL file, whatever its name ends in."""
    return _from_lines(path, [path])


def _from_lines(place: Path, files: list[Path]) -> RowSource:
    """Open JSONL files: a line is parsed where its row is asked for."""

    def count() -> int:
        total = 0
        for file in files:
            total += sum(bool(line.strip()) for line in _lines(file))
        return total

    def _tried(numbers: Sequence[int]) -> Iterator[Row | ValueError]:
        wanted, row = iter(numbers), -1
        number = next(wanted, -1)
        for file in files:
            for place, line in enumerate(_lines(file), 1):
                if number < 0:
                    return
                row += bool(line.strip())
                if row == number and line.strip():
                    try:
                        found: Row | ValueError = parsed_row(line, file, place)
                    except ValueError as error:
                        found = error
                    yield found
                    number = next(wanted, -1)

    return RowSource(place, count, _tried)


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file; ValueError names the one that is not UTF-8."""
    try:
        with file.open(encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError:
        with file.open("rb") as raw:
            for number, line in enumerate(raw, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{file}, line {number}: not UTF-8 text ({error}): convert the file, e.g. with iconv -f latin1 "
                        "-t utf-8"
                    ) from error
        raise


def _json_list(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a .json source must be a list of objects; for one object a line use .jsonl")
    return rows


def _from_arrow(place: Path | None, load: Callable[[], Any]) -> RowSource:
    """Open a table of `datasets`, which maps its files into memory; loaded when it is first asked."""
    load = cache(load)

    def pick(numbers: Sequence[int]) -> Iterator[Row]:
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            yield from load().select(numbers[start : start + ROWS_AT_ONCE]).to_list()

    return RowSource(place, lambda: len(load()), pick)


def _parquet(files: list[Path]) -> Any:
    import datasets  # heavy, and needless for JSON files

    try:
        return datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=None)
    except Exception as error:  # the library's own kinds
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ValueError(
            f"{files[0]}{more}: cannot be read as one table of Parquet ({str(error.__cause__ or error).strip():.200}). "
            "Have all files the same columns of the same types, and are they there whole (git lfs pull)?"
        ) from error


def _saved(path: Path, key: str, source: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(
            f"{key}={source}: the folder was not written by datasets.save_to_disk, and holds no .parquet or .jsonl "
            f"files ({error})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"{key}={source} holds several splits ({', '.join(loaded)}): name the folder of one")
    return loaded


def _hub(source: str, key: str) -> Any:
    import datasets

    hub, split = source.rsplit(":", 1)
    name, _, config = hub.partition("#")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        raise ValueError(
            f"{key}={source}: could not be had from the hub ({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Point {key} at a local copy, e.g. {key}=my.jsonl"
        ) from error


def check_source(source: str, key: str) -> None:
    """Refuse a file that is not there, without reading it; folders and hub names are looked at when they are read."""
    path = found(source) or Path(source).expanduser()
    if path.suffix in (".jsonl", ".ndjson", ".json", ".parquet"):
        _existing(path, key)


def _existing(path: Path, key: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{key}={path}: no such file; {hint_for(path)}")
    return path


def num_rows(rows: RowSource, store_in: Path | None) -> int:
    """Count the rows of a source; what a file of this content holds is noted beside the stores."""
    if store_in is None or rows.place is None:
        return rows.size()
    note = store_in / f"rows-{content_digest(rows.place)[:16]}.json"
    if not note.is_file():
        store_in.mkdir(parents=True, exist_ok=True)
        write_json(note, {"rows": rows.size()})
    return json.loads(note.read_text(encoding="utf-8"))["rows"]
