"""Axolotl's columns of its knowledge distillation plugin, one row a sequence, one target row a token.

    input_ids, attention_mask, labels (-100: not supervised)                      [T]
    target_token_ids, target_logprobs, target_mask                                [T][K]

Row j is the distribution over token j + 1 (its README, "Target alignment"): the last one is padding, as are rows whose
mask is 0. Older versions put the distribution of token j into row j; reading tells the two apart by the labels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from teacher.cache import Arrays, Meta
from teacher.rows import Columns, Foreign, Row, Shape, entries, filled, source_rows, with_tail

UNLABELED = -100
PADDING = -1e9  # what Axolotl's collator fills rows with
COLUMNS = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")
WHOLE = 1e-3  # probabilities that sum to 1 within this were renormalized


def shape(meta: Meta) -> Shape:
    """Return the columns of a `logprob` cache."""
    import pyarrow as pa

    flat, wide = pa.list_(pa.int64()), pa.list_(pa.list_(pa.float32()))
    schema = pa.schema(
        [
            ("input_ids", flat),
            ("attention_mask", flat),
            ("labels", flat),
            ("target_token_ids", pa.list_(flat)),
            ("target_logprobs", wide),
            ("target_mask", pa.list_(flat)),
        ]
    )
    lost = [
        "the mass outside the entries (kd_normalize_topk renormalizes them); it is what they leave of 1",
        "teacher, tokenizer, chat template and temperature: they stand in this card alone",
        "the key by which a sequence is found: Axolotl trains on input_ids and labels as they are",
    ]
    return Shape(schema, lambda row: columns(row, meta.k), {}, lost)


def columns(row: Row, k: int) -> Columns:
    """Lay a row out: the entries of supervised token t stand in row t - 1."""
    length = len(row.ids)
    ids = np.tile(np.arange(k), (length, 1))
    logps, mask = np.full((length, k), PADDING, np.float32), np.zeros((length, k), np.int64)
    own, values, kept = entries(row.arrays)
    places = np.flatnonzero(row.response) - 1
    own, values = filled(own, values, kept, k)
    ids[places], mask[places] = own, np.arange(k) < kept.sum(-1, keepdims=True)
    logps[places] = np.where(mask[places] > 0, values, PADDING)
    return {
        "input_ids": row.ids,
        "attention_mask": [1] * length,
        "labels": [token if on else UNLABELED for token, on in zip(row.ids, row.response, strict=True)],
        "target_token_ids": ids.tolist(),
        "target_logprobs": logps.tolist(),
        "target_mask": mask.tolist(),
    }


def read(source: Path) -> Foreign:
    """Open a file with these columns; which row a token's entries stand in is told by the first sequence."""
    notes = [
        "Axolotl's columns name no teacher, tokenizer or temperature: taken as this run's tokenizer, temperature 1"
    ]
    shift, renormalized = None, True
    for where, row in source_rows(source):
        shift = _alignment(row, where)
        arrays = _arrays(row, where, shift)
        renormalized = bool(arrays["tail"].max() < WHOLE) and arrays["ids"].shape[1] < 1000
        break
    assert shift is not None
    if shift == 0:
        notes.append("target row j belongs to token j, as older versions of Axolotl wrote it")
    if renormalized:
        notes.append("the entries of the first sequence sum to 1: they were renormalized, and the tail is not known")

    def rows() -> Iterator[tuple[str, list[int], list[bool] | None, Arrays]]:
        for where, row in source_rows(source):
            found = _arrays(row, where, _checked(_alignment(row, where), shift, where))
            yield where, row["input_ids"], [label != UNLABELED for label in row["labels"]], found

    return Foreign(rows, notes, {})


def _checked(found: int, first: int | None, where: str) -> int:
    if found != first:
        raise ValueError(f"{where}: target rows stand {found} before their token, in the first row it was {first}")
    return found


def _alignment(row: dict[str, Any], where: str) -> int:
    """Return how many places before its token a target row stands: 1, or 0 in older files."""
    missing = [name for name in COLUMNS if row.get(name) is None]
    if missing:
        raise ValueError(f"{where}: there is no column {missing[0]}, which says whose entries these are")
    labeled = [label != UNLABELED for label in row["labels"]]
    masked = [any(mask) for mask in row["target_mask"]]
    if len(masked) != len(labeled) or len(row["input_ids"]) != len(labeled):
        raise ValueError(
            f"{where}: {len(row['input_ids'])} input_ids, {len(labeled)} labels and {len(masked)} rows of target_mask"
        )
    if masked == [*labeled[1:], False]:
        return 1
    if masked == labeled:
        return 0
    raise ValueError(f"{where}: target_mask fits the labels neither one place before them nor at the same place")


def _arrays(row: dict[str, Any], where: str, shift: int) -> Arrays:
    """Return the entries of the supervised tokens."""
    places = [j - shift for j, label in enumerate(row["labels"]) if label != UNLABELED]
    found = [[row[name][j] for j in places] for name in COLUMNS[2:]]
    widths = {len(part[i]) for i in range(len(places)) for part in found}
    k = max(widths, default=0)
    if len(widths) != 1:
        sizes = [[len(part[i]) for part in found] for i in range(len(places))]
        if any(len(set(size)) != 1 for size in sizes):
            raise ValueError(f"{where}: target_token_ids, target_logprobs and target_mask differ in their entries")
        found = [[list(one) + [0] * (k - len(one)) for one in part] for part in found]
    ids, logps, kept = (np.array(part) for part in found)
    return with_tail(*filled(ids.astype(np.int64), logps.astype(np.float32), kept.astype(bool), k))
