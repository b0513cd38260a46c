"""Typed configuration: YAML holds values and comments, these flat frozen dataclasses hold types and checks.

`typed` turns a plain section into its dataclass once; after that no DictConfig exists. Everything that can be
refused is refused here, before a model loads: the message names the key, the value seen and what to do.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from settings.export_section import ExportConfig
from settings.sections import (
    EstimateConfig,
    EvaluationConfig,
    GenerationConfig,
    HubConfig,
    InspectConfig,
    JudgeConfig,
    LabelConfig,
    ResponderConfig,
    SelectConfig,
)
from settings.teacher_sections import AuditConfig, CacheConfig
from settings.typed import Place, check_keys, check_name, check_seed, one_of, require, typed
from settings.world_sections import MapConfig, WorldConfig

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """The keys at the root of the configuration: the run, the schedule and the optimizer."""

    task: str
    exp_name: str
    run_count: str | None
    cache_dir: str
    seed: int
    debug: bool
    lr: Any  # a number, or auto
    n_epochs: int
    n_steps: int | None
    n_examples: int | None
    n_eval_examples: int | None
    eval_every: int
    save_every: int
    do_first_eval: bool
    intermediate_checkpoints: bool
    keep_last: int
    log_every: int
    optimizer: str
    betas: list[float]
    weight_decay: float
    scheduler: str
    warmup: float
    cache_reference_logprobs: bool
    load_reference_logprobs: Place | None
    sync_reference: int
    sync_reference_rate: float
    strategy: str
    sweep: Place | None
    num_proc: int | None
    first_step: int = 0  # with defaults: a stored run may be older than the two
    schedule_steps: int | None = None
    logging: str = "bar"
    sample_every: int = 0
    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 64
    tracker: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(bool(self.exp_name), "exp_name must not be empty")
        check_name("exp_name", self.exp_name, levels=True)
        if self.run_count:
            check_name("run_count", self.run_count, levels=True)
        is_number = isinstance(self.lr, (int, float)) and not isinstance(self.lr, bool)
        require(self.lr == "auto" or is_number, f"lr={self.lr!r} must be a number, or auto")
        require(self.lr == "auto" or self.lr > 0, f"lr={self.lr} must be above 0")
        require(self.n_epochs >= 1, f"n_epochs={self.n_epochs} must be at least 1")
        require(self.n_steps is None or self.n_steps >= 1, f"n_steps={self.n_steps} must be at least 1 (or null)")
        for key in ("n_examples", "n_eval_examples", "schedule_steps"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"{key}={value} must be at least 1 (or null for all)")
        for key in (
            "eval_every",
            "save_every",
            "log_every",
            "keep_last",
            "sync_reference",
            "first_step",
            "sample_every",
        ):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must not be negative (0 switches it off)")
        require(
            0 < self.sync_reference_rate <= 1,
            f"sync_reference_rate={self.sync_reference_rate} must be in (0, 1] (1 copies the policy)",
        )
        require(self.warmup >= 0, f"warmup={self.warmup} must not be negative (below 1: a share of the steps)")
        require(len(self.betas) == 2, f"betas={self.betas} must be two numbers")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas={self.betas} must each be in [0, 1)")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        check_seed("seed", self.seed)
        require(
            self.num_proc is None or self.num_proc >= 1,
            f"num_proc={self.num_proc} must be at least 1 (or null: as many as large data keeps busy)",
        )
        require(self.sample_tokens >= 1, f"sample_tokens={self.sample_tokens} must be at least 1")
        one_of("logging", self.logging, ("bar", "table"))
        for name in self.tracker:
            one_of("tracker", name, ("wandb", "tensorboard", "trackio"))
        one_of("optimizer", self.optimizer, ("AdamW", "Adam", "RMSprop", "SGD"))
        one_of("scheduler", self.scheduler, ("cosine", "constant", "linear"))
        one_of("strategy", self.strategy, ("auto", "none", "ddp", "fsdp", "deepspeed"))
        require(
            not (self.cache_reference_logprobs and self.load_reference_logprobs),
            "cache_reference_logprobs=true and load_reference_logprobs are two ways to one thing: give only one",
        )

    @property
    def tokens_dir(self) -> Path:
        """Return cache_dir/tokens, where tokenized rows are kept for all runs and stages."""
        return Path(self.cache_dir).expanduser() / "tokens"

    @property
    def run_dir(self) -> Path:
        """Return cache_dir/exp_name[/run_count], where everything of this run lands."""
        base = Path(self.cache_dir).expanduser() / self.exp_name
        return base / self.run_count if self.run_count else base


def is_day(text: str) -> bool:
    """Tell whether a text is a day as YYYY-MM-DD."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


PACKS_FROM = 256  # width of the narrowest model for which fewer tokens outweigh attention by segments (docs/log.md)


@dataclass(frozen=True)
class ModelConfig:
    """The `model` group: what to load, in which precision, and how it is batched."""

    name_or_path: Place | None
    tokenizer_name_or_path: Place | None
    template_date: str
    load_from: Place | None
    from_checkpoint: Place | None
    policy_dtype: str
    reference_dtype: str
    master_dtype: str
    max_grad_norm: float
    max_length: int
    max_prompt_length: int
    activation_checkpointing: bool
    recompute: str
    compile: bool
    batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    tokens_per_micro_batch: int | None
    packing: str
    attn_implementation: str | None
    use_peft: bool
    peft: dict[str, Any]
    build: dict[str, Any] | None
    build_seed: int
    num_layers: int | None
    block_class: str | None
    pickled_weights: bool = False  # with a default: a stored run may be older

    def __post_init__(self) -> None:
        for key in ("policy_dtype", "master_dtype"):
            one_of(f"model.{key}", getattr(self, key), ("auto", "float32", "bfloat16"))
        require(
            (self.policy_dtype, self.master_dtype) != ("float32", "bfloat16"),
            "model.policy_dtype=float32 with model.master_dtype=bfloat16: weights stored in bfloat16 compute in it. "
            "Leave one of them at auto",
        )
        one_of("model.reference_dtype", self.reference_dtype, ("auto", "float32", "float16", "bfloat16"))
        for key in ("batch_size", "gradient_accumulation_steps", "eval_batch_size", "max_length"):
            require(getattr(self, key) >= 1, f"model.{key}={getattr(self, key)} must be at least 1")
        one_of("model.recompute", self.recompute, ("all", "cheap"))
        one_of("model.packing", self.packing, ("auto", "none", "rows", "prompts"))
        budget = self.tokens_per_micro_batch
        require(
            budget is None or budget >= 1,
            f"model.tokens_per_micro_batch={budget} must be at least 1 (or null: gradient_accumulation_steps says it)",
        )
        require(
            is_day(self.template_date),
            f"model.template_date={self.template_date!r} must be a day written YEAR-MONTH-DAY, e.g. 2024-07-26",
        )
        require(self.max_grad_norm > 0, f"model.max_grad_norm={self.max_grad_norm} must be above 0")
        require(
            0 < self.max_prompt_length < self.max_length,
            f"model.max_prompt_length={self.max_prompt_length} must be below model.max_length={self.max_length}: "
            "the rest is what a response may take",
        )
        require(
            self.batch_size % self.gradient_accumulation_steps == 0,
            f"model.batch_size={self.batch_size} (global, in examples) is not divisible by "
            f"model.gradient_accumulation_steps={self.gradient_accumulation_steps}",
        )
        known = ["lora_r", "lora_alpha", "lora_dropout", "target_modules"]
        check_keys(self.peft, known, "model.peft.")
        require(
            bool(self.name_or_path or self.load_from or self.from_checkpoint or self.build),
            "no model: set model.name_or_path (a folder or hub name), model.load_from, or choose another model=GROUP",
        )

    def of_folder(self, folder: str) -> "ModelConfig":
        """Return the same settings for another model: the weights, layers and tokenizer of a folder as they are."""
        return replace(
            self,
            name_or_path=folder,
            tokenizer_name_or_path=None,
            load_from=None,
            from_checkpoint=None,
            build=None,
            num_layers=None,
        )


@dataclass(frozen=True)
class DatasetConfig:
    """One entry of the `datasets` group: where the rows are and how they are read."""

    train: Place | None = None
    test: Place | None = None
    format: str = "auto"
    weight: float = 1.0
    supervise: str = "last"
    on_error: str = "refuse"
    special_tokens: str = "keep"

    def __post_init__(self) -> None:
        one_of("datasets.*.supervise", self.supervise, ("last", "all"))
        one_of("datasets.*.on_error", self.on_error, ("refuse", "drop"))
        one_of("datasets.*.special_tokens", self.special_tokens, ("keep", "split"))
        require(self.weight > 0, f"datasets.*.weight={self.weight} must be above 0")


@dataclass(frozen=True)
class Settings:
    """Everything one task gets: typed sections, and the plain resolved config to store beside its output."""

    run: RunConfig
    model: ModelConfig
    loss: Any
    datasets: dict[str, DatasetConfig]
    generation: GenerationConfig
    rollout: ResponderConfig
    cache: CacheConfig
    audit: AuditConfig
    evaluation: EvaluationConfig
    select: SelectConfig
    label: LabelConfig
    judge: JudgeConfig
    world: WorldConfig
    map: MapConfig
    estimate: EstimateConfig
    inspect: InspectConfig
    hub: HubConfig
    export: ExportConfig = ExportConfig()
    wandb: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)


@cache
def _typed_once(section: str, cls: Any, where: str) -> Any:
    """Type a section written as JSON: the stages of a pipeline share most of them."""
    return typed(json.loads(section), cls, where)


def _typed(section: dict[str, Any], cls: Callable[..., T], where: str = "") -> T:
    return _typed_once(json.dumps(section, default=str), cls, where)


def settings_from(raw: dict[str, Any]) -> Settings:
    """Type every section of the resolved root config but the loss, whose method says its types (with_loss)."""
    run_keys = [f.name for f in fields(RunConfig)]
    known = run_keys + [f.name for f in fields(Settings) if f.name not in ("run", "raw")] + ["pipeline", "dry_run"]
    check_keys(raw, known)
    if raw["exp_name"] is None:  # what looks at a run does not land in its folder
        raw = {**raw, "exp_name": "run" if raw["task"] == "train" else raw["task"]}
    run = _typed({k: v for k, v in raw.items() if k in run_keys}, RunConfig)
    for name in raw["datasets"] or {}:
        check_name("datasets.*: the name of a data set", str(name))
    check_keys(raw["wandb"], ["enabled", "mode", "project", "entity", "group"], "wandb.")
    return Settings(
        run=run,
        model=_typed(raw["model"], ModelConfig, "model."),
        loss=None,
        datasets={k: _typed(v, DatasetConfig, f"datasets.{k}.") for k, v in (raw["datasets"] or {}).items()},
        generation=_typed(raw["generation"], GenerationConfig, "generation."),
        rollout=_typed(raw["rollout"], ResponderConfig, "rollout."),
        cache=_typed(raw["cache"], CacheConfig, "cache."),
        audit=_typed(raw["audit"], AuditConfig, "audit."),
        evaluation=_typed(raw["evaluation"], EvaluationConfig, "evaluation."),
        select=_typed(raw["select"], SelectConfig, "select."),
        label=_typed(raw["label"], LabelConfig, "label."),
        judge=_typed(raw["judge"], JudgeConfig, "judge."),
        world=_typed(raw["world"], WorldConfig, "world."),
        map=_typed(raw.get("map") or {}, MapConfig, "map."),
        estimate=_typed(raw["estimate"], EstimateConfig, "estimate."),
        inspect=_typed(raw.get("inspect") or {}, InspectConfig, "inspect."),
        hub=_typed(raw.get("hub") or {}, HubConfig, "hub."),
        export=_typed(raw.get("export") or {}, ExportConfig, "export."),
        wandb=dict(raw["wandb"]),
        raw=raw,
    )


def with_loss(settings: Settings, loss_config: type) -> Settings:
    """Return the settings with the loss section typed by a method's Config class."""
    section = {k: v for k, v in settings.raw["loss"].items() if k not in ("name", "trainer")}
    return replace(settings, loss=typed(section, loss_config, "loss."))
