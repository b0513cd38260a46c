"""What a task reads of the configuration, and the digest of exactly that.

The digest covers the task, the method's VERSION, the composed config as far as it can change the result, the content
of data files, and (through their folders' names) the stages whose output is read.
"""

import ast
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a task reads beside the run section; every other section is left out of its digest and of its command.
SECTIONS = {
    "train": ("model", "loss", "datasets"),
    "cache": ("model", "datasets", "cache"),
    "generate": ("model", "datasets", "generation"),
    "evaluate": ("model", "datasets", "evaluation", "judge"),
    "world": ("world",),
    "summarize": ("evaluation",),
    "select": ("datasets", "select"),
    "label": ("model", "label", "judge"),
}
# Of the run section; training reads all of it, cache and generate by their split.
RUN_KEYS = {
    "world": ("seed",),
    "select": ("seed",),
    "label": (),
    "summarize": (),
    "evaluate": ("seed", "n_eval_examples"),
}
SCORING_RUN_KEYS = ("seed", "n_examples", "n_eval_examples")
# Where a run lands and what it shows on the way; how it evaluates itself while training changes no weight.
UNIMPORTANT = (
    "exp_name",
    "run_count",
    "cache_dir",
    "debug",
    "dry_run",
    "wandb",
    "strategy",
    "log_every",
    "save_every",
    "keep_last",
    "intermediate_checkpoints",
    "eval_every",
    "do_first_eval",
    "n_eval_examples",
    "sweep",
    "estimate",
)
TRAINING_MODEL_KEYS = (
    "batch_size",
    "gradient_accumulation_steps",
    "eval_batch_size",
    "max_grad_norm",
    "activation_checkpointing",
    "compile",
    "use_peft",
    "peft",
    "master_dtype",
)
# How a generator or scorer is run, not what it gives.
SERVING_KEYS = (
    "tensor_parallel",
    "kv_cache_gb",
    "base_url",
    "concurrency",
    "timeout",
    "retries",
    "check_rows",
    "max_logp_gap",
)

# Keys that name a file or a model's folder: its content counts, not its name.
FOLDERS = (
    ("loss", "teacher"),
    ("loss", "reward_model"),
    ("label", "responses"),
    ("label", "reward_model"),
    ("evaluation", "reward_model"),
    ("judge", "score_template"),
    ("judge", "pair_template"),
)


def reads(task: str, section: str) -> bool:
    """Tell whether a task reads a section, or a key at the root, of the configuration."""
    if section in SECTIONS[task] or section in ("wandb", "debug"):
        return True
    everywhere = any(section in names for names in SECTIONS.values())
    return not everywhere and (task == "train" or section in RUN_KEYS.get(task, SCORING_RUN_KEYS))


@cache
def _file_digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """Hash a file, or the names and contents of a folder's files; a model card (README.md) changes no result."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != "README.md")
    found = [(str(p.relative_to(path)), _file_digest(str(p), p.stat().st_size, p.stat().st_mtime_ns)) for p in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def version_of(module: str) -> list[int]:
    """Read the VERSION numbers written in a module, without importing it (that would load torch)."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module!r}")
    versions = []
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == "VERSION" for t in targets):
            versions.append(ast.literal_eval(node.value))  # type: ignore[attr-defined]
    return versions


def digest_of(raw: dict[str, Any], stages_dir: Path) -> str:
    """Hash what can change a stage's result: versions, the sections its task reads, contents of files."""
    task = raw["task"]
    sections = SECTIONS[task]
    run_keys = RUN_KEYS.get(task, SCORING_RUN_KEYS)
    if task in ("cache", "generate"):
        unread = (
            "n_eval_examples" if raw["cache" if task == "cache" else "generation"]["split"] == "train" else "n_examples"
        )
        run_keys = tuple(key for key in run_keys if key != unread)
    every = ("pipeline", *(name for names in SECTIONS.values() for name in names))
    kept = {
        key: raw[key]
        for key in raw
        if (key not in every and key not in UNIMPORTANT if task == "train" else key in run_keys)
    }
    kept |= {key: dict(raw[key]) for key in sections if raw.get(key)}
    for section in ("generation", "cache", "judge"):
        if section in kept:
            kept[section] = {k: v for k, v in kept[section].items() if k not in SERVING_KEYS}
    if task != "train" and "model" in kept:
        kept["model"] = {k: v for k, v in kept["model"].items() if k not in TRAINING_MODEL_KEYS}
    if "model" in kept:
        for key in ("name_or_path", "tokenizer_name_or_path"):
            kept["model"][key] = _by_content(kept["model"].get(key), stages_dir)
        if kept["model"].get("load_from"):  # the weights come from there
            kept["model"].pop("build_seed", None)
    for section, key in FOLDERS:
        if kept.get(section, {}).get(key):
            kept[section][key] = _by_content(kept[section][key], stages_dir)
    for name, entry in kept.get("datasets", {}).items():
        kept["datasets"][name] = entry | {k: _by_content(entry.get(k), stages_dir) for k in ("train", "test")}
    modules = [raw["loss"]["trainer"].rpartition(".")[0], "trainers.basic"] if task == "train" else [f"tasks.{task}"]
    source = content_digest(ROOT / "worlds" / f"{raw['world']['name']}.py") if task == "world" else None
    payload = {"task": task, "versions": [version_of(m) for m in modules], "source": source, "config": kept}
    # Folders of other stages carry their digests; where cache_dir lies does not matter.
    text = json.dumps(payload, sort_keys=True, default=str).replace(json.dumps(f"{stages_dir}/")[1:-1], "stages/")
    return hashlib.sha256(text.encode()).hexdigest()


def _by_content(value: str | None, stages_dir: Path) -> str | None:
    if not value or value.startswith(f"{stages_dir}/"):
        return value
    path = Path(value).expanduser()
    for place in (path, ROOT / path):  # what the repo ships is named from its root
        if place.exists():
            return f"sha256:{content_digest(place)}"
    if path.suffix in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"there is no file {value}")
    return value
