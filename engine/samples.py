"""samples.jsonl of a run: what the policy answers on fixed prompts every so many steps."""

from collections.abc import Sequence
from pathlib import Path

from settings.artifacts import append_row, whole_rows, write_jsonl

FILE = "samples.jsonl"
PROMPTS = 4  # of the data, where none are given


def keep_until(run_dir: Path, step: int) -> None:
    """Cut the file back to a step, so that a resumed run has no step twice."""
    file = run_dir / FILE
    if file.is_file():
        write_jsonl(file, [row for row, _ in whole_rows(file) if row["step"] <= step] if step else [])


def append(run_dir: Path, step: int, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Add the responses of a step."""
    with (run_dir / FILE).open("a", encoding="utf-8") as out:
        for prompt, response in zip(prompts, responses, strict=True):
            append_row(out, {"step": step, "prompt": prompt, "response": response})
