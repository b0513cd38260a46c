"""A shard has one writer at a time, and only numbers are written: a cache never holds entries of another sequence."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
import models
from teacher.cache import Reader, Writer, finish
from tests.support.helpers import ROOT, composed, write_pairs
from tests.test_teacher_cache import META, sequence

TOO_MANY = "shard-00000 is being written by another process.*run the same command again"


def test_a_second_writer_of_a_shard_is_refused_and_the_first_one_s_entries_stay_its_own(tmp_path: Path) -> None:
    first = Writer(tmp_path, META)
    for seed in range(3):
        first.add(*sequence(seed))
    first.flush()
    first.add(*sequence(3))
    for stream in first._streams.values():  # arrays that the index does not name yet: a second writer would cut them
        stream.flush()
    with pytest.raises(ValueError, match=TOO_MANY):
        Writer(tmp_path, META)
    with closing(Writer(tmp_path, META, 1)) as other:  # another shard is another's
        other.add(*sequence(5))
    first.add(*sequence(4))
    first.close()
    finish(tmp_path, META, first.keys | other.keys)
    for seed in range(6):
        assert np.array_equal(Reader(tmp_path).get(*sequence(seed)[:2])["ids"], sequence(seed)[2]["ids"])


def test_a_killed_writer_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from teacher.cache import Writer; "
        "from tests.test_teacher_cache import META, sequence; writer = Writer(Path(sys.argv[1]), META); "
        "writer.add(*sequence(0)); writer.flush(); print('written', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        with pytest.raises(ValueError, match=TOO_MANY):
            Writer(tmp_path, META)
        os.kill(process.pid, signal.SIGKILL)
    with closing(Writer(tmp_path, META)) as again:
        assert len(again.keys) == 1


def test_the_end_of_a_run_waits_for_a_writer_that_has_not_closed(tmp_path: Path) -> None:
    with closing(Writer(tmp_path, META)) as own:
        own.add(*sequence(0))
    slow = Writer(tmp_path, META, 1)
    slow.add(*sequence(1))
    slow.flush()
    later = threading.Timer(0.5, slow.close)
    later.start()
    assert finish(tmp_path, META, own.keys | slow.keys).num_sequences == 2
    later.join()


def test_two_runs_of_one_command_at_once_are_one_message(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    line = [f"cache_dir={tmp_path}", "task=cache", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    launch.run_task(composed(*line, "exp_name=before"))
    meta = replace(Reader(tmp_path / "before" / "CACHE").meta, num_sequences=0, num_tokens=0, shards={}, digest="")
    with closing(Writer(tmp_path / "run" / "CACHE", meta)), pytest.raises(ValueError, match=TOO_MANY):
        launch.run_task(composed(*line, "exp_name=run"))
    launch.run_task(composed(*line, "exp_name=run"))
    assert Reader(tmp_path / "run" / "CACHE").meta.num_sequences == 8


@pytest.mark.parametrize(
    ("quantity", "name", "value"),
    [
        ("logprob", "values", np.nan),
        ("logprob", "values", np.inf),
        ("logprob", "tail", np.nan),
        ("advantage", "values", 7e4),
        ("advantage", "values", -np.inf),
        ("advantage", "teacher_logps", np.nan),
    ],
)
@pytest.mark.parametrize("codec", ["none", "compact"])
def test_what_is_no_number_on_disk_is_refused(
    tmp_path: Path, quantity: str, name: str, value: float, codec: str
) -> None:
    ids, mask, arrays = sequence(0)
    arrays = arrays | ({"teacher_logps": arrays["values"]} if quantity == "advantage" else {})
    arrays[name] = arrays[name].copy()
    arrays[name].flat[1] = value
    with closing(Writer(tmp_path, replace(META, quantity=quantity, codec=codec))) as writer:
        with pytest.raises(ValueError, match=rf"1 of \d+ {name} of a sequence .* float16 .*the first is {value:g}"):
            writer.add(ids, mask, arrays)
        assert not writer.keys


def test_an_entry_that_is_none_is_written(tmp_path: Path) -> None:
    ids, mask, arrays = sequence(0)
    arrays["values"][:, 2] = -np.inf
    with closing(Writer(tmp_path, META)) as writer:
        writer.add(ids, mask, arrays)
    finish(tmp_path, META, writer.keys)
    assert np.isneginf(Reader(tmp_path).get(ids, mask)["values"][:, 2]).all()


@pytest.mark.parametrize("broken", ["weights", "beta"])
def test_a_teacher_that_says_no_number_ends_the_run_before_done(tmp_path: Path, broken: str) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    line = [f"cache_dir={tmp_path}", "task=cache", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    settings = launch.settings_of(composed(*line))
    tokenizer = models.load_tokenizer(settings.model)
    model = models.load_model(replace(settings.model, build_seed=9), dtype=torch.float32, trainable=False)
    if broken == "weights":
        with torch.no_grad():
            next(model.parameters())[-1:] = torch.nan  # one row of the embedding
            model.lm_head.weight[7] = torch.nan
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    asked = {
        "weights": [f"model.load_from={tmp_path}/other"],
        "beta": [f"cache.reference={tmp_path}/other", "cache.beta=1e9"],
    }
    with pytest.raises(ValueError, match="of a sequence are no numbers that float16 holds on disk"):
        launch.run_task(composed(*line, "cache.top_k=8", "exp_name=run", *asked[broken]))
    assert not (tmp_path / "run" / "CACHE" / "DONE").exists() and not (tmp_path / "run" / "DONE").exists()
