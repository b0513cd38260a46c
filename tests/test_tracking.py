"""wandb, offline for real: a killed run goes on under its id, and the file to sync has every row once."""

import os
import signal
import struct
import time
from pathlib import Path

import pytest

from engine.tracking import asked, place, run_id
from pipeline.warm import Process
from tests.support.helpers import begin, launch, rows_of, write_pairs


def records(path: Path) -> list:
    """Read a .wandb file: LevelDB's log format (blocks of 32 KiB, chunks with a header of 7 bytes) after 7 bytes of its
    own.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            found.append(Record.FromString(part))
            part = b""
    return found


def history(path: Path) -> list[dict[str, str]]:
    rows = [r.history for r in records(path) if r.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: item.value_json for item in row.item} for row in rows]


def start(base: Path, data: Path) -> Process:
    command = [
        "loss=sft",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"datasets.local.test={data}",
        f"cache_dir={base}",
        "exp_name=tracked",
        "lr=1e-3",
        "n_steps=40",
        "model.batch_size=8",
        "log_every=1",
        "save_every=5",
        "eval_every=10",
        "wandb.enabled=true",
    ]
    return begin(*command, log=base / "log.txt")


@pytest.mark.slow
def test_a_killed_run_keeps_its_wandb_id_and_every_row_is_there_once(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", 16)
    folder, deadline = tmp_path / "tracked", time.time() + 120
    killed = start(tmp_path, data)
    while not list(folder.glob("checkpoint-*/DONE")) and time.time() < deadline and killed.poll() is None:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    name = (folder / "wandb_id.txt").read_text().strip()
    again = start(tmp_path, data)
    assert again.wait(timeout=150) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    assert (folder / "wandb_id.txt").read_text().strip() == name
    (old,) = folder.glob("wandb/superseded-offline-run-*/run-*.wandb")
    (new,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert old.name == new.name == f"run-{name}.wandb"
    sent, rows = history(new), rows_of(folder / "metrics.jsonl")
    assert [int(row["_step"]) for row in sent] == [place(row) for row in rows]
    for one, other in zip(sent, rows, strict=True):
        assert {key: float(value) for key, value in one.items() if key in other} == other
    assert [row["step"] for row in rows if "loss/eval" in row] == [10, 20, 30, 40]
    assert [row["step"] for row in rows if "loss/train" in row] == list(range(1, 41))


def test_a_run_that_starts_again_from_nothing_is_another_wandb_run(tmp_path: Path):
    first = run_id(tmp_path, 0)
    assert run_id(tmp_path, 5) == first
    assert run_id(tmp_path, 0) != first


def test_a_training_row_and_the_evaluation_of_the_same_step_have_places_of_their_own_in_order():
    rows = [
        {"step": 0, "loss/eval": 1.0},
        {"step": 1, "loss/train": 1.0},
        {"step": 1, "loss/eval": 1.0},
        {"step": 2, "loss/train": 1.0},
    ]
    assert [place(row) for row in rows] == [1, 2, 3, 4]


def test_wandb_is_asked_for_by_either_key_and_once():
    assert asked([], False) == [] and asked([], True) == ["wandb"]
    assert asked(["tensorboard", "wandb"], True) == ["tensorboard", "wandb"]


@pytest.mark.slow
def test_rows_go_to_tensorboard(tmp_path: Path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = write_pairs(tmp_path / "pairs.jsonl", 16)
    given = ["loss=sft", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}"]
    run = launch(*given, "exp_name=boards", "n_steps=4", "log_every=1", "model.batch_size=8", "tracker=[tensorboard]")
    assert run.returncode == 0, run.stderr[-2000:]
    board = reading.EventAccumulator(str(tmp_path / "boards" / "tensorboard"))
    board.Reload()
    sent = [(event.step, event.value) for event in board.Scalars("loss/train")]
    rows = rows_of(tmp_path / "boards" / "metrics.jsonl")
    assert sent == [(row["step"], pytest.approx(row["loss/train"])) for row in rows if "loss/train" in row]
