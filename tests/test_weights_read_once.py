"""The digest of weights is made by one process of several, and once in a process: teachers have hundreds of GB."""

import ast
import re
import sys
from pathlib import Path

import pytest

import launch
import models
from engine import export
from settings.schema import ModelConfig, typed
from teacher.cache import Reader
from tests.support.helpers import composed, write_pairs
from tests.support.ranks import Ranks
from tests.test_placement import FSDP_FILE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two models, `first` and `second`, and pairs.jsonl."""
    base = tmp_path_factory.mktemp("weights")
    config = typed(composed("model=tiny")["model"], ModelConfig)
    tokenizer = models.load_tokenizer(config)
    for name, layers in (("first", None), ("second", 1)):
        model = models.load_model(ModelConfig(**{**config.__dict__, "num_layers": layers}), trainable=False)
        export.save_model(model, tokenizer, base / name)
    write_pairs(base / "pairs.jsonl", 6)
    return base


def opened(folder: Path, *overrides: str, env: dict[str, str] | None = None) -> list[dict[str, int]]:
    """Return how often each of two ranks opened the weights of each model."""
    printed = Ranks(*overrides, folder=folder, program="tests/support/count_opens.py", env=env).output()
    found = sorted(re.findall(r"rank (\d) opened (.*)", printed))
    return [ast.literal_eval(counts) for _, counts in found]


def common(folders: Path, place: Path) -> list[str]:
    data = ["datasets=[local]", f"datasets.local.train={folders}/pairs.jsonl"]
    return [f"cache_dir={place}", "model=tiny", f"model.load_from={folders}/first", *data]


OF_THE_RUN = 1  # rank 0 hashes what a run names for its digest.txt; large files' hashes are kept between commands
ASKING = ["task=cache", "cache.top_k=4", "cache.batch_size=3"]


def test_a_process_reads_weights_once_until_a_file_changes(folders: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    sys.addaudithook(lambda event, arguments: seen.append(str(arguments[0])) if event == "open" else None)
    (tmp_path / "m").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "m" / name).write_bytes((folders / "first" / name).read_bytes())
    file = tmp_path / "m" / "model.safetensors"
    seen.clear()
    first = models.model_digest(tmp_path / "m")
    assert models.model_digest(tmp_path / "m") == first and seen.count(str(file)) == 1
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(bytes(changed))
    seen.clear()
    assert models.model_digest(tmp_path / "m") != first and seen.count(str(file)) == 1
    (tmp_path / "m" / "config.json").write_text("{}")  # which is read each time
    assert models.model_digest(tmp_path / "m") != first


@pytest.mark.distributed
def test_of_two_training_ranks_one_reads_the_reference_for_its_digest(folders: Path, tmp_path: Path) -> None:
    run = ["loss=dpo", "cache_reference_logprobs=true", "n_steps=1", "exp_name=run", "model.batch_size=4"]
    main, other = opened(tmp_path, *common(folders, tmp_path), *run)
    assert main == {"first": 1 + OF_THE_RUN} and other == {}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "env"),
    [("apart", {}), ("accelerate", FSDP_FILE)],
    ids=["files alone", "fsdp by accelerate's file"],
)
def test_of_two_caching_ranks_one_reads_both_teachers(folders: Path, tmp_path: Path, name: str, env) -> None:
    """An accelerate file for FSDP is enough to spread teachers: then processes tell each other, else by a file."""
    asking = [*common(folders, tmp_path), *ASKING, f"cache.reference={folders}/second"]
    main, other = opened(tmp_path, *asking, f"exp_name={name}", env=env)
    assert main == {"first": 1 + OF_THE_RUN, "second": 1 + OF_THE_RUN} and other == {}
    assert (tmp_path / name / "teacher_digests").is_dir() == (name == "apart")
    assert Reader(tmp_path / name / "CACHE").meta.teacher_digest == models.model_digest(folders / "first")


def test_deepspeed_is_refused_for_teachers(folders: Path, tmp_path: Path) -> None:
    asking = [*common(folders, tmp_path), *ASKING, "cache.quantity=logprob", "exp_name=zero", "strategy=deepspeed"]
    with pytest.raises(ValueError, match="DeepSpeed places no teachers"):
        launch.run_task(composed(*asking))
