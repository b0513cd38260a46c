"""A run's folder: opened for a run, found finished, or refused because it holds another one."""

import fcntl
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.digests import told_of
from settings.artifacts import is_done, remove_parts, write_json, write_text
from settings.schema import Settings
from settings.secrets import hidden, secrets_of
from settings.tasks import counted

FIRST = ("task", "loss", "model", "name", "name_or_path", "load_from")  # what tells two runs apart before all else
TOLD = "digest.json"  # what digest.txt is the hash of
ERROR = "error.txt"  # why the last attempt ended; gone once another one begins


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers."""
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "datasets", "peft", "hydra-core", "numpy")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def difference_of(old: Any, new: Any, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Any, Any] | None:
    """Return the first key at which two plain configs differ, with both values; task, method and model come first."""
    if isinstance(old, dict) and isinstance(new, dict):
        order = {name: place for place, name in enumerate(FIRST)}
        for key in sorted(old.keys() | new.keys(), key=lambda key: (order.get(key, len(FIRST)), str(key))):
            found = difference_of(old.get(key), new.get(key), (*path, str(key)))
            if found:
                return found
        return None
    return None if old == new else (path, old, new)


def first_difference(old: Any, new: Any) -> str | None:
    """Name the first key at which two plain configs differ, with both values."""
    found = difference_of(old, new)
    return f"{'.'.join(found[0])} was {found[1]!r} and is {found[2]!r}" if found else None


def open_run_dir(settings: Settings) -> bool:
    """Prepare the run's folder; return False if the same run is already finished there.

    Raises ValueError if the folder holds a run with another configuration, or with other data or code behind the same
    one, that this one would go on from or replace.
    """
    run_dir = settings.run.run_dir
    stored = run_dir / "config.yaml"
    is_main = os.environ.get("RANK", "0") == "0"
    begun = is_done(run_dir) or any(map(is_done, run_dir.glob("checkpoint-*")))
    told = told_of_run(settings) if is_main or is_done(run_dir) else ""
    if begun and stored.is_file():
        difference = _changed_setting(settings.raw, stored) or (told and _changed_behind(told, run_dir))
        if difference:
            raise ValueError(
                f"{run_dir} holds another run: {difference}. Choose another exp_name or run_count, or remove that "
                "folder"
            )
        if is_done(run_dir):
            return False
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_parts(run_dir)
        (run_dir / ERROR).unlink(missing_ok=True)
        write_text(stored, OmegaConf.to_yaml(OmegaConf.create(settings.raw)))
        write_text(run_dir / TOLD, told + "\n")
        write_text(run_dir / "digest.txt", hashed(told) + "\n")
        write_text(run_dir / "command.txt", shlex.join([sys.executable, *sys.argv]) + "\n")
        write_json(run_dir / "versions.json", versions())
    return True


def note_error(run_dir: Path, error: Exception) -> None:
    """Keep in a run's folder why it ended, without a secret of the environment."""
    with suppress(OSError):  # a full or lost disk has another message, which goes on
        write_text(run_dir / ERROR, hidden(f"{type(error).__name__}: {error}", secrets_of(os.environ)) + "\n")


@contextmanager
def kept_alone(run_dir: Path) -> Iterator[None]:
    """Keep a run's folder for this process and those that it starts; ValueError while another run is at work there.

    The lock is the kernel's, on the folder itself: it ends with the process, however that ends. Rank 0 has it for all
    ranks. A file system without locks gives none.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is at work in {run_dir}: wait for it or end it, or choose another exp_name or "
                "run_count"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def told_of_run(settings: Settings) -> str:
    """Return what can change the run's result, as the digest of a pipeline's stage tells it."""
    return told_of(settings.raw, Path(settings.run.cache_dir).expanduser() / "stages")


def hashed(told: str) -> str:
    """Return the digest of what can change a run's result."""
    return hashlib.sha256(told.encode()).hexdigest()


def _changed_setting(raw: dict[str, Any], stored: Path) -> str | None:
    """Name the first key that the task reads and that is another in the stored config."""
    old = OmegaConf.to_container(OmegaConf.load(stored))
    assert isinstance(old, dict)
    return first_difference(counted({str(key): value for key, value in old.items()}), counted(raw))


def _changed_behind(told: str, run_dir: Path) -> str | None:
    """Say what is another behind the same settings: the content of a file, or code."""
    identity, kept = run_dir / "digest.txt", run_dir / TOLD
    if not identity.is_file() or identity.read_text("utf-8").strip() == hashed(told):
        return None
    found = difference_of(json.loads(kept.read_text("utf-8")), json.loads(told)) if kept.is_file() else None
    if found is None:
        return "the same settings, but the content of a file that they name, or the version of the code, was another"
    (kind, *key), old, new = found
    if kind == "config":
        return f"the same settings, but what {'.'.join(key)} names had another content then"
    return f"the same settings, but the code of {key[0]} was another then ({kind}: {old!r}, now {new!r})"
