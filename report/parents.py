"""What a run's folder was made from, as its stored configuration says: models, caches, data; whose licenses they have.

A card names a parent by its name on the hub, or by the last parts of its path: where it lay says nothing to others.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.digests import content_digest
from settings.paths import found

# Keys that name what a task read; of the first three the first that is given is where training started.
START = ("model.from_checkpoint", "model.load_from", "model.name_or_path")
INPUTS = {
    "train": ("loss.teacher", "loss.teacher_cache", "loss.advantages", "loss.generations", "loss.reward_model"),
    "cache": ("cache.reference", "cache.generations", "cache.import_from"),
    "label": ("label.responses", "label.reward_model"),
    "select": ("select.generations",),
    "generate": ("generation.teacher",),
    "evaluate": ("evaluation.models",),
    "summarize": ("evaluation.models",),
    "map": ("map.evaluations",),
    "world": ("world.own_pairs",),
}
WITH_MODEL = ("train", "cache", "generate")
DEPTH = 12  # runs behind runs that are asked for a license
HubLicense = Callable[[str, str], str | None]  # (name, model | dataset) -> license


class Parent(NamedTuple):
    """Something that a run was made from. licenses: of what it was itself made from; empty: nobody knows."""

    role: str  # the key that named it
    name: str
    digest: str
    licenses: tuple[str, ...]


def config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration stored in a run's folder, or beside the model or cache in it; {} where there is none."""
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file():
            stored = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
            return stored if isinstance(stored, dict) and "task" in stored else {}
    return {}


def inputs_of(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (key, path or hub name) of what a task read."""
    task = str(config.get("task"))
    keys = list(INPUTS.get(task, ()))
    if task in WITH_MODEL:
        keys = [next((key for key in START if _at(config, key)), ""), *keys]
    rows = [(key, text) for key in keys if key for text in _texts(_at(config, key))]
    if task in ("train", "cache", "generate", "evaluate"):
        for name, data in (config.get("datasets") or {}).items():
            rows += [(f"datasets.{name}.{split}", data[split]) for split in ("train", "test") if data.get(split)]
    return rows


def parents_of(folder: Path, on_hub: HubLicense, depth: int = DEPTH) -> list[Parent]:
    """Return what a run was made from, with the licenses that are found in cards, here or on the hub."""
    return [_parent(key, value, on_hub, depth) for key, value in inputs_of(config_of(folder))]


def _parent(key: str, value: str, on_hub: HubLicense, depth: int) -> Parent:
    place = None if value.startswith("hub:") else found(value)
    if place is not None:
        return Parent(key, "/".join(place.resolve().parts[-2:]), digest_of(place), licenses_of(place, on_hub, depth))
    kind = "dataset" if key.startswith("datasets.") or value.startswith("hub:") else "model"
    name = value.removeprefix("hub:").partition("@")[0].partition(":")[0].partition("#")[0]
    license = on_hub(name, kind)
    return Parent(key, value, "", (license,) if license else ())


def digest_of(place: Path) -> str:
    """Return the digest of a run, a cache or a file."""
    if place.is_file():
        return content_digest(place)[:16]
    for file in (place / "digest.txt", place.parent / "digest.txt"):
        if file.is_file():
            return file.read_text(encoding="utf-8").strip()[:16]
    return ""


def licenses_of(place: Path, on_hub: HubLicense, depth: int) -> tuple[str, ...]:
    """Return the license that a folder's card names, else those of all that it was made from."""
    named = front_matter(place / "README.md").get("license") if place.is_dir() else None
    if named:
        return (str(named),)
    if place.is_file() and not config_of(place.parent):
        return ()
    if depth == 0:
        return ()
    every = [parent.licenses for parent in parents_of(place if place.is_dir() else place.parent, on_hub, depth - 1)]
    if not every or not all(every):  # one that is not known leaves all of them not known
        return ()
    return tuple(sorted({license for licenses in every for license in licenses}))


def front_matter(card: Path) -> dict[str, Any]:
    """Return the front matter of a card; {} where there is none that can be read."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head, mark, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not mark:
        return {}
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def scores_of(results: Path, model: Path) -> tuple[str, dict[str, Any]]:
    """Return a model's name and entry in the results of an evaluation; ValueError where it is not among its models."""
    file = results / "results.json"
    if not file.is_file():
        raise ValueError(f"hub.results={results} has no results.json: give the folder of a finished task=evaluate")
    entries = json.loads(file.read_text(encoding="utf-8"))["models"]
    named = (config_of(results).get("evaluation") or {}).get("models") or {}
    for name, source in named.items():
        place = found(source) if isinstance(source, str) else None
        if place is not None and place.resolve() == model.resolve() and name in entries:
            return name, entries[name]
    raise ValueError(f"hub.results={results} judged {', '.join(named) or 'nothing'}, and none of them is {model}")
