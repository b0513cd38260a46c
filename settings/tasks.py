"""The table of the tasks: what each of them reads of the configuration, and so what makes two runs the same run.

Four things are read off it: which tasks there are, the digest of a pipeline's stage (pipeline/digests.py), whether a
folder may be gone on with (launch.py), and which runs of a sweep differ in the seed alone (tasks/report.py). A new task
is a row here and a module tasks/NAME.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from settings.methods import head_of
from settings.typed import nearest, require

# Keys at the root that change no result: where a run lands, what it shows and keeps on the way.
SHOWN = (
    "exp_name",
    "run_count",
    "cache_dir",
    "sweep",
    "debug",
    "dry_run",
    "wandb",
    "hub",
    "strategy",
    "log_every",
    "save_every",
    "keep_last",
    "intermediate_checkpoints",
    "eval_every",
    "do_first_eval",
    "num_proc",
    "logging",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
    "tracker",
)
TRAINING = (
    "seed",
    "lr",
    "n_epochs",
    "n_steps",
    "first_step",
    "schedule_steps",
    "n_examples",
    "scheduler",
    "warmup",
    "optimizer",
    "betas",
    "weight_decay",
    "cache_reference_logprobs",
    "load_reference_logprobs",
    "sync_reference",
    "sync_reference_rate",
)
# Of the model section, what only training reads.
MODEL_IN_TRAINING = (
    "model.batch_size",
    "model.gradient_accumulation_steps",
    "model.eval_batch_size",
    "model.max_grad_norm",
    "model.tokens_per_micro_batch",
    "model.packing",
    "model.activation_checkpointing",
    "model.recompute",
    "model.compile",
    "model.use_peft",
    "model.peft",
    "model.master_dtype",
)
# Of the model section, what decides how a model runs here, and not which it is.
MODEL_AS_RUN = (
    "model.template_date",
    "model.policy_dtype",
    "model.reference_dtype",
    "model.max_length",
    "model.max_prompt_length",
    "model.attn_implementation",
    "model.block_class",
)
# Of the generation section, what task=evaluate does not take from there, or what changes no response.
NOT_OF_EVALUATIONS = tuple(
    f"generation.{key}"
    for key in (
        "max_new_tokens temperature top_p top_k n batch_size split seed calculator teacher check_rows max_logp_gap "
        "tensor_parallel kv_cache_gb concurrency timeout retries prompts_as"
    ).split()
)
JUDGE_SERVER = ("judge.concurrency", "judge.timeout", "judge.retries")


@dataclass(frozen=True)
class Task:
    """One kind of work. A key that it reads changes its result, unless it stands in `free`."""

    sections: tuple[str, ...]  # sections that it reads
    run_keys: tuple[str, ...] = ()  # keys at the root that it reads, beside those of SHOWN
    free: tuple[str, ...] = ()  # SECTION.KEY that may differ: how it is served or shown; not read by it
    by_server: tuple[str, ...] = ()  # sections that it reads where they say backend=openai; a pipeline hands none on
    has_folder: bool = True  # it writes into cache_dir/exp_name
    is_done_once: bool = True  # DONE is written there, and the same command does nothing; else it is new at every call
    is_estimated: bool = False  # task=estimate knows its cost
    needs: tuple[tuple[str, str], ...] = ()  # (key without which there is nothing to do, how to give it)


TASKS = {
    "train": Task(
        ("model", "loss", "datasets", "rollout"),
        TRAINING,
        free=("rollout.kv_cache_gb", "rollout.check_rows", "rollout.max_logp_gap"),
        is_estimated=True,
    ),
    "cache": Task(
        ("model", "datasets", "cache"),
        ("seed", "n_examples", "n_eval_examples"),
        free=(
            *(key for key in MODEL_IN_TRAINING if key != "model.master_dtype"),  # _unused says when it is free
            "cache.flush_seconds",
            "cache.tensor_parallel",
            "cache.kv_cache_gb",
            "cache.probe_tolerance",
            "cache.concurrency",
            "cache.timeout",
            "cache.retries",
        ),
        is_estimated=True,
    ),
    "audit": Task(
        ("model", "datasets", "cache", "audit"),
        ("seed", "n_examples", "n_eval_examples"),
        free=MODEL_IN_TRAINING,
        needs=(("audit.cache", "audit.cache=FOLDER, the CACHE folder of a task=cache run"),),
    ),
    "generate": Task(
        ("model", "datasets", "generation"),
        ("seed", "n_examples", "n_eval_examples"),
        free=(
            *MODEL_IN_TRAINING,
            "generation.tensor_parallel",
            "generation.kv_cache_gb",
            "generation.concurrency",
            "generation.timeout",
            "generation.retries",
            "generation.prompts_as",
            "generation.check_rows",
            "generation.max_logp_gap",
        ),
        is_estimated=True,
    ),
    "label": Task(
        ("model", "label", "judge"),
        free=(*MODEL_IN_TRAINING, *JUDGE_SERVER),
        needs=(("label.responses", "label.responses=FILE: generations.jsonl, or rows with prompt and response"),),
    ),
    "evaluate": Task(
        ("model", "datasets", "evaluation", "judge"),
        ("seed", "n_eval_examples"),
        free=(
            *MODEL_IN_TRAINING,
            *JUDGE_SERVER,
            *NOT_OF_EVALUATIONS,
            "evaluation.comparisons",
            "evaluation.latency_kv_cache_gb",
        ),
        by_server=("generation",),
        needs=(("evaluation.models", "evaluation.models.NAME=FOLDER, e.g. evaluation.models.mine=outputs/run/FINAL"),),
    ),
    "select": Task(
        ("datasets", "select"),
        ("seed",),
        needs=(("select.generations", "select.generations=FILE, the generations.jsonl of task=generate"),),
    ),
    "summarize": Task(
        ("evaluation",),
        needs=(("evaluation.models", "evaluation.models.seed_1=FOLDER, the folder of a task=evaluate run"),),
    ),
    "map": Task(
        ("map",),
        needs=(("map.evaluations", "map.evaluations.CELL.seed_1=FOLDER, the folder of a task=evaluate run"),),
    ),
    "world": Task(("world",), ("seed",)),
    "report": Task(
        (),
        ("sweep",),
        has_folder=False,
        is_done_once=False,
        needs=(("sweep", "sweep=DIR, the folder that holds the runs of a sweep"),),
    ),
    "estimate": Task(
        ("model", "loss", "datasets", "generation", "cache", "estimate"),
        (*TRAINING, "n_eval_examples"),
        is_done_once=False,
    ),
    "inspect": Task(
        ("model", "datasets", "inspect"),
        ("seed", "n_examples", "n_eval_examples"),
        is_done_once=False,
        needs=(("datasets", "datasets=[NAME], e.g. datasets=[local] datasets.local.train=my.jsonl"),),
    ),
    "export": Task(
        ("model", "export"),
        free=(*MODEL_IN_TRAINING, *MODEL_AS_RUN, "export.python"),
    ),
    "push": Task(
        ("hub",),
        has_folder=False,
        is_done_once=False,
        needs=(
            ("hub.push", "hub.push=OWNER/NAME, where on the hub it goes"),
            ("hub.folder", "hub.folder=FOLDER, the folder of a finished run"),
        ),
    ),
    "pull": Task(
        ("hub",),
        free=("hub.push", "hub.private", "hub.folder", "hub.results"),
        needs=(("hub.pull", "hub.pull=OWNER/NAME, a cache on the hub"),),
    ),
}
STAGES = tuple(name for name, task in TASKS.items() if task.is_done_once)  # what a stage of a pipeline may be
ESTIMATED = tuple(name for name, task in TASKS.items() if task.is_estimated)
SECTIONS = tuple(dict.fromkeys(section for task in TASKS.values() for section in task.sections))


def task_of(name: Any) -> Task:
    """Return a row of the table; ValueError for a task that is not there."""
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not known.{nearest(str(name), list(TASKS))}")
    return TASKS[name]


def check_task(raw: dict[str, Any]) -> Task:
    """Return the row of the task that a config asks for; ValueError without what it needs."""
    name = raw["task"]
    task = task_of(name)
    for key, how in task.needs:
        section, _, rest = key.partition(".")
        value = raw.get(section)
        require(bool(value[rest] if rest and isinstance(value, dict) else value), f"task={name} needs {how}")
    return task


def reads(name: str, key: str) -> bool:
    """Tell whether a task reads a section, or a key at the root, of the configuration."""
    task = TASKS[name]
    if key in task.sections or key in task.run_keys or key in ("wandb", "debug"):
        return True
    return name == "train" and key not in SECTIONS  # what it shows and keeps; a key that nobody knows is refused there


def unread(configs: Sequence[Mapping[str, Any]], overrides: Iterable[str]) -> list[str]:
    """Return the keys of a command line that none of the runs with these configs reads.

    Looked at are sections of other tasks and what only training reads at the root; task=inspect takes a training run's
    line as it is.
    """
    found: dict[str, None] = {}
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        first = key.partition(".")[0]
        if first == "hub" or first not in (*SECTIONS, *TRAINING):
            continue
        if not any(raw["task"] == "inspect" or _reads_now(raw, first) for raw in configs):
            found[key] = None
    return list(found)


def _reads_now(raw: Mapping[str, Any], key: str) -> bool:
    task = TASKS[raw["task"]]
    return key in (*task.sections, *task.run_keys) or (key in task.by_server and is_served(raw, key))


# ---- the same run


def counted(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what of a resolved config can change its task's result. Two runs with this alike are the same run."""
    name = raw["task"]
    task = task_of(name)
    free = {*task.free, *_unused(raw)}
    kept = {key: raw[key] for key in task.run_keys if key in raw and key not in free}
    for section in (*task.sections, *(name for name in task.by_server if is_served(raw, name))):
        value = raw.get(section)
        if isinstance(value, dict):
            value = {key: entry for key, entry in value.items() if f"{section}.{key}" not in free}
        if value:
            kept[section] = value
    return {"task": name, **kept}


def is_served(raw: Mapping[str, Any], section: str) -> bool:
    """Tell whether a section asks a server."""
    return (raw.get(section) or {}).get("backend") == "openai"


def _unused(raw: dict[str, Any]) -> set[str]:
    """Return the keys without effect because of what another one says."""
    found = set()
    task = raw["task"]
    if task in ("cache", "generate"):
        section = raw.get("cache" if task == "cache" else "generation") or {}
        found.add("n_eval_examples" if section.get("split") == "train" else "n_examples")
    if task == "cache" and section.get("quantity") != "token_logp":  # a reference is stored as its policy is
        found.add("model.master_dtype")
    for section in ("generation", "judge", "cache"):
        for prefix in ("", "reference_"):
            if (raw.get(section) or {}).get(f"{prefix}model_name"):  # whoever serves it, it is this model
                found.add(f"{section}.{prefix}base_url")
    if not (raw.get("evaluation") or {}).get("served"):
        found.add("evaluation.served")  # a stored run may be older
    found |= {key for key in ("first_step", "schedule_steps") if not raw.get(key)}  # the run is whole by itself
    model = raw.get("model") or {}
    loaded = any(model.get(key) for key in ("from_checkpoint", "load_from", "name_or_path"))
    if loaded and (task != "train" or not (model.get("use_peft") or _has_new_head(raw))):
        found.add("model.build_seed")  # nothing is drawn from it: the weights come from there
    return found


def _has_new_head(raw: dict[str, Any]) -> bool:
    """Tell whether a method puts a head on the model, whose first weights are drawn from build_seed."""
    trainer = str((raw.get("loss") or {}).get("trainer", ""))
    try:
        return head_of(trainer) != "lm"
    except ValueError:  # a method that is not here any more, of a run that was
        return True
