"""The digest of a stage: what can change its result, and nothing else.

It covers what the task reads of the configuration (settings/tasks.py); the VERSION numbers of all modules that its work
is made of; the code of verifiers, worlds and methods of one's own; and the content behind every path. Output of another
stage is named by its folder, whose name carries that stage's digest. No module is imported for it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from settings import paths
from settings.methods import config_fields
from settings.paths import ROOT
from settings.schema import DatasetConfig, RunConfig, Settings
from settings.source import closure, in_repository
from settings.tasks import counted
from settings.typed import Code, Place, Places

LARGE = 32 * 2**20  # bytes from which on a file's digest is kept between commands
DATA = (".jsonl", ".json", ".parquet")  # a name that ends so is a file, never a name of the hub


def digest_of(raw: dict[str, Any], stages_dir: Path, root: Path = ROOT) -> str:
    """Hash what can change a stage's result; `root` is the repository whose code counts."""
    return hashlib.sha256(told_of(raw, stages_dir, root).encode()).hexdigest()


def told_of(raw: dict[str, Any], stages_dir: Path, root: Path = ROOT) -> str:
    """Return what a digest is the hash of, as JSON: versions, code, config with contents in the place of paths."""
    payload = {**computed_by(raw, root), "config": with_contents(counted(raw), stages_dir, root)}
    # Folders of other stages carry their digests; where cache_dir lies does not matter.
    return json.dumps(payload, sort_keys=True, default=str).replace(json.dumps(f"{stages_dir}/")[1:-1], "stages/")


# ---- code


def computed_by(raw: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return the VERSION numbers of the repository's modules that compute a stage, and the code of all others."""
    task = raw["task"]
    names = [f"tasks.{task}"]
    if task == "train":
        names.append(raw["loss"]["trainer"].rpartition(".")[0])
    modules = {module.name: module for name in names for module in closure(name, root)}
    ours = {name: module.versions for name, module in modules.items() if in_repository(module, root)}
    code = {name: module.code for name, module in modules.items() if name not in ours}
    if task == "world":
        code |= code_of(f"worlds.{raw['world']['name']}", root)
    return {"versions": {name: numbers for name, numbers in ours.items() if numbers}, "code": code}


def code_of(name: str, root: Path) -> dict[str, str]:
    """Return the digests of a module's file and of those that it imports from beside it."""
    return {module.name: module.code for module in closure(name, root)}


# ---- content


@cache
def marked(cls: type) -> dict[str, str]:
    """Return the fields of a section's dataclass that are declared as Place or Code."""
    hints = get_type_hints(cls, include_extras=True)
    declared = {str(Place): "Place", str(Places): "Place", str(Code): "Code"}
    return {name: kind for name, hint in hints.items() for text, kind in declared.items() if text in str(hint)}


def loss_marks(trainer: str, root: Path) -> dict[str, str]:
    """Return the same of the Config of a method, which is read and not imported."""
    written = config_fields(trainer, root)
    return {name: kind for name, text in written.items() for kind in re.findall(r"\b(Place|Code)s?\b", text)}


def with_contents(kept: dict[str, Any], stages_dir: Path, root: Path) -> dict[str, Any]:
    """Return a config with digests in the place of paths, and of modules beside their names."""
    sections = get_type_hints(Settings)

    def one(key: str, value: Any) -> Any:
        if key == "datasets":
            return {name: mapped(entry, marked(DatasetConfig)) for name, entry in value.items()}
        if key == "loss":
            return mapped(value, loss_marks(value["trainer"], root))
        if isinstance(value, dict):
            return mapped(value, marked(sections[key]))
        return mapped({key: value}, marked(RunConfig))[key]

    def mapped(section: dict[str, Any], marks: dict[str, str]) -> dict[str, Any]:
        return {key: leaf(value, marks.get(key, "")) for key, value in section.items()}

    def leaf(value: Any, kind: str) -> Any:
        if isinstance(value, dict):
            return {key: leaf(entry, kind) for key, entry in value.items()}
        if isinstance(value, list):
            return [leaf(entry, kind) for entry in value]
        if not isinstance(value, str) or not value:
            return value
        if kind == "Code":
            return [value, code_of(value.partition(":")[0], root)]
        # What nobody declared and yet names something that is here counts, too: a key cannot be forgotten.
        return by_content(value, stages_dir) if kind == "Place" or os.sep in value else value

    return {key: one(key, value) for key, value in kept.items()}


def by_content(value: str, stages_dir: Path) -> str:
    """Return the digest of what a path names; a stage's folder and a name of the hub stay as they are."""
    if value.startswith(f"{stages_dir}/"):
        return value
    place = paths.found(value)
    if place is not None:
        return f"sha256:{content_digest(place)}"
    if Path(value).suffix in DATA:
        raise ValueError(f"there is no file {value}")
    return value


def content_digest(path: Path) -> str:
    """Hash a file, or the names and contents of a folder's files; a model card (README.md) changes no result."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != "README.md")
    found = [(str(p.relative_to(path)), _file_digest(p)) for p in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _hashed(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@cache
def _hashed(path: str, size: int, modified: int) -> str:
    """Hash a file; a large one's digest is kept in the user's cache folder, so that a plan does not read weights."""
    key = json.dumps([path, size, modified])
    if size >= LARGE and (known := _kept().get(key)):
        return known
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= LARGE:
        _keep(key, digest)
    return digest


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prefdistill" / "file_digests.tsv"


def _kept() -> dict[str, str]:
    try:
        lines = _memory().read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return dict(line.split("\t", 1) for line in lines if line.count("\t") == 1)


def _keep(key: str, digest: str) -> None:
    """Note a digest; a folder that cannot be written costs time, not the result."""
    try:
        _memory().parent.mkdir(parents=True, exist_ok=True)
        with _memory().open("a", encoding="utf-8") as file:
            file.write(f"{key}\t{digest}\n")
    except OSError:
        return


class Stamp(NamedTuple):
    """A file by where it lies, how long it is and when it was last written."""

    path: str
    size: int
    modified: int


def stamps_of(files: Iterable[Path]) -> tuple[Stamp, ...]:
    """Return the stamps of files, in their order."""
    return tuple(Stamp(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=64)
def weights_hash(stamps: tuple[Stamp, ...]) -> Any:
    """Read the files into one hash; whoever goes on with it copies it."""
    digest = hashlib.sha256()
    for stamp in stamps:
        with open(stamp.path, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest
