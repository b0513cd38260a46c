"""task=pull: a cache from the hub, by its name, whole and checked (docs/hub.md)."""

import shutil

from settings.artifacts import whole_folder
from settings.schema import Settings
from teacher.cache import Reader
from teacher.hub import cache_folder


def run(settings: Settings) -> None:
    """Download hub.pull into the run's folder as CACHE; ValueError where it is no whole cache."""
    hub, target = settings.hub, settings.run.run_dir / "CACHE"
    place = cache_folder(f"hub:{hub.pull}" + (f"@{hub.revision}" if hub.revision else ""))
    reader = Reader(place)
    reader.verify()
    meta = reader.meta
    if not target.is_dir():
        with whole_folder(target) as part:
            shutil.copytree(place, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    print(f"{meta.quantity} cache: {meta.num_sequences} sequences, {meta.num_tokens} tokens, in {target}")
