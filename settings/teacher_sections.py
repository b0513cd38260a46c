"""The sections about a teacher's cache: cache, audit. Keys and comments stand in config/section/NAME.yaml."""

from dataclasses import dataclass

from settings.sections import SERVER_URL
from settings.typed import Place, one_of, require


@dataclass(frozen=True)
class CacheConfig:
    """The `cache` section: what a teacher scores, and how many entries are kept."""

    quantity: str  # a row of teacher/quantities.py, whose quantity_of checks it against the other keys
    reference: Place | None
    top_k: int
    mass: float | None
    codec: str
    responses: list[str]
    generations: Place | None
    split: str
    batch_size: int
    flush_seconds: float
    beta: float
    backend: str
    tensor_parallel: int
    kv_cache_gb: float | None
    base_url: str | None
    model_name: str | None
    reference_base_url: str | None
    reference_model_name: str | None
    given_ids: str
    probe_tolerance: float
    concurrency: int
    timeout: float
    retries: int
    import_from: Place | None
    import_format: str
    export_format: str | None
    export_to: str | None

    def __post_init__(self) -> None:
        one_of("cache.import_format", self.import_format, ("auto", "axolotl", "distillkit", "huggingface"))
        if self.export_format is not None:
            one_of("cache.export_format", self.export_format, ("axolotl", "distillkit", "huggingface"))
        require(
            self.export_to is None or self.export_format is not None,
            f"cache.export_to={self.export_to} says where, cache.export_format has to say as what: axolotl, distillkit "
            "or huggingface",
        )
        one_of("cache.split", self.split, ("train", "test"))
        one_of("cache.backend", self.backend, ("hf", "vllm", "server"))
        one_of("cache.given_ids", self.given_ids, ("binary", "whole_vocabulary"))
        self._check_server()
        require(self.tensor_parallel >= 1, f"cache.tensor_parallel={self.tensor_parallel} must be at least 1")
        require(1 <= self.top_k <= 65535, f"cache.top_k={self.top_k} must be in 1 to 65535")
        one_of("cache.codec", self.codec, ("compact", "none"))
        if self.mass is not None:
            require(0 < self.mass <= 1, f"cache.mass={self.mass} must be in (0, 1]")
            require(
                self.codec == "compact",
                f"cache.mass={self.mass} is of cache.codec=compact; cache.codec=none keeps cache.top_k entries",
            )
        require(self.batch_size >= 1, f"cache.batch_size={self.batch_size} must be at least 1")
        require(self.flush_seconds >= 0, f"cache.flush_seconds={self.flush_seconds} must not be negative")
        for name in self.responses:
            one_of("cache.responses", name, ("chosen", "rejected", "response"))

    def _check_server(self) -> None:
        urls = {"base_url": self.base_url, "reference_base_url": self.reference_base_url}
        names = {"model_name": self.model_name, "reference_model_name": self.reference_model_name}
        served = self.backend == "server"
        for key, value in {**urls, **names}.items():
            require(
                served or value is None, f"cache.{key}={value} is for cache.backend=server, not {self.backend}: drop it"
            )
        for key, value in urls.items():
            require(
                not served or (value is None and key != "base_url") or bool(SERVER_URL.match(value or "")),
                f"cache.backend=server needs cache.{key}=http://HOST:PORT/v1 (without a key or password in it), got "
                f"{value!r}",
            )
        require(
            not served or self.reference is None,
            f"cache.reference={self.reference} is a folder, and cache.backend=server asks a server for the second "
            "teacher, too: set cache.reference_base_url",
        )
        require(
            self.reference_model_name is None or self.reference_base_url is not None,
            f"cache.reference_model_name={self.reference_model_name} needs cache.reference_base_url",
        )
        require(self.probe_tolerance > 0, f"cache.probe_tolerance={self.probe_tolerance} must be above 0")
        require(self.concurrency >= 1, f"cache.concurrency={self.concurrency} must be at least 1")
        require(self.timeout > 0, f"cache.timeout={self.timeout} must be above 0")
        require(self.retries >= 0, f"cache.retries={self.retries} must not be negative")


def kept_mass(config: CacheConfig) -> float:
    """Return how much of a distribution the kept entries hold at least, where cache.top_k allows it."""
    return 1.0 if config.codec == "none" else 0.999 if config.mass is None else config.mass


@dataclass(frozen=True)
class AuditConfig:
    """The `audit` section: which cache is held against its teacher, and the bars that its verdict goes by."""

    cache: Place | None
    n_sequences: int
    student: Place | None
    precisions: list[str]
    worst: int
    max_error: float | None
    min_mass: float
    max_kl_gap: float
    min_cosine: float
    max_sign_errors: float

    def __post_init__(self) -> None:
        for name in self.precisions:
            one_of("audit.precisions", name, ("bfloat16", "float16"))
        require(self.n_sequences >= 1, f"audit.n_sequences={self.n_sequences} must be at least 1")
        require(self.worst >= 0, f"audit.worst={self.worst} must not be negative (0: no token is shown)")
        require(self.max_error is None or self.max_error > 0, f"audit.max_error={self.max_error} must be above 0")
        require(self.max_kl_gap > 0, f"audit.max_kl_gap={self.max_kl_gap} must be above 0")
        for key in ("min_mass", "min_cosine", "max_sign_errors"):
            require(0 <= getattr(self, key) <= 1, f"audit.{key}={getattr(self, key)} must be in [0, 1]")
