"""The outputs of the commands in docs/estimate.md's worked plan: `python -m docs.worked_plan` runs them and writes them
in.

A command is an indented line below `<!-- estimate -->`; what it prints from its table on stands in the block after it.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "estimate.md"
PART = re.compile(
    r"(<!-- estimate -->\n\n    python )(launch\.py (?:[^\n]*\\\n)*[^\n]*)(\n\n```text)(.*?)(\n```)", re.S
)


def output_of(command: str) -> str:
    """Run a command of the page without a hub; return what it prints from the estimate on."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *shlex.split(command.replace("\\\n", " ")), f"cache_dir={folder}"]
        done = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stderr}")
    start = re.search(r"^(\| stage|estimate of)", done.stdout, re.M)
    assert start, done.stdout
    return done.stdout[start.start() :].strip()


def parts() -> list[tuple[str, str]]:
    """Return the page's commands, each with the output that stands below it."""
    return [(match[2], match[4].strip()) for match in PART.finditer(PAGE.read_text(encoding="utf-8"))]


def main() -> None:
    """Run every command and write its output."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(PART.sub(lambda m: m[1] + m[2] + m[3] + "\n" + output_of(m[2]) + m[5], text), encoding="utf-8")


if __name__ == "__main__":
    main()
