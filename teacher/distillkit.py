"""DistillKit's compressed log-probabilities (`logprob_compressor`): rows of bytes with a compression_config.yaml.

    input_ids             [T]
    compressed_logprobs   [T][bytes]   row j: the k largest log-probabilities of token j + 1, descending
    bytepacked_indices    [T][bytes]   their ids, ceil(log2 d) bits each
    labels                [T]          where it is there: row j counts if labels[j] is not -100

Its sampler writes T - 1 rows and no labels, its losses want as many rows as logits. They mask row j by label j, so what
is written here has the label of token j + 1 in place j; read is either.

A row of compressed_logprobs is, in this order: exact_k values as exact_dtype; a coefficient as term_dtype for each of
polynomial_terms, which give the other k - exact_k values; then for each of residual_bins a scale as scale_dtype and
num_elements integers of element_bits, which correct them. Numbers are little-endian, bits run from the highest to the
lowest, and every part begins at a byte. Read: all of it but error_diffusion, which changes writing alone. Written:
exact_k = k in float32, which loses nothing.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from teacher.cache import Arrays, Meta
from teacher.rows import Columns, Foreign, Row, Shape, entries, filled, source_rows, with_tail

CONFIG = "compression_config.yaml"
UNLABELED = -100
WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SPECIAL = {"sqrt": np.sqrt, "exp": np.exp}


class Compression(NamedTuple):
    """The keys of compression_config.yaml that say what the bytes mean."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[tuple[str, int, int], ...] = ()  # scale_dtype, element_bits, num_elements
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def index_bits(self) -> int:
        """Return the bits of an id."""
        return math.ceil(math.log2(self.d))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row of compressed_logprobs."""
        exact = self.exact_k * WIDTHS[self.exact_dtype] + len(self.polynomial_terms) * WIDTHS[self.term_dtype]
        return exact + sum(WIDTHS[dtype] + (bits * count + 7) // 8 for dtype, bits, count in self.residual_bins)


def compression_of(given: Mapping[str, Any], where: str) -> Compression:
    """Type a compression config; ValueError for a key or a number that cannot be."""
    known = {*Compression._fields, "error_diffusion"}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{where}: the key {unknown[0]!r} is not known of DistillKit's logprob_compressor")
    missing = [key for key in ("d", "k", "exact_k") if key not in given]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    values = {key: value for key, value in given.items() if key != "error_diffusion"}
    values["polynomial_terms"] = tuple(values.get("polynomial_terms") or ())
    values["residual_bins"] = tuple(
        (b["scale_dtype"], b["element_bits"], b["num_elements"]) for b in values.get("residual_bins") or ()
    )
    found = Compression(**values)
    names = [found.exact_dtype, found.term_dtype, *(dtype for dtype, _, _ in found.residual_bins)]
    wrong = [name for name in names if name not in WIDTHS]
    wrong += [str(t) for t in found.polynomial_terms if not isinstance(t, int) and t not in SPECIAL]
    if wrong or not 0 <= found.exact_k <= found.k or found.d < 2:
        raise ValueError(f"{where}: cannot be read: {wrong[0] if wrong else found}")
    return found


# ---- bytes


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers [N, n] of so many bits into bytes [N, ceil(n bits / 8)], the highest bit first."""
    spread = (values.astype(np.uint64)[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint64)) & np.uint64(1)
    return np.packbits(spread.astype(np.uint8).reshape(len(values), -1), axis=-1)


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the integers [N, count] of pack_bits."""
    flat = np.unpackbits(packed, axis=-1, count=bits * count).reshape(len(packed), count, bits)
    return flat.astype(np.uint64) @ (np.uint64(1) << np.arange(bits - 1, -1, -1, dtype=np.uint64))


def numbers(part: np.ndarray, dtype: str) -> np.ndarray:
    """Read bytes [N, n] as little-endian numbers [N, n / width], in float32 (float64 stays)."""
    part = np.ascontiguousarray(part)
    if dtype == "bfloat16":
        return (part.view("<u2").astype(np.uint32) << 16).view(np.float32)
    found = part.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype])
    return found if dtype == "float64" else found.astype(np.float32)


def decompressed(packed: np.ndarray, config: Compression) -> np.ndarray:
    """Return the log-probabilities [N, k] of rows of bytes [N, row_bytes]."""
    start = config.exact_k * WIDTHS[config.exact_dtype]
    exact = numbers(packed[:, :start], config.exact_dtype) if start else np.zeros((len(packed), 0), np.float32)
    rest = config.k - config.exact_k
    approximate = np.zeros((len(packed), rest), np.float32)
    if config.polynomial_terms:
        end = start + len(config.polynomial_terms) * WIDTHS[config.term_dtype]
        coefficients = numbers(packed[:, start:end], config.term_dtype)
        approximate += coefficients @ _terms(config, rest).T.astype(coefficients.dtype)
        start = end
    first = 0
    for dtype, bits, count in config.residual_bins:
        scale = numbers(packed[:, start : start + WIDTHS[dtype]], dtype)
        start += WIDTHS[dtype]
        end = start + (bits * count + 7) // 8
        levels = unpack_bits(packed[:, start:end], bits, count).astype(np.float32)
        levels = levels * 2 - 1 if bits == 1 else levels - 2 ** (bits - 1)
        approximate[:, first : first + count] += levels * scale
        start, first = end, first + count
    values = np.concatenate([exact, approximate], axis=-1)
    return (np.cumsum(values, axis=-1) if config.delta_encoding else values).astype(np.float32)


def _terms(config: Compression, count: int) -> np.ndarray:
    """Return the terms [count, terms] at the places t = 0, 1, ... (from 0 to 1 with normalize_t)."""
    t = np.linspace(0, 1, count) if config.normalize_t else np.arange(count, dtype=np.float64)
    columns = [SPECIAL[term](t) if isinstance(term, str) else t**term for term in config.polynomial_terms]
    return np.stack(columns, axis=-1)


# ---- rows


def shape(meta: Meta) -> Shape:
    """Return the columns of a `logprob` cache; labels stand beside DistillKit's own."""
    import pyarrow as pa

    config = {
        "d": meta.vocab_size,
        "k": meta.k,
        "exact_k": meta.k,
        "exact_dtype": "float32",
        "polynomial_terms": None,
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
        "normalize_t": False,
    }
    packed = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("labels", pa.list_(pa.int64())),
            ("compressed_logprobs", packed),
            ("bytepacked_indices", packed),
        ]
    )
    lost = [
        "that prompts have no entries: DistillKit has a row for every token. Those with the label -100 are filler, "
        "every id alike; its losses that compare with a teacher mask them",
        "labels for its cross-entropy: row j has the label of token j + 1, by which those losses mask it; its "
        "cross-entropy would move labels by a token once more",
        "the mass outside the entries; it is what they leave of 1",
        "teacher, tokenizer, chat template and temperature: they stand in this card alone",
    ]
    return Shape(schema, lambda row: columns(row, meta.vocab_size, meta.k), {CONFIG: yaml.safe_dump(config)}, lost)


def columns(row: Row, vocab_size: int, k: int) -> Columns:
    """Lay a row out: the entries and the label of token t stand in row t - 1; tokens without any get filler."""
    ids = np.tile(np.arange(k), (len(row.ids), 1))
    logps = np.full(ids.shape, -math.log(vocab_size), np.float32)
    places = np.flatnonzero(row.response) - 1
    ids[places], logps[places] = filled(*entries(row.arrays), k)
    bits = math.ceil(math.log2(vocab_size))
    return {
        "input_ids": row.ids,
        "labels": [
            *(token if on else UNLABELED for token, on in zip(row.ids[1:], row.response[1:], strict=True)),
            UNLABELED,
        ],
        "compressed_logprobs": np.ascontiguousarray(logps.astype("<f4")).view(np.uint8).tolist(),
        "bytepacked_indices": pack_bits(ids, bits).tolist(),
    }


def read(source: Path) -> Foreign:
    """Open rows with their compression_config.yaml; without labels the mask is that of this run's data."""
    file = (source if source.is_dir() else source.parent) / CONFIG
    if not file.is_file():
        raise ValueError(
            f"{source} has no {CONFIG} beside it: write there the logprob_compressor section that it was captured with"
        )
    config = compression_of(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    notes = ["DistillKit's rows name no teacher, tokenizer or temperature: read as this run's tokenizer, temperature 1"]
    if config.exact_k < config.k:
        notes.append(f"{config.k - config.exact_k} of {config.k} values a token were approximated when captured")
    shift = _shift(source)

    def rows() -> Iterator[tuple[str, list[int], list[bool] | None, Arrays]]:
        for where, row in source_rows(source):
            arrays = _arrays(row, config, where)
            if row.get("labels") is None:
                yield where, row["input_ids"], None, arrays
                continue
            response = _response(row["input_ids"], row["labels"], shift, where)
            chosen = np.asarray(response[1:], dtype=bool)
            yield where, row["input_ids"], response, {name: array[chosen] for name, array in arrays.items()}

    return Foreign(rows, notes, {})


def _shift(source: Path) -> int:
    """Return how many places before its token a label stands, 1 or 0, by the first row that tells them apart."""
    for where, row in source_rows(source):
        if row.get("labels") is None:
            return 0
        fit = _fitting(row["input_ids"], row["labels"])
        if not fit:
            raise ValueError(f"{where}: labels are neither the row's own input_ids nor those of the next token")
        if len(fit) == 1:
            return fit[0]
    return 1


def _fitting(ids: list[int], labels: list[int]) -> list[int]:
    """Return by how many places a row's labels may stand before their tokens."""
    if len(labels) != len(ids):
        return []
    found = []
    for shift in (0, 1):
        moved = [*ids[shift:], *[None] * shift]
        if all(label in (UNLABELED, token) for label, token in zip(labels, moved, strict=True)):
            found.append(shift)
    return found


def _response(ids: list[int], labels: list[int], shift: int, where: str) -> list[bool]:
    if shift not in _fitting(ids, labels):
        raise ValueError(f"{where}: labels do not stand {shift} before their tokens, as those of other rows do")
    labeled = [label != UNLABELED for label in labels]
    return [False, *labeled[:-1]] if shift else labeled


def _arrays(row: dict[str, Any], config: Compression, where: str) -> Arrays:
    """Return the entries [T - 1, k] of all tokens but the first."""
    count = len(row["input_ids"]) - 1
    packed, indices = (np.array(row[name], np.uint8) for name in ("compressed_logprobs", "bytepacked_indices"))
    wanted = (config.row_bytes, (config.k * config.index_bits + 7) // 8)
    for name, part, size in zip(("compressed_logprobs", "bytepacked_indices"), (packed, indices), wanted, strict=True):
        if part.ndim != 2 or len(part) < count or part.shape[1] != size:
            raise ValueError(
                f"{where}: {name} has the shape {part.shape}; {count + 1} tokens and {CONFIG} make ({count}, {size})"
            )
    logps = decompressed(packed[:count], config)
    ids = unpack_bits(indices[:count], config.index_bits, config.k).astype(np.int64)
    # An approximation may lie above 0, or sum to more than 1, by its own error.
    return with_tail(*filled(ids, np.minimum(logps, 0.0), logps > -99.0, config.k))
