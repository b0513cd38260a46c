"""Caches of plain float16: a loss reads their numbers as they are; a damaged one trains nothing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
import models
from dataloader import load_examples
from models import response_logits
from teacher.quantities import Entry
from tests.support.bigram import trainer_of
from tests.support.helpers import ROOT, composed, write_pairs
from trainers.batches import make_batch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Make ten pairs and the cache of another model, as float16."""
    base = tmp_path_factory.mktemp("float16")
    data = write_pairs(base / "pairs.jsonl", 10)
    common = [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    cache = ["task=cache", "cache.codec=none", "cache.top_k=8", "++model.build_seed=5", "exp_name=cache"]
    launch.run_task(composed(*common, *cache))
    return base, common


def entries_of(cache: Path) -> dict[bytes, Entry]:
    """Read all entries by a program that knows nothing of ours, widened from float16, by the ids of their sequence."""
    spec = importlib.util.spec_from_file_location("read_cache", ROOT / "docs" / "read_cache.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    found = {}
    for ids, _, tokens in program.read(cache):
        kept, values = (np.stack(part) for part in zip(*tokens, strict=True))
        tail = np.zeros(len(kept), np.float32)
        found[ids.astype(np.int32).tobytes()] = Entry(kept.astype(np.int64), values.astype(np.float32), tail)
    return found


def test_a_loss_is_to_the_last_bit_that_of_the_float16_numbers_on_disk(world: tuple[Path, list[str]]) -> None:
    """As a run computed it that read every entry into memory at its start."""
    base, common = world
    settings = launch.settings_of(composed(*common))
    tokenizer = models.load_tokenizer(settings.model)
    trainer = trainer_of("dckd", f"loss.teacher_cache={base}/cache/CACHE")
    trainer.vocab_size = len(tokenizer)
    items = trainer.items(load_examples(settings.datasets, "train", tokenizer, settings.model), "train")
    held = entries_of(base / "cache" / "CACHE")
    of = lambda item: tuple(held[np.asarray(t.ids, np.int32).tobytes()] for t in item.sequences)  # noqa: E731
    mapped, in_memory = (make_batch(part, 0) for part in (items, [item._replace(entries=of(item)) for item in items]))
    student = models.load_model(settings.model, trainable=False)
    with torch.no_grad():
        out = response_logits(student, mapped.sequences, trainer.vocab_size)
        one, other = (trainer.sums(out, batch)[0] for batch in (mapped, in_memory))
    assert one["kl_chosen"] > 0 and {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in other.items()}


def test_a_run_on_a_damaged_cache_ends_with_one_message_and_trains_nothing(world: tuple[Path, list[str]]) -> None:
    base, common = world
    values = base / "cache" / "CACHE" / "shard-00000" / "values.bin"
    whole = values.read_bytes()
    values.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    run = ["loss=dckd", f"loss.teacher_cache={base}/cache/CACHE", "n_steps=2", "save_every=1", "lr=1e-3"]
    with pytest.raises(ValueError, match=r"shard-00000/values.bin is not the file that was written"):
        launch.run_task(composed(*common, *run, "exp_name=damaged"))
    values.write_bytes(whole)
    folder = base / "damaged"
    assert not (folder / "DONE").exists() and not (folder / "FINAL").exists()
    assert not list(folder.glob("checkpoint-*"))
