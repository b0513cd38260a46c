"""DistillKit's rows: the bytes as it packs them, the rows that its losses count, labels, and its own files."""

import math
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from teacher import distillkit
from teacher.cache import Reader
from teacher.interchange import export_cache, import_cache
from tests.support.random_cache import SIZE, TOKENIZING, assert_same, write_cache


def bits_of(values: list[int], bits: int) -> list[int]:
    """Pack by hand: each value's bits, the highest first, then bytes."""
    text = "".join(format(value, f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def test_bits_are_packed_as_text_would_be():
    rng = np.random.default_rng(1)
    for bits in (1, 3, 9, 17):
        values = rng.integers(0, 2**bits, (4, 11))
        packed = distillkit.pack_bits(values, bits)
        assert packed.tolist() == [bits_of(row, bits) for row in values.tolist()]
        assert distillkit.unpack_bits(packed, bits, 11).tolist() == values.tolist()


BUDGET = {"d": SIZE, "k": 6, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"]}
RICH = {
    "d": SIZE,
    "k": 8,
    "exact_k": 2,
    "exact_dtype": "float16",
    "polynomial_terms": [0, 1],
    "term_dtype": "float32",
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 3, "num_elements": 3},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
    ],
    "delta_encoding": False,
}


def test_the_budget_configuration_is_read_as_its_polynomial():
    config = distillkit.compression_of(BUDGET | {"delta_encoding": False}, "x")
    coefficients = [-2.0, -0.25, -0.5]
    half = struct.unpack("<I", struct.pack("<f", -0.75))[0] >> 16
    packed = np.frombuffer(struct.pack("<H3f", half, *coefficients), np.uint8)[None]
    assert len(packed[0]) == config.row_bytes == 14
    expected = [-0.75] + [-2.0 - 0.25 * t - 0.5 * math.sqrt(t) for t in range(5)]
    np.testing.assert_allclose(distillkit.decompressed(packed, config)[0], expected, rtol=1e-6)


def test_residuals_and_deltas_are_read():
    levels, signs = [5, 0, 7], [1, 0]  # 3 bits: less 4; 1 bit: +1 or -1
    packed = struct.pack("<2e2f", -0.5, -1.0, -2.0, -0.5)
    packed += struct.pack("<e", 0.125) + bytes(bits_of(levels, 3)) + struct.pack("<f", 0.25) + bytes(bits_of(signs, 1))
    residual = [0.125 * (level - 4) for level in levels] + [0.25, -0.25, 0.0]
    expected = [-0.5, -1.0] + [-2.0 - 0.5 * t + residual[t] for t in range(6)]
    array = np.frombuffer(packed, np.uint8)[None]
    plain = distillkit.decompressed(array, distillkit.compression_of(RICH, "x"))[0]
    np.testing.assert_allclose(plain, expected, rtol=1e-6)
    summed = distillkit.decompressed(array, distillkit.compression_of(RICH | {"delta_encoding": True}, "x"))[0]
    np.testing.assert_allclose(summed, np.cumsum(expected), rtol=1e-6)
    normal = distillkit.compression_of(RICH | {"normalize_t": True, "residual_bins": []}, "x")
    scaled = distillkit.decompressed(array[:, : normal.row_bytes], normal)[0]
    np.testing.assert_allclose(scaled[2:], [-2.0 - 0.5 * t / 5 for t in range(6)], rtol=1e-6)


def test_every_row_that_distillkit_counts_has_the_entries_of_its_next_token(tmp_path):
    """Its losses lay row j beside logits j, want as many rows as logits, and mask row j by labels[j] >= 0."""
    ours = write_cache(tmp_path / "CACHE")
    export_cache(tmp_path / "CACHE", "distillkit", tmp_path / "out")
    config = distillkit.compression_of(yaml.safe_load((tmp_path / "out" / distillkit.CONFIG).read_text()), "x")
    masks = {tuple(ids): mask for ids, mask in ours.sequences(7)}
    for row in pq.read_table(tmp_path / "out/data/train-00000.parquet").to_pylist():
        ids = row["input_ids"]
        assert {len(row[name]) for name in row} == {len(ids)}
        counted = [j for j, label in enumerate(row["labels"]) if label >= 0]
        mask = masks[tuple(ids)]
        assert [j + 1 for j in counted] == [t for t, on in enumerate(mask) if on]
        entries, packed, indices = ours.get(ids, mask), *(np.array(row[n], np.uint8) for n in list(row)[2:])
        values = distillkit.decompressed(packed, config)[counted]
        own = distillkit.unpack_bits(indices, config.index_bits, config.k)[counted].astype(int)
        order = np.argsort(-entries["values"], axis=-1, kind="stable")
        assert (own == np.take_along_axis(entries["ids"], order, -1)).all()
        assert (values == np.take_along_axis(entries["values"], order, -1)).all()


def test_labels_may_stand_at_their_own_token_or_before_it_but_not_both_in_one_file(tmp_path):
    ours = write_cache(tmp_path / "CACHE")
    export_cache(tmp_path / "CACHE", "distillkit", tmp_path / "out")
    file = tmp_path / "out/data/train-00000.parquet"
    rows = pq.read_table(file).to_pylist()
    moved = [{**row, "labels": [distillkit.UNLABELED, *row["labels"][:-1]]} for row in rows]
    moved = [{name: row[name] if i < 2 else row[name][:-1] for i, name in enumerate(row)} for row in moved]
    schema = pq.read_schema(file)
    pq.write_table(pa.Table.from_pylist(moved, schema), file)
    import_cache(tmp_path / "out", "auto", tmp_path / "back", TOKENIZING, None)
    assert_same(ours, Reader(tmp_path / "back"), 1e-3)
    pq.write_table(pa.Table.from_pylist([rows[0], *moved[1:]], schema), file)
    with pytest.raises(ValueError, match=r"row \d: labels do not stand 1 before their tokens"):
        import_cache(tmp_path / "out", "auto", tmp_path / "mixed", TOKENIZING, None)
    rows[0]["labels"] = [7] * len(rows[0]["labels"])
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
    with pytest.raises(ValueError, match="neither the row's own input_ids nor those of the next token"):
        import_cache(tmp_path / "out", "auto", tmp_path / "wrong", TOKENIZING, None)


def test_rows_of_distillkit_itself_take_their_mask_from_this_run_s_data(tmp_path):
    write_cache(tmp_path / "CACHE")
    export_cache(tmp_path / "CACHE", "distillkit", tmp_path / "out")
    table = pq.read_table(tmp_path / "out/data/train-00000.parquet").drop_columns(["labels"])
    pq.write_table(table, tmp_path / "out/data/train-00000.parquet")
    with pytest.raises(ValueError, match=r"no labels say which tokens are supervised. Name the data"):
        import_cache(tmp_path / "out", "auto", tmp_path / "back", TOKENIZING, None)
    ours = Reader(tmp_path / "CACHE")
    masks = {tuple(ids): mask for ids, mask in ours.sequences(7)}
    import_cache(tmp_path / "out", "auto", tmp_path / "back", TOKENIZING, masks)
    assert_same(ours, Reader(tmp_path / "back"), 1e-3)
    (tmp_path / "out" / distillkit.CONFIG).unlink()
    with pytest.raises(ValueError, match="has no compression_config.yaml beside it"):
        import_cache(tmp_path / "out", "auto", tmp_path / "again", TOKENIZING, masks)
