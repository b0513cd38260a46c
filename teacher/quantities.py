"""The table of what a teacher can be asked for: a row a quantity. Format, writer and reader follow from it.

To add one: a row here, a function of the same name in teacher/scoring.py, its line in docs/cache_format.md.
Letters: L response tokens of a sequence, K entries a token.
"""

from typing import NamedTuple

import numpy as np

from settings.teacher_sections import CacheConfig
from settings.typed import nearest


class Array(NamedTuple):
    """One array of a quantity: [L, K] where it is wide, else [L]. dtype None: token ids, as small as they fit."""

    name: str
    dtype: str | None
    wide: bool

    def dtype_for(self, vocab_size: int) -> np.dtype:
        """Return the dtype on disk."""
        return np.dtype(self.dtype or ("uint16" if vocab_size <= 65536 else "int32"))


class Quantity(NamedTuple):
    """A row: what is stored of each response token, how many models are asked, who can be asked, in which precision.

    policy_path: the model is run as a policy is (policy_dtype), because its numbers are compared with a policy's;
    else as a teacher, in its own precision with a float32 last layer (teacher/precision.py).
    """

    name: str
    arrays: tuple[Array, ...]
    num_models: int = 1
    backends: tuple[str, ...] = ("hf",)
    policy_path: bool = False

    @property
    def is_wide(self) -> bool:
        """Tell whether K entries a token are stored, so that cache.top_k matters."""
        return any(array.wide for array in self.arrays)


class Entry(NamedTuple):
    """A sequence's entries of the two quantities with K ids: ids [L, K], values [L, K], tail [L] (mass outside the
    top k), teacher_logps [L, K] or None. A log-probability of -inf is no entry.

    Of a teacher with another tokenizer (teacher/spans.py) also spans [L], which of the sequence's M spans of several
    tokens a token is in (-1: none), and span_logps [M], the teacher's log-probability of each.
    """

    ids: np.ndarray
    values: np.ndarray
    tail: np.ndarray
    teacher_logps: np.ndarray | None = None
    spans: np.ndarray | None = None
    span_logps: np.ndarray | None = None


# float16 on disk only where its error was measured (docs/cache_format.md); log-probabilities of a reference are
# compared with a policy's at the same weights, and a log-sum-exp is as large as a logit: float32.
_TOP_K = (Array("ids", None, True), Array("values", "float16", True), Array("tail", "float16", False))
TABLE = (
    Quantity("logprob", _TOP_K, backends=("hf", "vllm", "server")),
    Quantity(
        "advantage",
        (*_TOP_K, Array("teacher_logps", "float16", True)),
        num_models=2,
        backends=("hf", "vllm", "server"),
    ),
    Quantity("token_logp", (Array("logps", "float32", False),), policy_path=True),
    Quantity("value", (Array("values", "float32", False),)),
)


# Not to be asked for: what the first of two vLLM engines says until the second one was asked (teacher/vllm.py).
TOP_K = Quantity("top_k", (Array("ids", None, True), Array("values", "float32", True), Array("tail", "float32", False)))


def quantity_named(name: str, rows: tuple[Quantity, ...] = (*TABLE, TOP_K)) -> Quantity:
    """Return a row of the table; ValueError names the nearest one."""
    names = [row.name for row in rows]
    if name not in names:
        raise ValueError(f"cache.quantity={name!r} is not known.{nearest(name, names)}")
    return rows[names.index(name)]


def quantity_of(config: CacheConfig) -> Quantity:
    """Return what the `cache` section asks for: by default advantages where it names a second teacher, else
    log-probabilities. ValueError for keys that contradict each other.
    """
    second = config.reference_base_url if config.backend == "server" else config.reference
    key = "cache.reference_base_url" if config.backend == "server" else "cache.reference"
    default = "advantage" if second else "logprob"
    quantity = quantity_named(default if config.quantity == "auto" else config.quantity, TABLE)
    asked = f"cache.quantity={quantity.name}"
    if quantity.num_models == 2 and second is None:
        place = "URL" if config.backend == "server" else "FOLDER"
        raise ValueError(f"{asked} compares two teachers: set {key}={place} to the second one")
    if quantity.num_models == 1 and second is not None:
        raise ValueError(f"{asked} asks one model, and {key}={second} names a second: drop one")
    if quantity.num_models == 1 and config.beta != 1:
        raise ValueError(f"cache.beta={config.beta} is a factor on advantages: {asked} has none, leave it at 1")
    if config.backend not in quantity.backends:
        raise ValueError(
            f"cache.backend={config.backend} cannot give {asked} (models asked: {quantity.num_models}): "
            f"use cache.backend={quantity.backends[0]}"
        )
    return quantity
