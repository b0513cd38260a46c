"""A method's trainer and a batch of it on random rows, for the checks of check_gpu.py: no data, no caches.

Every batch has 2 B rows of the same lengths: SFT learns both rows of a pair, DCKD chosen and rejected, ADPA chosen and
generated; DPO has its reference log-probabilities cached. What a step costs is measured by benchmarks/run.py.
"""

from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.setup import Size, device, sequences
from settings.methods import method_class
from settings.paths import CONFIG
from settings.typed import typed
from teacher.quantities import Entry
from trainers.batches import Batch, Item, make_batch


def entry(size: Size, k: int, advantage: bool, rng: np.random.Generator) -> Entry:
    """Draw a teacher's entries for one response."""
    ids = np.argsort(rng.random((size.response, min(4 * k, size.vocab))), axis=1)[:, :k].astype(np.int64)
    logps = np.log(0.95 * rng.dirichlet(np.ones(k), size.response)).astype(np.float32)
    tail = np.full(size.response, 0.05, np.float32)
    return (
        Entry(ids, rng.normal(size=logps.shape).astype(np.float32), tail, logps)
        if advantage
        else Entry(ids, logps, tail, None)
    )


def trainer_of(method: str, vocab: int) -> Any:
    """Make a trainer with its default config and a vocabulary: `sums` and `counts` read nothing else."""
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        section: Any = OmegaConf.to_container(compose("config", [f"loss={method}"]).loss)
    cls = method_class(section["trainer"])
    values = {k: "-" if v == "???" else v for k, v in section.items() if k not in ("name", "trainer")}
    trainer = cls.__new__(cls)
    trainer.config, trainer.vocab_size = typed(values, cls.Config, "loss."), vocab
    trainer.needs = cls.needs.under(vars(trainer.config))
    return trainer


def batch_of(method: str, size: Size, k: int) -> Batch:
    """Lay the same rows out as the method's batch."""
    rng, rows = np.random.default_rng(0), sequences(size, 2 * size.rows, 0)
    items = []
    for first, second in zip(rows[: size.rows], rows[size.rows :], strict=True):
        if method == "sft":
            items += [Item((first,)), Item((second,))]
        elif method == "dpo":
            items.append(
                Item((first, second), (), tuple(np.full(size.response, -6.0, np.float32) for _ in (first, second)))
            )
        elif method == "dckd":
            items.append(Item((first, second), (entry(size, k, False, rng), entry(size, k, False, rng))))
        else:
            items.append(Item((first, second), (None, entry(size, k, True, rng))))
    return make_batch(items, 0).to(device())
