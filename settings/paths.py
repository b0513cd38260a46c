"""Where the repository lies, and how a path that a user writes is found."""

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
