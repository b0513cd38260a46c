"""task=world: write the data of the embedded small world, a function of its code and the seed."""

from schema import Settings
from worlds import shop


def run(settings: Settings) -> None:
    """Write the world's files into run_dir/WORLD."""
    folder = settings.run.run_dir / "WORLD"
    shop.write(folder, settings.run.seed)
    print(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")
