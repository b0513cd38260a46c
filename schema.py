"""Typed configuration: YAML holds values and comments, these flat frozen dataclasses hold types and checks.

`typed` turns a plain section into its dataclass once; after that no DictConfig exists. Everything that can be
refused is refused here, before a model loads: the message names the key, the value seen and what to do.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")

# Spellings of neighbouring projects, with ours beside them.
OTHER_SPELLINGS = {
    "train_datasets": "datasets=[NAME]",
    "test_datasets": "datasets.NAME.test=PATH",
    "config": "the key itself, without `config.`",
    "loss_fn": "loss=NAME",
    "learning_rate": "lr",
    "num_train_epochs": "n_epochs",
    "per_device_train_batch_size": "model.batch_size (global, in examples)",
    "output_dir": "cache_dir and exp_name",
}


def nearest(name: str, known: list[str]) -> str:
    """Return ' Did you mean ...?' for the closest of the known names, or the list of them."""
    if name in OTHER_SPELLINGS:
        return f" Here it is spelt: {OTHER_SPELLINGS[name]}."
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def typed(section: Mapping[str, Any], cls: type[T], where: str = "") -> T:
    """Build the frozen dataclass `cls` from a plain mapping.

    Raises ValueError for an unknown key (the nearest one is named), a missing one, or a value of another type.
    """
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    unknown = [str(key) for key in section if key not in known]
    if unknown:
        raise ValueError(f"unknown key {where + unknown[0]!r}.{nearest(unknown[0], known)}")
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.name not in section and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]} has no value: set it in the YAML or on the command line")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), dict(section))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (ConfigKeyError, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None) or "?"
        seen = section.get(str(key).split(".")[0])
        detail = str(error).splitlines()[0]
        raise ValueError(f"{where}{key}: {detail} (value seen: {seen!r})") from error


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    require(value in choices, f"{key}={value!r} is not known; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class RunConfig:
    """The keys at the root of the configuration: the run, the schedule and the optimizer."""

    task: str
    exp_name: str
    run_count: str | None
    cache_dir: str
    seed: int
    debug: bool
    lr: float
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
    load_reference_logprobs: str | None
    sync_reference: int
    sync_reference_rate: float
    strategy: str
    sweep: str | None

    def __post_init__(self) -> None:
        require(bool(self.exp_name), "exp_name must not be empty")
        require(self.lr > 0, f"lr={self.lr} must be above 0")
        require(self.n_epochs >= 1, f"n_epochs={self.n_epochs} must be at least 1")
        require(self.n_steps is None or self.n_steps >= 1, f"n_steps={self.n_steps} must be at least 1 (or null)")
        for key in ("n_examples", "n_eval_examples"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"{key}={value} must be at least 1 (or null for all)")
        for key in ("eval_every", "save_every", "log_every", "keep_last", "sync_reference"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must not be negative (0 switches it off)")
        require(
            0 < self.sync_reference_rate <= 1,
            f"sync_reference_rate={self.sync_reference_rate} must be in (0, 1] (1 copies the policy)",
        )
        require(self.warmup >= 0, f"warmup={self.warmup} must not be negative (below 1: a share of the steps)")
        require(len(self.betas) == 2, f"betas={self.betas} must be two numbers")
        one_of("optimizer", self.optimizer, ("AdamW", "Adam", "RMSprop", "SGD"))
        one_of("scheduler", self.scheduler, ("cosine", "constant", "linear"))
        one_of("strategy", self.strategy, ("auto", "none", "ddp", "fsdp", "deepspeed"))
        require(
            not (self.cache_reference_logprobs and self.load_reference_logprobs),
            "cache_reference_logprobs=true and load_reference_logprobs are two ways to one thing: give only one",
        )

    @property
    def run_dir(self) -> Path:
        """Return cache_dir/exp_name[/run_count], where everything of this run lands."""
        base = Path(self.cache_dir).expanduser() / self.exp_name
        return base / self.run_count if self.run_count else base


@dataclass(frozen=True)
class ModelConfig:
    """The `model` group: what to load, in which precision, and how it is batched."""

    name_or_path: str | None
    tokenizer_name_or_path: str | None
    load_from: str | None
    from_checkpoint: str | None
    policy_dtype: str
    reference_dtype: str
    master_dtype: str
    max_grad_norm: float
    max_length: int
    max_prompt_length: int
    activation_checkpointing: bool
    compile: bool
    batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    attn_implementation: str | None
    use_peft: bool
    peft: dict[str, Any]
    build: dict[str, Any] | None
    build_seed: int
    num_layers: int | None
    block_class: str | None

    def __post_init__(self) -> None:
        for key in ("policy_dtype", "reference_dtype", "master_dtype"):
            one_of(f"model.{key}", getattr(self, key), ("auto", "float32", "bfloat16"))
        for key in ("batch_size", "gradient_accumulation_steps", "eval_batch_size", "max_length"):
            require(getattr(self, key) >= 1, f"model.{key}={getattr(self, key)} must be at least 1")
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
        for key in self.peft:
            require(key in known, f"unknown key 'model.peft.{key}'.{nearest(key, known)}")
        require(
            bool(self.name_or_path or self.load_from or self.from_checkpoint or self.build),
            "no model: set model.name_or_path (a folder or hub name), model.load_from, or choose another model=GROUP",
        )


@dataclass(frozen=True)
class DatasetConfig:
    """One entry of the `datasets` group: where the rows are and how they are read."""

    train: str | None = None
    test: str | None = None
    format: str = "auto"
    weight: float = 1.0
    supervise: str = "last"

    def __post_init__(self) -> None:
        one_of("datasets.*.format", self.format, ("auto", "messages", "strings", "hh", "shp", "gsm8k"))
        one_of("datasets.*.supervise", self.supervise, ("last", "all"))
        require(self.weight > 0, f"datasets.*.weight={self.weight} must be above 0")


@dataclass(frozen=True)
class GenerationConfig:
    """The `generation` section: how responses are sampled."""

    backend: str
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    n: int
    batch_size: int
    split: str
    seed: int
    calculator: bool
    teacher: str | None
    check_rows: int
    max_logp_gap: float
    tensor_parallel: int
    kv_cache_gb: float | None
    base_url: str | None
    model_name: str | None
    concurrency: int
    timeout: float
    retries: int
    text_replies: str

    def __post_init__(self) -> None:
        one_of("generation.backend", self.backend, ("auto", "vllm", "hf", "openai"))
        one_of("generation.text_replies", self.text_replies, ("refuse", "tokenise"))
        self._check_server()
        require(self.tensor_parallel >= 1, f"generation.tensor_parallel={self.tensor_parallel} must be at least 1")
        require(
            self.tensor_parallel == 1 or self.backend in ("auto", "vllm"),
            f"generation.tensor_parallel={self.tensor_parallel} is for generation.backend=vllm, not {self.backend}",
        )
        require(
            self.kv_cache_gb is None or self.kv_cache_gb > 0,
            f"generation.kv_cache_gb={self.kv_cache_gb} must be above 0 (or null)",
        )
        require(self.check_rows >= 0, f"generation.check_rows={self.check_rows} must not be negative (0: no check)")
        require(self.max_logp_gap > 0, f"generation.max_logp_gap={self.max_logp_gap} must be above 0")
        one_of("generation.split", self.split, ("train", "test"))
        require(self.max_new_tokens >= 1, f"generation.max_new_tokens={self.max_new_tokens} must be at least 1")
        require(self.temperature >= 0, f"generation.temperature={self.temperature} must not be negative (0 = greedy)")
        require(0 < self.top_p <= 1, f"generation.top_p={self.top_p} must be in (0, 1]")
        require(self.n >= 1 and self.batch_size >= 1, "generation.n and generation.batch_size must be at least 1")
        require(
            self.n == 1 or self.temperature > 0,
            f"generation.n={self.n} at temperature 0 would give {self.n} equal replies: set generation.temperature",
        )

    def _check_server(self) -> None:
        require(
            self.backend != "openai" or bool(re.match(r"https?://[^@/]+(/[^@]*)?$", self.base_url or "")),
            f"generation.backend=openai needs generation.base_url=http://HOST:PORT/v1 (without a key or password in it), got {self.base_url!r}",
        )
        require(self.concurrency >= 1, f"generation.concurrency={self.concurrency} must be at least 1")
        require(self.timeout > 0, f"generation.timeout={self.timeout} must be above 0")
        require(self.retries >= 0, f"generation.retries={self.retries} must not be negative")
        require(
            self.backend == "openai" or not (self.base_url or self.model_name),
            f"generation.base_url and generation.model_name are for generation.backend=openai, not {self.backend}",
        )
        require(
            not (self.calculator and self.text_replies == "tokenise"),
            "generation.calculator=true works on token ids: leave generation.text_replies=refuse",
        )
        require(
            self.backend != "openai" or self.text_replies == "refuse" or self.top_k <= 0,
            f"generation.text_replies=tokenise asks only for what every server knows, and generation.top_k={self.top_k} is not among it",
        )


@dataclass(frozen=True)
class CacheConfig:
    """The `cache` section: what a teacher scores, and how many entries are kept."""

    reference: str | None
    top_k: int
    responses: list[str]
    generations: str | None
    split: str
    batch_size: int
    beta: float
    backend: str
    tensor_parallel: int
    kv_cache_gb: float | None

    def __post_init__(self) -> None:
        one_of("cache.split", self.split, ("train", "test"))
        one_of("cache.backend", self.backend, ("hf", "vllm"))
        require(self.tensor_parallel >= 1, f"cache.tensor_parallel={self.tensor_parallel} must be at least 1")
        require(
            self.backend == "hf" or self.reference is None,
            "cache.backend=vllm makes log-probability caches; for advantages (cache.reference) use cache.backend=hf",
        )
        require(self.top_k >= 1, f"cache.top_k={self.top_k} must be at least 1")
        require(self.batch_size >= 1, f"cache.batch_size={self.batch_size} must be at least 1")
        for name in self.responses:
            one_of("cache.responses", name, ("chosen", "rejected", "response"))


@dataclass(frozen=True)
class EvaluationConfig:
    """The `evaluation` section: which models, judged how."""

    models: dict[str, str]
    checker: str | None
    temperatures: list[float]
    max_new_tokens: int
    batch_size: int
    opponent: str | None
    reward_accuracy: bool
    reference: dict[str, str]
    majority: int
    calculator: bool
    refusal_phrases: list[str]
    advantages: str | None
    latency: bool
    latency_backends: list[str]
    latency_batch_sizes: list[int]
    latency_new_tokens: int
    latency_repetitions: int
    lm_eval: list[str]
    lm_eval_path: str | None
    lm_eval_chat_template: bool

    def __post_init__(self) -> None:
        require(
            self.opponent is None or self.opponent in self.models,
            f"evaluation.opponent={self.opponent!r} is not among evaluation.models ({', '.join(self.models)})",
        )
        for name in self.reference:
            require(name in self.models, f"evaluation.reference.{name} names no model of evaluation.models")
        require(self.majority >= 0 and self.majority != 1, f"evaluation.majority={self.majority}: 0 is none, else at least 2 votes")
        require(not self.majority or self.checker is not None, f"evaluation.majority={self.majority} needs evaluation.checker")
        for phrase in self.refusal_phrases:
            require(bool(phrase.strip()), "evaluation.refusal_phrases holds an empty phrase: every reply would be a refusal")
        self._check_latency()
        require(
            bool(self.lm_eval) or self.lm_eval_path is None,
            f"evaluation.lm_eval_path={self.lm_eval_path} holds task files, but evaluation.lm_eval names no task: evaluation.lm_eval=[TASK]",
        )

    def _check_latency(self) -> None:
        for name in self.latency_backends:
            one_of("evaluation.latency_backends", name, ("hf", "vllm"))
        require(
            not self.latency or bool(self.latency_backends and self.latency_batch_sizes),
            "evaluation.latency=true needs evaluation.latency_backends and evaluation.latency_batch_sizes, and one of them is empty",
        )
        for size in self.latency_batch_sizes:
            require(size >= 1, f"evaluation.latency_batch_sizes={self.latency_batch_sizes}: each must be at least 1")
        require(self.latency_new_tokens >= 2, f"evaluation.latency_new_tokens={self.latency_new_tokens} must be at least 2: the first is the prompt's")
        require(self.latency_repetitions >= 2, f"evaluation.latency_repetitions={self.latency_repetitions} must be at least 2, for percentiles")


@dataclass(frozen=True)
class SelectConfig:
    """The `select` section: what is made of sampled replies."""

    make: str
    generations: str | None
    checker: str | None
    pairs_per_prompt: int
    holdout: float
    max_similarity: float
    earlier: list[str]

    def __post_init__(self) -> None:
        one_of("select.make", self.make, ("pairs", "distinct"))
        require(self.pairs_per_prompt >= 1, f"select.pairs_per_prompt={self.pairs_per_prompt} must be at least 1")
        require(0 <= self.holdout < 1, f"select.holdout={self.holdout} must be in [0, 1): a share of the questions")
        require(0 < self.max_similarity <= 1, f"select.max_similarity={self.max_similarity} must be in (0, 1]")


@dataclass(frozen=True)
class EstimateConfig:
    """The `estimate` section: what is estimated, and what it is to run on."""

    of: str
    run: str | None
    devices: int | None
    strategy: str
    accelerator: str
    device_memory_gb: float | None
    tokens: float | None
    response_share: float
    rows: int | None
    tokens_per_second: float | None
    flops_per_second_per_device: float | None
    utilisation: float
    measure: bool

    def __post_init__(self) -> None:
        one_of("estimate.of", self.of, ("train", "cache", "generate"))
        one_of("estimate.strategy", self.strategy, ("auto", "none", "ddp", "fsdp"))
        one_of("estimate.accelerator", self.accelerator, ("auto", "gpu", "cpu"))
        for key in ("devices", "device_memory_gb", "tokens", "rows", "tokens_per_second", "flops_per_second_per_device"):
            value = getattr(self, key)
            require(value is None or value > 0, f"estimate.{key}={value} must be above 0 (or null)")
        for key in ("response_share", "utilisation"):
            require(0 < getattr(self, key) <= 1, f"estimate.{key}={getattr(self, key)} must be in (0, 1]")
        require(
            self.strategy != "none" or self.devices in (None, 1),
            f"estimate.strategy=none runs on one device, estimate.devices={self.devices}: choose ddp or fsdp",
        )


@dataclass(frozen=True)
class WorldConfig:
    """The `world` section: which generated world task=world writes."""

    name: str

    def __post_init__(self) -> None:
        one_of("world.name", self.name, ("shop", "arithmetic"))


@dataclass(frozen=True)
class Settings:
    """Everything one task gets: typed sections, and the plain resolved config to store beside its output."""

    run: RunConfig
    model: ModelConfig
    loss: Any
    datasets: dict[str, DatasetConfig]
    generation: GenerationConfig
    cache: CacheConfig
    evaluation: EvaluationConfig
    select: SelectConfig
    world: WorldConfig
    estimate: EstimateConfig
    wandb: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)


SECTIONS = ("model", "loss", "datasets", "generation", "cache", "evaluation", "select", "world", "estimate", "wandb", "pipeline", "dry_run")


def settings_from(raw: dict[str, Any], loss_config: type | None) -> Settings:
    """Type every section of the resolved root config.

    `loss_config` is the Config class of the trainer that `loss.trainer` names, or None for tasks without a loss.
    """
    run_keys = [f.name for f in fields(RunConfig)]
    for key in raw:
        if key not in run_keys and key not in SECTIONS:
            raise ValueError(f"unknown key {key!r}.{nearest(str(key), run_keys + list(SECTIONS))}")
    run = typed({k: v for k, v in raw.items() if k in run_keys}, RunConfig)
    known_wandb = ["enabled", "mode", "project", "entity", "group"]
    for key in raw["wandb"]:
        require(key in known_wandb, f"unknown key 'wandb.{key}'.{nearest(str(key), known_wandb)}")
    loss: Any = None
    if loss_config is not None:
        section = {k: v for k, v in raw["loss"].items() if k not in ("name", "trainer")}
        loss = typed(section, loss_config, "loss.")
    return Settings(
        run=run,
        model=typed(raw["model"], ModelConfig, "model."),
        loss=loss,
        datasets={k: typed(v, DatasetConfig, f"datasets.{k}.") for k, v in (raw["datasets"] or {}).items()},
        generation=typed(raw["generation"], GenerationConfig, "generation."),
        cache=typed(raw["cache"], CacheConfig, "cache."),
        evaluation=typed(raw["evaluation"], EvaluationConfig, "evaluation."),
        select=typed(raw["select"], SelectConfig, "select."),
        world=typed(raw["world"], WorldConfig, "world."),
        estimate=typed(raw["estimate"], EstimateConfig, "estimate."),
        wandb=dict(raw["wandb"]),
        raw=raw,
    )
