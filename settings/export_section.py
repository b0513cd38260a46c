"""The section of task=export: which file is made of a model. Keys and comments stand in config/section/export.yaml."""

from dataclasses import dataclass

from settings.typed import one_of, require

QUANTIZATIONS = ("none", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q5_0", "q4_0", "q3_k_m", "q2_k")


@dataclass(frozen=True)
class ExportConfig:
    """The `export` section. The defaults serve stored runs that have no such section."""

    format: str = "gguf"
    dtype: str = "auto"
    quantization: str = "none"
    keep_float: bool = False
    check: bool = True
    max_kl: float = 1e-3
    python: str | None = None

    def __post_init__(self) -> None:
        one_of("export.format", self.format, ("gguf",))
        one_of("export.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        one_of("export.quantization", self.quantization, QUANTIZATIONS)
        require(self.max_kl > 0, f"export.max_kl={self.max_kl} must be above 0 nats")
        require(
            not self.keep_float or self.quantization != "none",
            "export.keep_float=true keeps the float file beside a quantized one: export.quantization is none",
        )
