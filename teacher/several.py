"""The cached teachers of a method: one, a mixture of several, or one a row; with the student's tokenizer or another.

teacher/asking.py says at the start what is missing, by keys alone; `entry` reads what a row needs when a batch is made.
Another tokenizer's teacher is asked for the same conversation in its own tokens (teacher/spans.py lays them onto the
student's).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

import models
from dataloader import Tokens
from models import tokenizer_digest
from settings.schema import DatasetConfig, ModelConfig, one_of, require
from settings.typed import Place, Places
from teacher.cache import Reader
from teacher.hub import cache_folder
from teacher.lookup import check_held, entry_of, identity_of
from teacher.mixture import ABSENT, MIXTURES, mixed, named, shares, within
from teacher.quantities import Entry
from teacher.spans import MERGES, Aligned, aligned, laid_onto, response_ids, translation
from teacher.vocabulary import NOTHING, check_shared_ids


@dataclass(frozen=True)
class CachedTeachersConfig:
    """The keys of config/loss/dckd.yaml that say who the teachers are and how their tokens meet the student's."""

    teacher_cache: Places
    teacher_weights: Any
    mixture: str
    teacher_column: str | None
    alignment: str
    teacher_tokenizer: Place | None
    min_coverage: float
    span_loss: str
    span_merge: str
    hybrid_beta: float
    hybrid_weights: Any

    def __post_init__(self) -> None:
        one_of("loss.mixture", self.mixture, MIXTURES)
        one_of("loss.alignment", self.alignment, ("ids", "bytes"))
        one_of("loss.span_loss", self.span_loss, ("kl", "uld", "gold"))
        one_of("loss.span_merge", self.span_merge, MERGES)
        require(
            self.span_merge == "none" or self.span_loss != "kl",
            f"loss.span_merge={self.span_merge} multiplies distributions, and with loss.span_loss=kl a span is an "
            "event: it needs loss.span_loss=uld or gold",
        )
        require(0 <= self.min_coverage <= 1, f"loss.min_coverage={self.min_coverage} must be in [0, 1]")
        folders = self.folders
        require(
            bool(folders) and all(isinstance(folder, str) and folder for folder in folders.values()),
            f"loss.teacher_cache={self.teacher_cache} must be a CACHE folder, a list or a mapping of them",
        )
        require(
            self.teacher_column is None or isinstance(self.teacher_cache, dict),
            f"loss.teacher_column={self.teacher_column} names one teacher a row: give loss.teacher_cache as a mapping, "
            "e.g. 'loss.teacher_cache={math: FOLDER, code: FOLDER}'",
        )
        require(
            self.teacher_weights is None or (len(folders) > 1 and self.teacher_column is None),
            f"loss.teacher_weights={self.teacher_weights} mixes several teachers: give loss.teacher_cache as a list or "
            "a mapping, and no loss.teacher_column",
        )
        require(
            self.alignment == "ids" or self.teacher_tokenizer is not None,
            "loss.alignment=bytes needs loss.teacher_tokenizer=PATH, with which the teacher's cache was made",
        )
        require(
            self.span_loss == "kl" or self.alignment == "bytes",
            f"loss.span_loss={self.span_loss} compares tokenizers: it needs loss.alignment=bytes",
        )
        require(0 <= self.hybrid_beta <= 1, f"loss.hybrid_beta={self.hybrid_beta} must be in [0, 1]")
        self._check_hybrid()
        self.weights  # noqa: B018 (refused here, before a model loads)

    def _check_hybrid(self) -> None:
        """Refuse weights of GOLD's hybrid that are not two, or that nothing reads."""
        given, key = self.hybrid_weights, f"loss.hybrid_weights={self.hybrid_weights}"
        if given is None:
            return
        require(self.span_loss == "gold", f"{key} weighs the two parts of loss.span_loss=gold, and it is not set")
        numbers = isinstance(given, list) and all(isinstance(w, (int, float)) and w >= 0 for w in given)
        require(numbers and len(given) == 2 and sum(given) > 0, f"{key} must be two numbers from 0 on, not both 0")

    @property
    def folders(self) -> dict[str, str]:
        """Return the cache of each teacher by its name; in a list the names are numbers."""
        return named(self.teacher_cache)

    @property
    def weights(self) -> dict[str, float]:
        """Return each teacher's share of a mixture; they sum to 1."""
        return shares(list(self.folders), self.teacher_weights, "loss.teacher_cache")


class Wanted(NamedTuple):
    """A sequence of the student's, and the same in the tokens of those who are asked (None: they have none of it)."""

    tokens: Tokens
    asked: Tokens | None
    teachers: tuple[str, ...]
    aligned: Aligned | None


class CachedTeachers:
    """The readers of a method's teachers, and how their tokens become the student's."""

    def __init__(
        self,
        config: CachedTeachersConfig,
        quantity: str,
        tokenizer: Any,
        model: ModelConfig,
        datasets: Mapping[str, DatasetConfig],
    ) -> None:
        self.config, self.model, self.size = config, model, len(tokenizer)
        self.tokenizer = tokenizer
        self.special_tokens = {s: d.special_tokens for d in datasets.values() for s in (d.train, d.test) if s}
        if config.teacher_tokenizer is not None:
            self.tokenizer = models.load_tokenizer(replace(model, tokenizer_name_or_path=config.teacher_tokenizer))
        expected: dict[str, object] = {"quantity": quantity, "tokenizer_digest": tokenizer_digest(self.tokenizer)}
        decode = self.tokenizer.decode
        self.readers = {name: Reader(cache_folder(folder), expected, decode) for name, folder in config.folders.items()}
        widths = [reader.meta.k for reader in self.readers.values()]
        self.width = max(widths) if config.teacher_column is not None else sum(widths)
        self.between = None
        if config.alignment == "bytes":
            whole = [name for name, entry in datasets.items() if entry.supervise == "all"]
            require(not whole, f"loss.alignment=bytes aligns last turns: datasets.{whole[:1]} has supervise=all")
            self.between = translation(tokenizer, self.tokenizer)
        elif config.teacher_tokenizer is not None:
            check_shared_ids(tokenizer, self.tokenizer, f"loss.teacher_tokenizer={config.teacher_tokenizer}")

    def identity(self, names: Iterable[str] | None = None) -> bytes:
        """Return what tells the entries of these teachers (by default all) from those of others."""
        return b"".join(identity_of(self.readers[name]) for name in (self.readers if names is None else names))

    def aligned(self, own: Tokens, other: Tokens | None) -> Aligned | None:
        """Align a response in the student's tokens with itself in the teacher's; None if the tokenizer is the same."""
        if self.between is None:
            return None
        return aligned(self.between, response_ids(own), [] if other is None else response_ids(other))

    # ---- entries

    def stored(self, wanted: Wanted) -> "Together":
        """Find a sequence's entries by keys alone; ValueError shows what a cache has in their place."""
        if wanted.asked is not None:
            for name in wanted.teachers:
                check_held(self.readers[name], wanted.asked)
        return Together(self, wanted)

    def entry(self, wanted: Wanted) -> Entry:
        """Return the entries for a sequence's response tokens; ValueError shows what a cache has in its place."""
        if wanted.asked is None:
            return self._nothing(wanted)
        parts = [entry_of(self.readers[name], wanted.asked) for name in wanted.teachers]
        if len(parts) == 1:
            found = parts[0]
        else:
            found = mixed(parts, [self.config.weights[name] for name in wanted.teachers], self.config.mixture)
        found = self._widened(found)
        if self.between is None or wanted.aligned is None:
            return within(found, self.size)
        return laid_onto(wanted.aligned, found, self.between, self.config.span_loss, self.config.span_merge)

    def _widened(self, entry: Entry) -> Entry:
        """Fill up entries to the width of the widest: a batch may have rows of several teachers."""
        missing = self.width - entry.ids.shape[1]
        if missing <= 0:
            return entry
        ids, values = (
            np.pad(part, ((0, 0), (0, missing)), constant_values=fill)
            for part, fill in ((entry.ids, 0), (entry.values, ABSENT))
        )
        return entry._replace(ids=ids, values=values)

    def _nothing(self, wanted: Wanted) -> Entry:
        """Return entries that say nothing, of as many tokens as the response has."""
        length, width = wanted.tokens.num_supervised, self.width
        values = np.full((length, width), ABSENT, np.float32)
        spans = np.full(length, -1, np.int64)
        return Entry(
            np.zeros((length, width), np.int64), values, np.ones(length, np.float32), None, spans, values[:0, 0]
        )

    def shared(self) -> np.ndarray:
        """Return which of the student's ids [V] the teacher of another tokenizer has."""
        assert self.between is not None
        found = np.zeros(self.size, np.bool_)
        found[self.between.matches[self.between.matches != NOTHING]] = True
        return found

    def hybrid_weights(self) -> tuple[float, float]:
        """Return the weights of GOLD's two parts; by default the share of the teacher's ids that match and the rest."""
        assert self.between is not None
        if self.config.hybrid_weights is not None:
            first, second = self.config.hybrid_weights
            return first, second
        share = float((self.between.matches != NOTHING).mean())
        return share, 1 - share


class Together(NamedTuple):
    """A sequence's entries in the caches of its teachers, read when a batch is made."""

    teachers: CachedTeachers
    wanted: Wanted

    def read(self) -> Entry:
        """Read what each teacher says, as one."""
        return self.teachers.entry(self.wanted)

    def identity(self) -> bytes:
        """Return the identities of the caches that are asked."""
        return self.teachers.identity(self.wanted.teachers)
