"""task=world: write the data of an embedded small world, a function of its code and the seed."""

import importlib

from settings.schema import Settings


def run(settings: Settings) -> None:
    """Write the world's files into run_dir/WORLD."""
    folder = settings.run.run_dir / "WORLD"
    importlib.import_module(f"worlds.{settings.world.name}").write(folder, settings.run.seed)
    print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
