"""task=cache with strategy=fsdp: a teacher that is spread over two processes gives the entries of a whole one."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import launch
from teacher.cache import Reader
from tests.support.helpers import composed, write_pairs
from tests.support.ranks import Ranks


def entries(folder: Path) -> dict[tuple, dict[str, np.ndarray]]:
    reader = Reader(folder)
    found = [(tuple(ids), tuple(mask)) for ids, mask in reader.sequences(10**6)]
    return {key: reader.get(list(key[0]), list(key[1])) for key in found}


@pytest.mark.distributed
def test_two_teachers_spread_over_two_processes_give_the_entries_of_whole_ones(tmp_path: Path) -> None:
    """22 sequences in 5 batches: one process has more of them. Gone on with, one has all that is left to do."""
    write_pairs(tmp_path / "pairs.jsonl", 11)
    data = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={tmp_path}/pairs.jsonl"]
    launch.run_task(
        composed(*data, "exp_name=second", "++model.build_seed=5", "loss=sft", "n_steps=1", "lr=1e-3", "task=train")
    )
    asking = [*data, "task=cache", f"cache.reference={tmp_path}/second/FINAL", "cache.top_k=4", "cache.batch_size=5"]
    launch.run_task(composed(*asking, "exp_name=whole"))
    whole = entries(tmp_path / "whole" / "CACHE")

    def spread() -> Path:
        Ranks(*asking, "exp_name=spread", "strategy=fsdp", folder=tmp_path).output(timeout=400)
        return tmp_path / "spread" / "CACHE"

    folder = spread()
    for round in range(2):
        assert len(list(folder.glob("shard-*"))) == 2
        found = entries(folder)
        assert found.keys() == whole.keys() and len(found) == 22
        for key, arrays in whole.items():
            assert all(np.array_equal(array, found[key][name]) for name, array in arrays.items())
        if round == 0:
            shutil.rmtree(folder / "shard-00001")
            for path in (folder / "DONE", tmp_path / "spread" / "DONE"):
                path.unlink()
            spread()
