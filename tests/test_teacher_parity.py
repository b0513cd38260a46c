"""A cached teacher gives the loss of a live one; padding and the order of a batch change nothing; a full disk is
said.
"""

import resource
from pathlib import Path

import pytest
import torch

import launch
import models
from dataloader import collate, load_examples
from engine.placement import Replicated
from engine.processes import Processes
from models import response_logits
from teacher.entries import topk_kl, topk_logps
from tests.support.helpers import begin, composed, write_pairs
from trainers.batches import Item, make_batch
from trainers.dckd import DCKD


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A DCKD trainer on 10 ragged pairs with the cache of another model as teacher."""
    base = tmp_path_factory.mktemp("parity")
    data = write_pairs(base / "pairs.jsonl", 10)
    common = [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    launch.run_task(composed(*common, "exp_name=teacher", "++model.build_seed=5", "n_steps=2", "lr=1e-3"))
    launch.run_task(
        composed(
            *common,
            *("exp_name=cache", "task=cache", f"model.load_from={base}/teacher/FINAL"),
            "cache.top_k=8",
        )
    )
    raw = composed(*common, "loss=dckd", f"loss.teacher_cache={base}/cache/CACHE", "loss.tail=bucket")
    settings = launch.settings_of(raw)
    tokenizer = models.load_tokenizer(settings.model)
    trainer = DCKD(settings, tokenizer, Replicated(Processes(), settings.model))
    items = trainer.items(load_examples(settings.datasets, "train", tokenizer, settings.model), "train")
    student = models.load_model(settings.model, trainable=False)
    teacher = models.load_model(settings.model, source=f"{base}/teacher/FINAL", trainable=False)
    return trainer, items, student, teacher, tokenizer


def loss_terms(trainer: DCKD, student: torch.nn.Module, items: list[Item], pad_to: int = 0) -> dict[str, float]:
    batch = make_batch(items, trainer.tokenizer.pad_token_id)
    if pad_to:
        widen = torch.nn.functional.pad
        ids, attention, response = batch.sequences[:3]
        batch = batch._replace(
            sequences=type(batch.sequences)(
                widen(ids, (0, pad_to), value=3), widen(attention, (0, pad_to)), widen(response, (0, pad_to))
            )
        )
    with torch.no_grad():
        out = response_logits(student, batch.sequences, trainer.vocab_size)
        sums, _ = trainer.sums(out, batch)
    return {name: float(value) for name, value in sums.items()}


def test_the_cached_teacher_gives_the_live_teachers_loss(setup):
    trainer, items, student, teacher, tokenizer = setup
    cached = loss_terms(trainer, student, items)
    for slot, name, weight in (
        (0, "kl_chosen", trainer.config.chosen_weight),
        (1, "kl_rejected", trainer.config.rejected_weight),
    ):
        rows = collate([item.sequences[slot] for item in items], tokenizer.pad_token_id)
        with torch.no_grad():
            ids, logps, _ = topk_logps(response_logits(teacher, rows, len(tokenizer)).logits, 8)
            live = topk_kl(response_logits(student, rows, len(tokenizer)).logits, ids, logps).sum()
        # float16 on disk: measured 3e-4 relative on this sum
        assert cached[name] == pytest.approx(weight * float(live), rel=2e-3)


def test_padding_and_order_change_nothing(setup):
    trainer, items, student, *_ = setup
    plain = loss_terms(trainer, student, items)
    for other in (loss_terms(trainer, student, items, pad_to=17), loss_terms(trainer, student, items[::-1])):
        for name, value in plain.items():
            assert other[name] == pytest.approx(value, rel=2e-6), name  # float32 sums in another order


def test_a_filler_counts_nowhere(setup):
    trainer, items, student, *_ = setup
    alone, filled = loss_terms(trainer, student, items[:3]), make_batch([*items[:3], items[3].filler()], 0)
    assert trainer.counts(filled) == trainer.counts(make_batch(items[:3], 0))
    with torch.no_grad():
        sums, _ = trainer.sums(response_logits(student, filled.sequences, trainer.vocab_size), filled)
    for name, value in alone.items():
        assert float(sums[name]) == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize("override", ["++model.tokenizer_name_or_path=assets/shop_tokenizer", "++model.max_length=34"])
def test_another_tokenizer_or_truncation_is_refused(setup, tmp_path, override):
    trainer = setup[0]
    raw = composed(
        f"cache_dir={tmp_path}",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={trainer.settings.datasets['local'].train}",
        "loss=dckd",
        f"loss.teacher_cache={trainer.config.teacher_cache}",
        "++model.max_prompt_length=30",
        override,
    )
    with pytest.raises(ValueError, match="tokenizer_digest|has no entries"):
        launch.run_task(raw)
    assert not (tmp_path / "run" / "DONE").exists()


def test_a_full_disk_is_one_error_and_leaves_nothing_that_looks_whole(tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    limit, log = 100_000, tmp_path / "log.txt"  # bytes a file: the model of 300 kB does not fit, all else does
    tiny = ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}", "exp_name=x"]
    run = begin(*tiny, log=log)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert run.wait(timeout=120) == 2 and "Traceback" not in log.read_text(), log.read_text()[-1500:]
    assert "error:" in log.read_text()
    assert not (tmp_path / "x" / "DONE").exists() and not (tmp_path / "x" / "FINAL").exists()
