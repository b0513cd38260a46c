"""A cache in the formats of neighboring projects and back, what each cannot hold, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import constants

import launch
from settings.artifacts import mark_done
from teacher import distillkit, hub
from teacher.cache import Meta, Reader, Writer, finish
from teacher.interchange import check_row, export_cache, format_of, import_cache
from teacher.rows import FILL, Row, filled, source_rows
from tests.support.helpers import composed, rows_of, write_pairs
from tests.support.random_cache import META, SIZE, TOKENIZING, K, assert_same, write_cache


@pytest.mark.parametrize("kind", ["axolotl", "distillkit", "huggingface"])
def test_a_log_probability_cache_survives_the_round_trip(kind, tmp_path):
    ours = write_cache(tmp_path / "CACHE")
    lost = export_cache(tmp_path / "CACHE", kind, tmp_path / "out")
    assert format_of(tmp_path / "out") == kind
    meta, notes = import_cache(tmp_path / "out", "auto", tmp_path / "back", TOKENIZING, None)
    # float16 rounds each of K probabilities by 2^-11 of itself, and the tail that is made of them once more
    assert_same(ours, Reader(tmp_path / "back", {"quantity": "logprob", "tokenizer_digest": "tok"}), 1e-3)
    header = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])["prefdistill"]
    assert header["k"] == K and header["tokenizer_digest"] == "tok" and header["num_sequences"] == 7
    if kind == "huggingface":
        assert not lost and not notes and meta.teacher_digest == "t"
    else:
        words = (tmp_path / "out/README.md").read_text()
        assert lost and all(line in words for line in lost)
        assert meta.teacher_digest.startswith("imported-") and "name no teacher, tokenizer or temperature" in notes[0]


@pytest.mark.parametrize("quantity", ["advantage", "token_logp", "value"])
def test_every_quantity_survives_as_a_hugging_face_data_set_and_the_others_refuse_it(quantity, tmp_path):
    ours = write_cache(tmp_path / "CACHE", quantity)
    export_cache(tmp_path / "CACHE", "huggingface", tmp_path / "out")
    import_cache(tmp_path / "out", "huggingface", tmp_path / "back", TOKENIZING, None)
    assert_same(ours, Reader(tmp_path / "back"), 0)
    for kind in ("axolotl", "distillkit"):
        with pytest.raises(ValueError, match=f"holds log-probabilities, this cache {quantity}"):
            export_cache(tmp_path / "CACHE", kind, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_library_of_data_sets_reads_the_export_and_what_it_saves_is_read(tmp_path):
    ours = write_cache(tmp_path / "CACHE")
    export_cache(tmp_path / "CACHE", "huggingface", tmp_path / "out")
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "hf"))
    assert found.num_rows == 7 and {"input_ids", "response", "ids", "values", "tail"} == set(found.column_names)
    found.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved/meta.json").write_text((tmp_path / "out/meta.json").read_text())
    import_cache(tmp_path / "saved", "auto", tmp_path / "back", TOKENIZING, None)
    assert_same(ours, Reader(tmp_path / "back"), 0)


# ---- Axolotl


def axolotl_row(shift: int = 1) -> dict[str, Any]:
    """Write by hand a row of five tokens, three of a response, and two entries each."""
    rows = {2: [[7, 8], [-0.5, -1.5]], 3: [[9, 4], [-0.25, -2.0]], 4: [[2, 3], [-0.75, -1.0]]}
    nothing = [[0, 0], [-1e9, -1e9]]
    places = {token - shift: row for token, row in rows.items()}
    return {
        "input_ids": [10, 11, 7, 9, 2],
        "attention_mask": [1] * 5,
        "labels": [-100, -100, 7, 9, 2],
        "target_token_ids": [places.get(j, nothing)[0] for j in range(5)],
        "target_logprobs": [places.get(j, nothing)[1] for j in range(5)],
        "target_mask": [[int(j in places)] * 2 for j in range(5)],
    }


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("shift", [1, 0])
def test_axolotl_rows_are_read_wherever_their_version_puts_a_token_s_entries(shift, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", axolotl_row(shift))
    _, notes = import_cache(source, "auto", tmp_path / "CACHE", TOKENIZING, None)
    found = Reader(tmp_path / "CACHE").get([10, 11, 7, 9, 2], [False, False, True, True, True])
    assert found["ids"].tolist() == [[7, 8], [9, 4], [2, 3]]
    assert found["values"].tolist() == [[-0.5, -1.5], [-0.25, -2.0], [-0.75, -1.0]]
    assert any("older versions" in note for note in notes) == (shift == 0)


def test_an_export_for_axolotl_is_the_row_that_its_readme_describes(tmp_path):
    import_cache(write_rows(tmp_path / "rows.jsonl", axolotl_row()), "auto", tmp_path / "CACHE", TOKENIZING, None)
    export_cache(tmp_path / "CACHE", "axolotl", tmp_path / "out")
    (row,) = pq.read_table(tmp_path / "out/data").to_pylist()
    expected = axolotl_row()
    for name in ("input_ids", "attention_mask", "labels", "target_mask"):
        assert row[name] == expected[name]
    for j in (1, 2, 3):
        assert row["target_token_ids"][j] == expected["target_token_ids"][j]
        assert row["target_logprobs"][j] == expected["target_logprobs"][j]


def test_renormalized_entries_are_said_and_masked_ones_are_none(tmp_path):
    row = axolotl_row()
    row["target_logprobs"][1:4] = [[math.log(0.75), math.log(0.25)]] * 3
    source = write_rows(tmp_path / "whole.jsonl", row)
    _, notes = import_cache(source, "auto", tmp_path / "CACHE", TOKENIZING, None)
    assert any("they were renormalized" in note for note in notes)
    row = axolotl_row()
    row["target_mask"][2] = [1, 0]
    import_cache(write_rows(tmp_path / "fewer.jsonl", row), "auto", tmp_path / "FEWER", TOKENIZING, None)
    found = Reader(tmp_path / "FEWER").get([10, 11, 7, 9, 2], [False, False, True, True, True])
    assert found["ids"][1].tolist() == [9, 0] and found["values"][1].tolist() == [-0.25, FILL]


# ---- refusals


def test_a_row_that_is_not_this_tokenizer_s_is_refused_by_its_number_before_anything_is_written(tmp_path):
    for change, message in (
        ({"input_ids": [10, 11, 7, 300, 2]}, r"row 1: input_ids has the id 300, the tokenizer of this run has 300"),
        ({"input_ids": [10, 299, 7, 9, 2]}, r"row 1: input_ids has the id 299, which the tokenizer of this run cannot"),
        ({"target_token_ids": [[0, 1], [7, 400], [9, 4], [2, 3], [0, 1]]}, r"row 1: entries has the id 400"),
        ({"target_token_ids": [[0, 1], [7, 7], [9, 4], [2, 3], [0, 1]]}, r"row 1: a token has the same id twice"),
        ({"target_logprobs": [[0.0, 0.0], [11.7, 10.2], [-1.0, -2.0], [-1.0, -2.0], [0.0, 0.0]]}, r"no log-probabil"),
        ({"labels": None}, r"row 1: there is no column labels"),
        ({"labels": [-100, 11, 7, 9, 2]}, r"row 1: target_mask fits the labels neither"),
        ({"labels": [-100, 7, 9, 2]}, r"row 1: 5 input_ids, 4 labels"),
    ):
        source = write_rows(tmp_path / "rows.jsonl", axolotl_row(), axolotl_row() | change)
        with pytest.raises(ValueError, match=message):
            import_cache(source, "axolotl", tmp_path / "CACHE", TOKENIZING, None)
        assert not (tmp_path / "CACHE").exists()


def test_a_source_that_is_no_such_format_or_another_tokenizer_s_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        format_of(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has the columns a: none of Axolotl's"):
        format_of(write_rows(tmp_path / "other.jsonl", {"a": 1}))
    with pytest.raises(ValueError, match="DistillKit's legacy format"):
        format_of(write_rows(tmp_path / "old.jsonl", {"packed_indices": [], "exact_values": []}))
    write_cache(tmp_path / "CACHE")
    export_cache(tmp_path / "CACHE", "huggingface", tmp_path / "out")
    with pytest.raises(ValueError, match="made with another tokenizer: tokenizer_digest='tok'"):
        import_cache(tmp_path / "out", "auto", tmp_path / "b", TOKENIZING._replace(tokenizer_digest="x"), None)
    with pytest.raises(ValueError, match="no token after the first is supervised"):
        check_row("row 0", Row([1, 2], [False, False], {}), SIZE, TOKENIZING.names)
    with pytest.raises(ValueError, match="the key 'kk' is not known"):
        distillkit.compression_of({"d": 8, "k": 2, "exact_k": 2, "kk": 1}, "x")


def test_missing_entries_get_ids_that_the_token_does_not_have():
    ids, logps = filled(np.array([[0, 2, 9]]), np.array([[-1.0, -0.5, 0.0]]), np.array([[True, True, False]]), 4)
    assert ids.tolist() == [[2, 0, 1, 3]] and logps.tolist() == [[-0.5, -1.0, FILL, FILL]]


def test_a_cache_with_fewer_entries_than_k_for_a_token_keeps_them_so(tmp_path):
    arrays = {
        "ids": np.array([[7, 3, 0], [5, 0, 0]]),
        "values": np.array([[-0.75, -1.5, -2.5], [-0.25, -np.inf, -np.inf]], np.float32),
        "tail": np.zeros(2, np.float32),
    }
    ids, mask = [1, 7, 5], [False, True, True]
    writer = Writer(tmp_path / "CACHE", Meta(quantity="logprob", k=3, precision="p", reference_digest=None, **META))
    writer.add(ids, mask, arrays)
    writer.close()
    finish(tmp_path / "CACHE", writer.meta, writer.keys)
    for kind in ("axolotl", "distillkit", "huggingface"):
        export_cache(tmp_path / "CACHE", kind, tmp_path / kind)
        import_cache(tmp_path / kind, kind, tmp_path / f"{kind}_back", TOKENIZING, None)
        found = Reader(tmp_path / f"{kind}_back").get(ids, mask)
        assert found["values"][0].tolist() == [-0.75, -1.5, -2.5] and found["ids"][0].tolist() == [7, 3, 0]
        assert found["ids"][1][0] == 5 and found["values"][1][0] == -0.25 and (found["values"][1][1:] <= FILL).all()


# ---- the hub


def test_a_name_of_the_hub_is_told_from_a_folder_and_refused_where_it_cannot_be_read(tmp_path, monkeypatch):
    assert hub.cache_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="names no data set of the hub: write hub:OWNER/NAME"):
        hub.cache_folder("hub:only")
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    for place in ("hub:someone/cache", "hf://datasets/someone/cache@main"):
        with pytest.raises(ValueError, match="not in the hub's cache on this machine, and the hub cannot be reached"):
            hub.cache_folder(place)


def test_a_cache_in_the_hub_s_own_folder_is_found_by_its_name(tmp_path, monkeypatch):
    revision = "0" * 40
    base = tmp_path / "datasets--someone--cache"
    ours = write_cache(base / "snapshots" / revision)
    (base / "refs").mkdir()
    (base / "refs/main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    for place in ("hub:someone/cache", "hf://datasets/someone/cache", f"hub:someone/cache@{revision}"):
        assert_same(ours, Reader(hub.cache_folder(place)), 0)


def test_a_pulled_cache_is_checked_whole_and_a_damaged_one_leaves_nothing(tmp_path, monkeypatch):
    revision = "0" * 40
    base = tmp_path / "hub" / "datasets--someone--cache"
    folder = base / "snapshots" / revision
    ours = write_cache(folder)
    (base / "refs").mkdir()
    (base / "refs/main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    pull = ["task=pull", f"cache_dir={tmp_path}", "exp_name=pulled", "hub.pull=someone/cache"]
    values = folder / "shard-00000" / "values.bin"
    whole = values.read_bytes()
    values.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="values.bin is not the file that was written"):
        launch.run_task(composed(*pull))
    assert not (tmp_path / "pulled" / "CACHE").exists()
    values.write_bytes(whole)
    launch.run_task(composed(*pull))
    assert_same(ours, Reader(tmp_path / "pulled" / "CACHE"), 0)


# ---- the command line


def test_task_cache_exports_what_it_made_and_trains_from_what_it_imports(tmp_path, capsys):
    data = write_pairs(tmp_path / "pairs.jsonl", 6)
    common = [
        f"cache_dir={tmp_path}",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        "cache.top_k=6",
    ]
    launch.run_task(composed(*common, "exp_name=made", "task=cache", "cache.export_format=axolotl"))
    said = capsys.readouterr().out
    assert f"exported as axolotl: {tmp_path}/made/EXPORT" in said and "note: axolotl does not hold the mass" in said
    assert sum(1 for _ in source_rows(tmp_path / "made/EXPORT")) == 12
    source = f"cache.import_from={tmp_path}/made/EXPORT"
    launch.run_task(composed(*common, "exp_name=read", "task=cache", source))
    assert "note: Axolotl's columns name no teacher" in capsys.readouterr().out
    assert_same(Reader(tmp_path / "made/CACHE"), Reader(tmp_path / "read/CACHE"), 3e-3)
    losses = []
    for name in ("made", "read"):
        train = ["loss=dckd", f"loss.teacher_cache={tmp_path}/{name}/CACHE", "n_steps=1", "log_every=1"]
        launch.run_task(composed(*common, *train, f"exp_name=trained_{name}", "model.build_seed=3"))
        losses.append(rows_of(tmp_path / f"trained_{name}/metrics.jsonl")[0]["loss/train"])
    assert losses[0] == losses[1]


def test_a_cache_of_our_own_is_exported_without_asking_anybody(tmp_path):
    (tmp_path / "c").mkdir()
    write_cache(tmp_path / "c/CACHE")
    mark_done(tmp_path / "c")
    common = [f"cache_dir={tmp_path}", "model=tiny", "task=cache", f"cache.import_from={tmp_path}/c/CACHE"]
    with pytest.raises(ValueError, match="is a cache already: use it, or set cache.export_format"):
        launch.run_task(composed(*common, "exp_name=none"))
    launch.run_task(
        composed(*common, "exp_name=out", "cache.export_format=distillkit", f"cache.export_to={tmp_path}/dk")
    )
    config = yaml.safe_load((tmp_path / "dk" / distillkit.CONFIG).read_text())
    assert config["k"] == config["exact_k"] == K and not (tmp_path / "out/CACHE").exists()
    with pytest.raises(ValueError, match="cache.export_format has to say as what"):
        launch.run_task(composed(*common, "exp_name=where", "cache.export_to=x"))
