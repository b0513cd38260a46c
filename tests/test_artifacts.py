"""Files and folders that are whole or not there, whatever kills their writer: a signal, a full disk, another writer."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import checkpoint
from settings import artifacts
from tests.support.helpers import ROOT

HEAD = """
import os, signal, sys
from pathlib import Path
from settings import artifacts
folder = Path(sys.argv[1])
"""
READ = {
    "text": lambda path: path.read_text(encoding="utf-8"),
    "bytes": lambda path: path.read_bytes(),
    "json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    "jsonl": lambda path: list(artifacts.read_jsonl(path)),
}
WRITE: dict[str, tuple[Callable, object]] = {
    "text": (artifacts.write_text, "naïve\n"),
    "bytes": (artifacts.write_bytes, b"\x00\xff"),
    "json": (artifacts.write_json, {"a": [1, 0.1]}),
    "jsonl": (artifacts.write_jsonl, [{"a": "é\n"}, {"b": None}]),
}


def command_of(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", HEAD + textwrap.dedent(code), *map(str, arguments)]


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code with `artifacts` imported; `folder` is its first argument."""
    head = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom settings import artifacts\nfolder = Path(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", WRITE)
def test_what_is_written_is_read_back_and_nothing_else_stays(tmp_path: Path, kind: str) -> None:
    write, value = WRITE[kind]
    for _ in range(2):  # also over an older one
        write(tmp_path / "file", value)
        assert READ[kind](tmp_path / "file") == value and names(tmp_path) == ["file"]


def test_a_kill_between_write_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    artifacts.write_text(tmp_path / "file", "old")
    done = child(
        """
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the moment after the content is on disk
        artifacts.write_text(folder / "file", "new")
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old" and len(names(tmp_path)) == 2
    artifacts.remove_parts(tmp_path)
    assert names(tmp_path) == ["file"]


def test_a_kill_while_a_folder_is_filled_leaves_the_old_folder(tmp_path: Path) -> None:
    with artifacts.whole_folder(tmp_path / "model") as part:
        (part / "weights").write_text("old")
        artifacts.mark_done(part)
    done = child(
        """
        with artifacts.whole_folder(folder / "model") as part:
            (part / "weights").write_text("new")
            artifacts.mark_done(part)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
    assert (tmp_path / "model" / "weights").read_text() == "old" and artifacts.is_done(tmp_path / "model")
    artifacts.remove_parts(tmp_path)
    assert names(tmp_path) == ["model"]


def test_a_kill_while_a_folder_is_removed_leaves_it_without_done(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "weights").write_text("x")
    artifacts.mark_done(folder)
    code = "import shutil\nshutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
    done = child(f"{code}\nartifacts.remove_folder(folder / 'checkpoint-3')", tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "weights").is_file() and not artifacts.is_done(folder)


def test_a_checkpoint_that_a_kill_left_between_its_done_and_its_renaming_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (6, 12):
        checkpoint.open_folder(tmp_path, step)
        checkpoint.close_folder(tmp_path, step, {"examples": step}, keep_last=0)
    checkpoint.open_folder(tmp_path, 18)
    artifacts.mark_done(checkpoint.part(tmp_path, 18))
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-12" and checkpoint.examples_seen(tmp_path) == 12
    checkpoint.open_folder(tmp_path, 18)
    checkpoint.close_folder(tmp_path, 18, {"examples": 18}, keep_last=1)
    assert names(tmp_path) == ["checkpoint-18"]
    checkpoint.remove_all(tmp_path)
    assert names(tmp_path) == [] and checkpoint.newest(tmp_path) is None


def test_a_full_disk_keeps_the_old_file_names_it_and_gives_the_space_back(tmp_path: Path) -> None:
    artifacts.write_text(tmp_path / "file", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # Python ignores SIGXFSZ: the write fails
    try:
        with pytest.raises(OSError, match="file") as error:
            artifacts.write_text(tmp_path / "file", "n" * 10_000)
        with pytest.raises(OSError), artifacts.whole_folder(tmp_path / "folder") as part:
            (part / "weights").write_bytes(b"n" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "file")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_full_disk_while_appending_costs_the_torn_row_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as out:
            for number in range(1000):
                artifacts.append_row(out, {"number": number, "text": "x" * 100})
    """
    done = child(code, tmp_path)
    assert "File too large" in done.stderr
    rows = artifacts.resumed_rows(path)
    assert 30 < len(rows) < 40 and [row["number"] for row in rows] == list(range(len(rows)))
    with path.open("a", encoding="utf-8") as out:
        artifacts.append_row(out, {"number": len(rows)})
    assert [row["number"] for row in artifacts.read_jsonl(path)] == list(range(len(rows) + 1))


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    path, whole = tmp_path / "rows.jsonl", b'{"a": 1}\n{"b": "\xc3\xa9"}\n'
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        kept = whole[:end].count(b"\n")
        assert artifacts.resumed_rows(path) == [{"a": 1}, {"b": "é"}][:kept]
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
    assert artifacts.resumed_rows(tmp_path / "none.jsonl") == [] and names(tmp_path) == ["rows.jsonl"]


def test_a_broken_line_that_no_kill_leaves_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    before = path.read_bytes()
    for read in (artifacts.resumed_rows, lambda p: list(artifacts.read_jsonl(p))):
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not valid JSON"):
            read(path)
    assert path.read_bytes() == before
    path.write_text("\n[1]\n")
    with pytest.raises(ValueError, match=r"line 2: a row must be an object, this is list"):
        list(artifacts.read_jsonl(path))


def test_two_processes_that_replace_one_folder_again_and_again_both_succeed(tmp_path: Path) -> None:
    code = """
        for turn in range(300):
            with artifacts.whole_folder(folder / "shared") as part:
                (part / "a").write_text(f"{os.getpid()} {turn}")
                (part / "b").write_text(f"{os.getpid()} {turn}")
                artifacts.mark_done(part)
    """
    writers = [
        subprocess.Popen(command_of(code, tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [writer.communicate(timeout=60)[1] for writer in writers] == ["", ""]
    assert names(tmp_path) == ["shared"] and artifacts.is_done(tmp_path / "shared")
    assert (tmp_path / "shared" / "a").read_text() == (tmp_path / "shared" / "b").read_text()


def test_parts_of_a_process_that_still_works_and_files_of_others_and_of_another_run_stay(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "run").mkdir()
    kept = [f"x.{os.getppid()}.tmp", "x.tmp", "own.tmp", f"x.{os.getpid()}.tmp.txt"]
    gone = [f"x.{os.getpid()}.tmp", "sub/y.999999999.tmp"]
    of_another_run = ["run/config.yaml", "run/y.999999999.tmp"]
    for name in kept + gone + of_another_run:
        (tmp_path / name).touch()
    artifacts.remove_parts(tmp_path)
    assert names(tmp_path) == sorted([*kept, "run", "sub"]) and names(tmp_path / "sub") == []
    assert names(tmp_path / "run") == ["config.yaml", "y.999999999.tmp"]
