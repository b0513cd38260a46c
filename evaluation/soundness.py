"""Whether an evaluation's data can be believed: prompts that stand twice, and held-out prompts that were trained on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conversations import Conversation, find_format, key_of, to_conversation
from evaluation.lineage import runs_behind
from evaluation.metrics import at
from settings.artifacts import read_jsonl

MOST_ROWS = 200_000  # of one file: a report is not worth more of a minute


class Overlap(NamedTuple):
    """A training file, its rows that were read, and how many held-out prompts stand in it; problem: why it was not."""

    file: str
    rows: int
    held_out: int
    problem: str = ""


def training_files(folder: str) -> list[Path]:
    """Return the rows on this machine that a model, and the models that it came from, were trained on."""
    files = []
    for _, config in runs_behind(folder):
        for source in (config.get("datasets") or {}).values():
            path = Path(str((source or {}).get("train") or "")).expanduser()
            files += [path] if path.is_file() and path.suffix == ".jsonl" else []
    return list(dict.fromkeys(files))


def overlap_of(file: Path, keys: set[str]) -> Overlap:
    """Count the held-out prompts, by roles and words, that a training file has, too."""
    found, rows = set(), 0
    try:
        for number, row in enumerate(read_jsonl(file), 1):
            if number > MOST_ROWS:
                break
            rows += 1
            key = key_of(to_conversation(row, find_format(row, str(file)), f"{file}, row {number}").prompt)
            found |= {key} & keys
    except ValueError as error:
        return Overlap(str(file), rows, len(found), str(error).splitlines()[0])
    return Overlap(str(file), rows, len(found))


def data_cells(models: Mapping[str, Mapping[str, Any]], held_out: Sequence[Conversation]) -> list[list[str]]:
    """Return held-out prompts found in the training files of the models as rows of cells; empty without such a file."""
    keys = {key_of(conversation.prompt) for conversation in held_out}
    files = {name: training_files(entry["folder"]) for name, entry in models.items()}
    every = {file: overlap_of(file, keys) for found in files.values() for file in found}
    rows = [
        [str(file), ", ".join(name for name in files if file in files[name]), f"{one.rows:,}", str(one.held_out)]
        + [one.problem or ("held out prompts were trained on" if one.held_out else "none")]
        for file, one in every.items()
    ]
    return [["training rows", "of", "read", "held-out prompts in them", "finding"], *rows] if rows else []


def findings(results: Mapping[str, Any], held_out: Sequence[Conversation], cells: Sequence[Sequence[str]]) -> list[str]:
    """Say what makes the scores less sure than their intervals; the good news, too, where something was looked at."""
    counts = Counter(key_of(conversation.prompt) for conversation in held_out)
    twice = sum(count - 1 for count in counts.values())
    said = [
        f"{len(held_out)} held-out prompts" + (f", {twice} of which repeat another one." if twice else ", each once.")
    ]
    shared = max((int(row[3]) for row in cells[1:]), default=None)
    if shared:
        said.append(f"{shared} of them stand in rows that a model was trained on: no held-out scores there.")
    elif shared == 0:
        said.append("None of them stands in the training rows on this machine.")
    for name, entry in results["models"].items():
        cut = at(entry, "eot_rate")
        if cut is not None and cut < 0.9:
            said.append(f"{name}: {1 - cut:.0%} of the responses were cut by evaluation.max_new_tokens.")
        judged = entry.get("judged") or {}
        total = sum(judged.get(key, 0) for key in ("wins", "ties", "losses", "skipped"))
        if judged.get("orders_disagreed"):
            said.append(f"{name}: the judge contradicted itself on {judged['orders_disagreed']} of {total} prompts.")
        if judged.get("skipped"):
            said.append(f"{name}: {judged['skipped']} of {total} prompts have no verdict that could be read.")
    return said
