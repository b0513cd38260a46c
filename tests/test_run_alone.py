"""One run at a time in a folder: a second one would mix its rows, checkpoints and config into the first one's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch as launcher
from pipeline.run_folder import kept_alone
from tests.support.helpers import ROOT, composed, write_pairs

HOLD = """
import sys, pathlib
from pipeline.run_folder import kept_alone
with kept_alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_which_another_process_is_at_work_is_refused_until_that_ends(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 2)
    raw = composed(
        "model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}", "exp_name=run"
    )
    folder = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=r"another process is at work in .*/run: .* another exp_name"):
        launcher.run_task(raw)
    assert not os.listdir(folder)
    other.kill()
    other.wait()
    launcher.run_task(raw)
    launcher.run_task(raw)  # finished: nothing is in the way
    assert (folder / "DONE").is_file()


def test_ranks_share_the_folder_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kept_alone(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with kept_alone(tmp_path):
            pass
