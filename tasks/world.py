"""task=world: write the data of an embedded small world, a function of its code, the seed and its knobs."""

import importlib
from pathlib import Path
from typing import Any

from settings.artifacts import read_jsonl
from settings.schema import Settings, WorldConfig


def knobs_of(world: Any, config: WorldConfig) -> tuple[Any, ...]:
    """Return the knobs as the world's module takes them; none for a world without."""
    if config.name != "shop":
        return ()
    own = None
    if config.own_pairs is not None:
        file = Path(config.own_pairs).expanduser()
        if not file.is_file():
            raise ValueError(f"world.own_pairs={file}: no such file; task=label label.make=pairs writes labeled.jsonl")
        own = list(read_jsonl(file))
        if not all({"prompt", "chosen", "rejected"} <= row.keys() for row in own):
            raise ValueError(
                f"world.own_pairs={file}: not all rows are pairs; make them by task=label label.make=pairs"
            )
    return (world.Knobs(config.pairs, config.flipped, config.extra_prompts, own),)


def run(settings: Settings) -> None:
    """Write the world's files into run_dir/WORLD."""
    folder = settings.run.run_dir / "WORLD"
    world = importlib.import_module(f"worlds.{settings.world.name}")
    world.write(folder, settings.run.seed, *knobs_of(world, settings.world))
    print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
