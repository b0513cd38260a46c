"""The sections of single tasks: generation, rollout, evaluation, select, judge, label, estimate, inspect.

Keys and comments stand in config/section/NAME.yaml; cache and audit are in teacher_sections.py, world
and map in world_sections.py.
"""

import re
from dataclasses import dataclass, field

from settings.tasks import ESTIMATED
from settings.typed import Code, Place, check_name, check_seed, one_of, require

SERVER_URL = re.compile(r"https?://[^@/]+(/[^@]*)?$")


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
    teacher: Place | None
    check_rows: int
    max_logp_gap: float
    tensor_parallel: int
    kv_cache_gb: float | None
    base_url: str | None
    model_name: str | None
    concurrency: int
    timeout: float
    retries: int
    text_responses: str
    prompts_as: str = "ids"  # with a default: a stored run may be older

    def __post_init__(self) -> None:
        one_of("generation.backend", self.backend, ("auto", "vllm", "hf", "openai"))
        one_of("generation.text_responses", self.text_responses, ("refuse", "tokenize"))
        one_of("generation.prompts_as", self.prompts_as, ("ids", "text"))
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
        check_seed("generation.seed", self.seed)
        require(self.max_new_tokens >= 1, f"generation.max_new_tokens={self.max_new_tokens} must be at least 1")
        require(self.temperature >= 0, f"generation.temperature={self.temperature} must not be negative (0 = greedy)")
        require(0 < self.top_p <= 1, f"generation.top_p={self.top_p} must be in (0, 1]")
        require(self.n >= 1 and self.batch_size >= 1, "generation.n and generation.batch_size must be at least 1")
        require(
            self.n == 1 or self.temperature > 0,
            f"generation.n={self.n} at temperature 0 would give {self.n} equal responses: set generation.temperature",
        )

    def _check_server(self) -> None:
        require(
            self.backend != "openai" or bool(SERVER_URL.match(self.base_url or "")),
            "generation.backend=openai needs generation.base_url=http://HOST:PORT/v1 (without a key or password in "
            f"it), got {self.base_url!r}",
        )
        require(self.concurrency >= 1, f"generation.concurrency={self.concurrency} must be at least 1")
        require(self.timeout > 0, f"generation.timeout={self.timeout} must be above 0")
        require(self.retries >= 0, f"generation.retries={self.retries} must not be negative")
        require(
            self.backend == "openai" or not (self.base_url or self.model_name),
            f"generation.base_url and generation.model_name are for generation.backend=openai, not {self.backend}",
        )
        require(
            self.prompts_as == "ids" or self.text_responses == "tokenize",
            "generation.prompts_as=text is for a server that knows no token ids (llama_cpp.server), which gives none "
            "back either: set generation.text_responses=tokenize, too",
        )
        require(
            not (self.calculator and self.text_responses == "tokenize"),
            "generation.calculator=true works on token ids: leave generation.text_responses=refuse",
        )
        require(
            self.backend != "openai" or self.text_responses == "refuse" or self.top_k <= 0,
            "generation.text_responses=tokenize asks only for what every server knows, and "
            f"generation.top_k={self.top_k} is not among it",
        )


@dataclass(frozen=True)
class ResponderConfig:
    """The `rollout` section: who answers while the policy trains."""

    backend: str
    refresh_every: int
    kv_cache_gb: float | None
    check_rows: int
    max_logp_gap: float

    def __post_init__(self) -> None:
        one_of("rollout.backend", self.backend, ("hf", "vllm"))
        require(self.refresh_every >= 1, f"rollout.refresh_every={self.refresh_every} must be at least 1")
        require(
            self.refresh_every == 1 or self.backend == "vllm",
            f"rollout.refresh_every={self.refresh_every}: with rollout.backend=hf the policy itself answers, as it "
            "stands at every step. Set rollout.backend=vllm",
        )
        require(
            self.kv_cache_gb is None or self.kv_cache_gb > 0,
            f"rollout.kv_cache_gb={self.kv_cache_gb} must be above 0 (or null)",
        )
        require(self.check_rows >= 0, f"rollout.check_rows={self.check_rows} must not be negative (0: no check)")
        require(self.max_logp_gap > 0, f"rollout.max_logp_gap={self.max_logp_gap} must be above 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """The `evaluation` section: which models, judged how."""

    models: dict[str, Place]
    verifier: Code | None
    temperatures: list[float]
    max_new_tokens: int
    batch_size: int
    opponent: str | None
    reward_model: Place | None
    judge: bool
    reward_accuracy: bool
    reference: dict[str, Place]
    majority: int
    n_samples: int
    match_entropy: str | None
    match_prompts: int
    calculator: bool
    refusal_phrases: list[str]
    advantages: Place | None
    comparisons: list[list[str]]
    latency: bool
    latency_backends: list[str]
    latency_batch_sizes: list[int]
    latency_new_tokens: int
    latency_repetitions: int
    latency_kv_cache_gb: float | None
    lm_eval: list[str]
    lm_eval_path: Place | None
    lm_eval_chat_template: bool
    served: list[str] = field(default_factory=list)  # with a default: a stored run may be older

    def __post_init__(self) -> None:
        for name in self.models:
            check_name("evaluation.models: the name of a model", str(name))
        require(
            self.opponent is None or self.opponent in self.models,
            f"evaluation.opponent={self.opponent!r} is not among evaluation.models ({', '.join(self.models)})",
        )
        require(
            self.opponent is not None or not (self.reward_model or self.judge),
            "evaluation.reward_model and evaluation.judge compare with an opponent: set evaluation.opponent to one of "
            "evaluation.models",
        )
        for name in self.served:
            require(name in self.models, f"evaluation.served names {name!r}, which is no model of evaluation.models")
        for name in self.reference:
            require(name in self.models, f"evaluation.reference.{name} names no model of evaluation.models")
        require(
            self.majority >= 0 and self.majority != 1,
            f"evaluation.majority={self.majority}: 0 is none, else at least 2 votes",
        )
        require(
            not self.majority or self.verifier is not None,
            f"evaluation.majority={self.majority} needs evaluation.verifier",
        )
        self._check_samples()
        for phrase in self.refusal_phrases:
            require(
                bool(phrase.strip()),
                "evaluation.refusal_phrases holds an empty phrase: every response would be a refusal",
            )
        for pair in self.comparisons:
            require(
                len(pair) == 2 and pair[0] != pair[1],
                f"evaluation.comparisons holds {pair}: an entry is two different models, [first, second]",
            )
        self._check_latency()
        require(
            bool(self.lm_eval) or self.lm_eval_path is None,
            f"evaluation.lm_eval_path={self.lm_eval_path} holds task files, but evaluation.lm_eval names no task: "
            "evaluation.lm_eval=[TASK]",
        )

    def _check_samples(self) -> None:
        require(self.n_samples >= 1, f"evaluation.n_samples={self.n_samples} must be at least 1")
        require(
            self.n_samples == 1 or any(self.temperatures),
            f"evaluation.n_samples={self.n_samples} needs a temperature above 0 in evaluation.temperatures: "
            "greedy responses are all the same",
        )
        require(self.match_prompts >= 1, f"evaluation.match_prompts={self.match_prompts} must be at least 1")
        if self.match_entropy is None:
            return
        require(
            self.match_entropy in self.models,
            f"evaluation.match_entropy={self.match_entropy!r} is not among evaluation.models "
            f"({', '.join(self.models)})",
        )
        require(
            any(self.temperatures) and (1.0 in self.temperatures or self.temperatures[0] > 0),
            f"evaluation.match_entropy={self.match_entropy} takes that model's entropy at temperature 1, or at the "
            f"first of evaluation.temperatures={self.temperatures}, which must be above 0",
        )

    def _check_latency(self) -> None:
        for name in self.latency_backends:
            one_of("evaluation.latency_backends", name, ("hf", "vllm"))
        require(
            not self.latency or bool(self.latency_backends and self.latency_batch_sizes),
            "evaluation.latency=true needs evaluation.latency_backends and evaluation.latency_batch_sizes, and one of "
            "them is empty",
        )
        for size in self.latency_batch_sizes:
            require(size >= 1, f"evaluation.latency_batch_sizes={self.latency_batch_sizes}: each must be at least 1")
        require(
            self.latency_new_tokens >= 2,
            f"evaluation.latency_new_tokens={self.latency_new_tokens} must be at least 2: the first is the prompt's",
        )
        require(
            self.latency_repetitions >= 2,
            f"evaluation.latency_repetitions={self.latency_repetitions} must be at least 2, for percentiles",
        )


@dataclass(frozen=True)
class SelectConfig:
    """The `select` section: what is made of sampled responses."""

    make: str
    generations: Place | None
    verifier: Code | None
    pairs_per_prompt: int
    holdout: float
    max_similarity: float
    earlier: list[Place]

    def __post_init__(self) -> None:
        one_of("select.make", self.make, ("pairs", "distinct"))
        require(self.pairs_per_prompt >= 1, f"select.pairs_per_prompt={self.pairs_per_prompt} must be at least 1")
        require(0 <= self.holdout < 1, f"select.holdout={self.holdout} must be in [0, 1): a share of the questions")
        require(0 < self.max_similarity <= 1, f"select.max_similarity={self.max_similarity} must be in (0, 1]")


@dataclass(frozen=True)
class JudgeConfig:
    """The `judge` section: an OpenAI-compatible chat server that compares or scores responses."""

    base_url: str | None
    model_name: str | None
    temperature: float
    max_tokens: int
    concurrency: int
    timeout: float
    retries: int
    score_template: Place
    pair_template: Place
    on_error: str

    def __post_init__(self) -> None:
        one_of("judge.on_error", self.on_error, ("fail", "skip"))
        require(
            self.base_url is None or bool(re.match(r"https?://[^@/]+(/[^@]*)?$", self.base_url)),
            f"judge.base_url={self.base_url!r} must be http://HOST:PORT/v1 (without a key or password in it)",
        )
        require(self.temperature >= 0, f"judge.temperature={self.temperature} must not be negative")
        for key in ("max_tokens", "concurrency"):
            require(getattr(self, key) >= 1, f"judge.{key}={getattr(self, key)} must be at least 1")
        require(self.timeout > 0, f"judge.timeout={self.timeout} must be above 0")
        require(self.retries >= 0, f"judge.retries={self.retries} must not be negative")


@dataclass(frozen=True)
class LabelConfig:
    """The `label` section: which responses are scored, by whom, and what is made of the scores."""

    responses: Place | None
    verifier: Code | None
    reward_model: Place | None
    judge: bool
    make: str
    threshold: float
    margin: float
    batch_size: int
    on_error: str

    def __post_init__(self) -> None:
        one_of("label.make", self.make, ("scores", "pairs", "binary"))
        one_of("label.on_error", self.on_error, ("fail", "skip"))
        require(self.margin >= 0, f"label.margin={self.margin} must not be negative")
        require(self.batch_size >= 1, f"label.batch_size={self.batch_size} must be at least 1")

    def check_request(self) -> None:
        """Refuse a request without exactly one who scores the responses."""
        given = [key for key in ("verifier", "reward_model", "judge") if getattr(self, key)]
        require(
            len(given) == 1,
            "task=label needs one of label.verifier=module:function, label.reward_model=FOLDER, label.judge=true; "
            f"given: {', '.join(given) or 'none'}",
        )


@dataclass(frozen=True)
class EstimateConfig:
    """The `estimate` section: what is estimated, and what it is to run on."""

    of: str
    run: Place | None
    devices: int | None
    strategy: str
    accelerator: str
    device_memory_gb: float | None
    tokens: float | None
    response_share: float
    rows: int | None
    lengths: str
    tokens_per_second: float | None
    flops_per_second_per_device: float | None
    utilization: float
    measure: bool

    def __post_init__(self) -> None:
        one_of("estimate.of", self.of, ESTIMATED)
        one_of("estimate.strategy", self.strategy, ("auto", "none", "ddp", "fsdp"))
        one_of("estimate.accelerator", self.accelerator, ("auto", "gpu", "cpu"))
        one_of("estimate.lengths", self.lengths, ("auto", "tokens", "text"))
        for key in (
            "devices",
            "device_memory_gb",
            "tokens",
            "rows",
            "tokens_per_second",
            "flops_per_second_per_device",
        ):
            value = getattr(self, key)
            require(value is None or value > 0, f"estimate.{key}={value} must be above 0 (or null)")
        for key in ("response_share", "utilization"):
            require(0 < getattr(self, key) <= 1, f"estimate.{key}={getattr(self, key)} must be in (0, 1]")
        require(
            self.strategy != "none" or self.devices in (None, 1),
            f"estimate.strategy=none runs on one device, estimate.devices={self.devices}: choose ddp or fsdp",
        )


@dataclass(frozen=True)
class HubConfig:
    """The `hub` section: what is pushed to the Hugging Face hub, and what is taken from it."""

    push: str | None = None
    private: bool = True
    folder: Place | None = None
    results: Place | None = None
    pull: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for key in ("push", "pull"):
            name = getattr(self, key)
            fits = name is None or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
            require(bool(fits), f"hub.{key}={name!r} must be OWNER/NAME, letters, digits, '-', '_' and '.'")


@dataclass(frozen=True)
class InspectConfig:
    """The `inspect` section: how much task=inspect shows. The defaults serve stored runs that have no such section."""

    rows: int = 3
    ngram: int = 8
    near: float = 0.8

    def __post_init__(self) -> None:
        require(self.rows >= 0, f"inspect.rows={self.rows} must not be negative")
        require(self.ngram >= 2, f"inspect.ngram={self.ngram} must be at least 2 words")
        require(0 < self.near <= 1, f"inspect.near={self.near} must be in (0, 1]")
