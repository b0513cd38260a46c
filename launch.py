"""The one command: compose the Hydra config, type it, run one task or a whole pipeline.

python launch.py loss=dpo model=tiny datasets=[local] datasets.local.train=pairs.jsonl exp_name=x ++lr=5e-7
accelerate launch --config_file accelerate_config/fsdp_4gpu.yaml launch.py loss=adpa model=llama ...
python launch.py pipeline=quickstart
"""

import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Hydra then raises instead of printing, and `main` below words the message; a user's own setting wins.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.sweeps import as_sweep, job_folder
from settings.needs import check_needs
from settings.schema import Settings, nearest, settings_from

TASKS = ("train", "cache", "generate", "evaluate", "world", "summarize", "select", "label", "report", "estimate")
# Keys that may differ when a run is started again: they change what is shown and kept, not the trained numbers.
UNIMPORTANT = (
    "debug",
    "wandb",
    "dry_run",
    "strategy",
    "log_every",
    "save_every",
    "keep_last",
    "intermediate_checkpoints",
    "eval_every",
    "do_first_eval",
    "estimate",
)


def method_of(raw: dict[str, Any]) -> Any:
    """Return the trainer class that loss.trainer names."""
    name = raw["loss"].get("trainer", "")
    if not re.fullmatch(r"trainers\.\w+\.\w+", name):
        raise ValueError(f"loss.trainer={name!r} must name a class of a module of trainers/, e.g. trainers.dpo.DPO")
    module, _, cls = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"loss.trainer={name}: {error}") from error


def settings_of(raw: dict[str, Any]) -> Settings:
    """Type and check the resolved config for the task it asks for."""
    task = raw["task"]
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known.{nearest(str(task), list(TASKS))}")
    method = None
    if task == "train":
        missing = [key for key, value in raw["loss"].items() if value == "???"]
        if missing:
            raise ValueError(f"loss={raw['loss']['name']} needs loss.{missing[0]}=PATH on the command line")
        method = method_of(raw)
    settings = settings_from(raw, method.Config if method else None)
    if method:
        check_needs(settings, method.needs, raw["loss"]["name"], method.head)
    if task == "cache":
        from teacher.quantities import quantity_of

        quantity_of(settings.cache)  # refuses what contradicts itself before anything is written
    return settings


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers."""
    names = ("torch", "transformers", "accelerate", "datasets", "peft", "hydra-core", "numpy")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Name the first key at which two plain configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys(), key=str):
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r} and is {new!r}"


def open_run_dir(settings: Settings) -> bool:
    """Prepare the run's folder; return False if the same run is already finished there.

    Raises ValueError if the folder holds a run with another configuration that this one would go on from or replace.
    """
    run_dir = settings.run.run_dir
    stored = run_dir / "config.yaml"
    raw = {k: v for k, v in settings.raw.items() if k not in UNIMPORTANT}
    begun = (run_dir / "DONE").exists() or any(run_dir.glob("checkpoint-*/DONE"))
    if begun and stored.is_file():
        old = OmegaConf.to_container(OmegaConf.load(stored))
        assert isinstance(old, dict)
        difference = first_difference({k: v for k, v in old.items() if k not in UNIMPORTANT}, raw)
        if difference:
            raise ValueError(
                f"{run_dir} holds a run with another configuration: {difference}. "
                "Choose another exp_name or run_count, or remove that folder"
            )
        if (run_dir / "DONE").exists():
            return False
    if os.environ.get("RANK", "0") == "0":
        run_dir.mkdir(parents=True, exist_ok=True)
        part = run_dir / f"config.yaml.{os.getpid()}"
        part.write_text(OmegaConf.to_yaml(OmegaConf.create(settings.raw)), encoding="utf-8")
        part.replace(stored)
        (run_dir / "command.txt").write_text(shlex.join([sys.executable, *sys.argv]) + "\n", encoding="utf-8")
        (run_dir / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n", encoding="utf-8")
    return True


def run_task(raw: dict[str, Any]) -> None:
    """Run one task into its folder; DONE is written last."""
    settings = settings_of(raw)
    if settings.run.task == "report":  # it reads finished runs: no folder of its own, and new at every call
        importlib.import_module("tasks.report").run(settings)
        return
    if not open_run_dir(settings):
        print(f"already done: {settings.run.run_dir}")
        return
    importlib.import_module(f"tasks.{settings.run.task}").run(settings)
    if settings.run.task == "estimate":  # new at every call, so it is never done
        return
    if os.environ.get("RANK", "0") == "0":
        (settings.run.run_dir / "DONE").touch()
        print(f"done: {settings.run.run_dir}", flush=True)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def composed(config: DictConfig) -> None:
    """Take what Hydra composed; after this line no DictConfig exists."""
    guarded(lambda: run(config))


def run(config: DictConfig) -> None:
    """Hand the plain config to a pipeline or to one task."""
    raw = OmegaConf.to_container(config, resolve=True)
    assert isinstance(raw, dict)
    plain: dict[str, Any] = {str(k): v for k, v in raw.items()}
    plain["datasets"] = plain.get("datasets") or {}
    varied = job_folder()
    if varied:
        plain["run_count"] = f"{plain['run_count']}/{varied}" if plain["run_count"] else varied
    if plain.get("pipeline"):
        from pipeline.runner import run_pipeline

        code = run_pipeline(plain, list(HydraConfig.get().overrides.task))
        if code:
            sys.exit(code)
        show_costs(plain, list(HydraConfig.get().overrides.task))
        return
    plain.pop("pipeline", None)
    run_task(plain)


def show_costs(plain: dict[str, Any], overrides: list[str]) -> None:
    """Print what the stages of a plan would take, or write costs.md: what those of a finished pipeline took beside
    it.
    """
    from pipeline.plan import build_plan
    from pipeline.runner import run_folder
    from tasks.estimate import costs, print_plan

    stages = build_plan(plain, overrides)
    if plain["dry_run"]:
        print_plan(stages, plain["estimate"])
        return
    path = run_folder(plain, overrides) / "costs.md"
    path.write_text(costs(stages, plain["estimate"]) + "\n", encoding="utf-8")
    print(f"predicted and actual costs: {path}")


def explain(error: Exception) -> str:
    """Word a user's mistake in one message."""
    text = str(error).strip()
    cause = error.__cause__
    unknown = re.search(r"Key '([\w.]+)' is not in struct", f"{text}\n{cause}")
    if unknown:
        full = re.search(r"full_key: ([\w.]+)", f"{text}\n{cause}")
        key = full.group(1) if full else unknown.group(1)
        return f"unknown key {key!r}.{nearest(key.rsplit('.', 1)[-1], known_keys(key))}"
    return text if not isinstance(error, OSError) else f"{error.strerror or text}: {error.filename or ''}".rstrip(": ")


def known_keys(key: str) -> list[str]:
    """List the keys beside `key` in config.yaml, or in the group that it belongs to."""
    base = Path(__file__).parent / "config"
    parent = key.rpartition(".")[0]
    if (base / parent).is_dir() and parent:
        return sorted({str(k) for file in (base / parent).glob("*.yaml") for k in OmegaConf.load(file)} - {"defaults"})
    root = OmegaConf.load(base / "config.yaml")
    node = OmegaConf.select(root, parent) if parent else root
    keys = [str(k) for k in node] if OmegaConf.is_dict(node) else []
    return [k for k in keys if k != "defaults"] + ([] if parent else ["loss", "model", "datasets", "pipeline"])


def guarded(work: Callable[[], None]) -> None:
    """Do the work, and show a user's mistake as one message instead of a traceback (debug=true shows both)."""
    try:
        work()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if "debug=true" in sys.argv or "++debug=true" in sys.argv:
            raise
        print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    sys.argv[1:] = as_sweep(sys.argv[1:])
    guarded(composed)
