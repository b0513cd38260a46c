"""A step asks its device for no number: on a GPU each such read waits until the device has caught up."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import launch
import models
from dataloader import load_examples
from engine.metrics import Window
from engine.placement import Replicated
from engine.processes import Processes
from settings.methods import method_class
from tests.support.bigram import items_of, trainer_of
from tests.support.helpers import composed, write_pairs
from tests.test_losses import CASES
from trainers import basic

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "aten.equal")


def by_of(arguments: tuple) -> list:
    """Return what a tensor is indexed by: a mask is counted by a GPU before the host knows how much there is."""
    return arguments[1] if len(arguments) > 1 and isinstance(arguments[1], (list, tuple)) else []


class Reads(TorchDispatchMode):
    """Count the operations that read a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = str(func).startswith("aten.index") and any(
            by is not None and by.dtype == torch.bool for by in by_of(args)
        )
        if masked or any(name in str(func) for name in READS):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_read_is_seen():
    with Reads() as reads:
        float(torch.ones(3).sum())
        torch.ones(3)[torch.ones(3, dtype=torch.bool)]
    assert sum(reads.found.values()) == 2


def ready(tmp_path, monkeypatch, *overrides: str):
    """Return a trainer after its first step, on a device that is read late."""
    monkeypatch.setattr(Replicated, "reads_late", True)
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    settings = launch.settings_of(
        composed("model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}", *overrides)
    )
    processes = Processes()
    tokenizer = models.load_tokenizer(settings.model)
    trainer = method_class(settings.raw["loss"]["trainer"])(settings, tokenizer, Replicated(processes, settings.model))
    items = trainer.items(load_examples(settings.datasets, "train", tokenizer, settings.model), "train")
    settings.run.run_dir.mkdir()
    reference = models.load_model(settings.model, trainable=False) if trainer.needs.reference else None
    trainer.fit(models.load_model(settings.model, trainable=True), reference, items, [])
    trainer.window = Window()
    return trainer


@pytest.mark.parametrize(
    "loss, packing", [("sft", "prompts"), ("dpo", "prompts"), ("dpo", "none"), ("cpo", "rows"), ("ra-dpo", "prompts")]
)
def test_a_step_reads_nothing_and_a_row_of_metrics_reads_once(loss, packing, tmp_path, monkeypatch):
    how = [f"loss={loss}", f"model.packing={packing}", "n_steps=2", "model.gradient_accumulation_steps=2"]
    trainer = ready(tmp_path, monkeypatch, *how)
    batches = trainer.batches(1)
    trainer.ahead = type("Ahead", (), {"get": lambda self, step: batches})()  # made in its thread, as in a run
    with Reads() as step:
        trainer._step(1)
    assert step.found == {}
    with Reads() as row:
        trainer._log_train(1, 10, 1.0)
    assert sum(row.found.values()) <= 1, row.found


def test_norms_do_not_pile_up_where_nothing_is_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(basic, "UNREAD", 3)
    trainer = ready(tmp_path, monkeypatch, "loss=sft", "n_steps=12", "log_every=0")
    waiting = []
    for step in range(1, 8):
        trainer.ahead = None
        trainer._step(step)
        waiting.append(len(trainer.norms))
    assert waiting == [1, 2, 0, 1, 2, 0, 1]


# The spans of another tokenizer's teacher are counted where they lie.
@pytest.mark.parametrize("name, options", [case for case in CASES if "alignment=bytes" not in case[1]])
def test_the_terms_of_a_batch_and_their_gradient_read_nothing(name, options):
    trainer = trainer_of(name, *options.split())
    batches = trainer.prepared([trainer.batch_of(items_of(trainer, name))], True)
    counts = trainer.global_counts(batches)
    trainer.terms(batches[0], counts)  # what models can do is seen once
    with Reads() as reads:
        trainer.terms(batches[0], counts)[0].backward()
    assert reads.found == {}
