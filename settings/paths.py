"""Where the repository lies, and how a path that a user writes is found."""

import difflib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config"


def found(path: str | Path) -> Path | None:
    """Return the file or folder that a path names, seen from where the command was typed, else from the repository's
    root (what the repository ships is named from there); None if it is in neither.
    """
    here = Path(path).expanduser()
    return next((place for place in (here, ROOT / here) if os.path.exists(place)), None)


def hint_for(path: str | Path) -> str:
    """Say what is where a path that is not there leads: the path with the nearest name, or the names that are there."""
    wanted = Path(path).expanduser()
    there = wanted.parent
    while not there.is_dir():
        there = there.parent
    missing, *rest = wanted.relative_to(there).parts or (wanted.name,)
    names = sorted(entry.name for entry in there.iterdir() if entry.is_dir() or not rest)
    close = difflib.get_close_matches(missing, names, n=1, cutoff=0.7)
    if close:
        near = there / close[0]
        return f"did you mean {near.joinpath(*rest) if near.joinpath(*rest).exists() else near}?"
    shown = "this folder" if there == Path() else there
    return f"{shown} has {', '.join(names[:5]) or 'nothing of that kind'}"
