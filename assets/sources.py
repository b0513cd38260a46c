"""Where models and tokenizers come from: a folder, a package with weights, or a name of the hub."""

from pathlib import Path

from assets import smollm2
from settings.paths import found, hint_for
from settings.schema import ModelConfig


def local_source(source: str) -> str:
    """Resolve a model or tokenizer source: `package:NAME`, a folder (also below the repository), or a hub name.

    Raises ValueError for what looks like a folder and is none; the nearest one there is named.
    """
    if source.startswith("package:"):
        return str(smollm2.converted(source.removeprefix("package:")))
    path, place = Path(source).expanduser(), found(source)
    if place is not None and place.is_dir():
        check_not_a_run(place)
        return str(place)
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source.split("/")[0]).is_dir()
    if not looks_local and path.name not in ("FINAL", "CACHE"):
        return source
    raise ValueError(f"no model folder {source!r}: {hint_for(path)}")


def check_not_a_run(folder: Path) -> None:
    """Refuse the folder of a run in the place of the model in it."""
    if any((folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return
    if (folder / "FINAL").is_dir():
        raise ValueError(f"{folder} is a run's folder; its model is {folder / 'FINAL'}: give that")
    if (folder / "command.txt").is_file():
        raise ValueError(f"{folder} is a run's folder without FINAL, the model: the run has not ended, or trained none")


def check_no_pickles(source: str, config: ModelConfig) -> None:
    """Refuse a folder whose weights are pickles, unless model.pickled_weights says to read them."""
    folder = Path(source)
    if config.pickled_weights or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}"))
    if pickles:
        raise ValueError(
            f"{folder} has its weights as pickles ({pickles[0]}), which can hold code. Have them saved as safetensors, "
            "or read them with model.pickled_weights=true where you trust who wrote them"
        )
