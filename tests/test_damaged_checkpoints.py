"""A checkpoint that changed on the disk is refused by name, with what to do; never resumed from, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import launch
from engine import checkpoint
from tests.support.helpers import composed, write_pairs
from trainers.basic import BasicTrainer


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> dict:
    base = tmp_path_factory.mktemp("run")
    data = write_pairs(base / "pairs.jsonl", 8)
    run = [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", "loss=sft"]
    return composed(*run, "exp_name=run", "model.batch_size=4", "n_steps=4", "save_every=1", "keep_last=2")


def interrupted(command: dict, after: int) -> Path:
    """Run the command up to a step; return the newest checkpoint."""
    step = BasicTrainer._step

    def stopped(self: BasicTrainer, number: int) -> int:
        if number > after:
            raise KeyboardInterrupt
        return step(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BasicTrainer, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            launch.run_task(command)
    found = checkpoint.newest(Path(command["cache_dir"]) / "run")
    assert found is not None
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def another_step(path: Path) -> None:
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "examples": state["examples"] + 1}))


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped weights": ("model.pt", flip, "is not as it was written .*digest"),
    "flipped optimizer": ("optimizer.pt", flip, "is not as it was written .*digest"),
    "cut weights": ("model.pt", cut, "is not as it was written .*bytes"),
    "no weights": ("model.pt", Path.unlink, "is not as it was written .*not there now"),
    "cut state": ("state.json", cut, "cannot be read"),
    "empty state": ("state.json", lambda path: path.write_text(""), "cannot be read"),
    "another type": ("state.json", lambda path: path.write_text("[]"), "is no state of a checkpoint"),
    "another state": ("state.json", another_step, "is not as it was written"),
}


def test_a_checkpoint_that_changed_on_the_disk_is_refused_by_name(command: dict) -> None:
    newest = interrupted(command, 2)
    for name, (file, harm, message) in DAMAGE.items():
        content = (newest / file).read_bytes()
        harm(newest / file)
        with pytest.raises(ValueError, match=message) as error:
            launch.run_task(command)
        assert str(newest / file) in str(error.value), name
        assert f"Remove {newest}: the same command then goes on from checkpoint-1" in str(error.value), name
        (newest / file).write_bytes(content)
    launch.run_task(command)
    assert (newest.parent / "DONE").is_file()


def test_shares_of_several_ranks_see_every_file(tmp_path: Path) -> None:
    checkpoint.open_folder(tmp_path, 3)
    for name in "abcde":
        (checkpoint.part(tmp_path, 3) / name).write_text(name * 200)
    checkpoint.close_folder(tmp_path, 3, {"examples": 1}, keep_last=1)
    folder = tmp_path / "checkpoint-3"
    state = checkpoint.state_of(folder)
    for name in "abcde":
        cut(folder / name)
    found = [line for rank in range(2) for line in checkpoint.damage(folder, state, rank, 2)]
    assert [line.split()[0] for line in sorted(found)] == [str(folder / name) for name in "abcde"]
    assert "begins anew" in checkpoint.way_out(folder)
