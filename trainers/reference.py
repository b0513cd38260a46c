"""Reference log-probabilities as an artifact: a teacher cache of quantity token_logp, shared between runs.

Scored once by the trainer's own numeric path, keyed by content; task=cache cache.quantity=token_logp writes the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import models
from dataloader import Tokens
from settings.artifacts import is_done, remove_folder, replace_folder
from teacher.cache import (
    IDENTITY,
    Meta,
    Reader,
    Writer,
    data_digest,
    finish,
    stored_keys,
    wait_for,
)
from teacher.lookup import StoredLogps
from teacher.scoring import batches_of, left_to_do, on_host, split_rows
from teacher.shard import KEY_BYTES
from teacher.writing import Scored, score_all
from trainers.basic import BasicTrainer
from trainers.batches import Item, Items, columns_of


def _sequences(items: Iterable[Item]) -> Iterator[Tokens]:
    return (tokens for item in items for tokens in (*item.sequences, *item.scored))


def _keys(items: Sequence[Item]) -> np.ndarray:
    """Return the content keys [n, 16] uint8 of all sequences, in their order."""
    columns = columns_of(items)
    if columns is not None:
        return columns.keys.reshape(-1, KEY_BYTES)
    return np.frombuffer(b"".join(tokens.key for tokens in _sequences(items)), np.uint8).reshape(-1, KEY_BYTES)


def meta_of(trainer: BasicTrainer, items: Sequence[Item]) -> Meta:
    """Say what the numbers depend on: the model, its numeric path, the sequences and who cut them."""
    config, tokenizer = trainer.model_config, trainer.tokenizer
    teacher = trainer.processes.from_main(lambda: models.config_digest(models.start_of(config)))
    return Meta(
        quantity="token_logp",
        k=0,
        vocab_size=trainer.vocab_size,
        teacher_digest=teacher,
        reference_digest=None,
        tokenizer_digest=models.tokenizer_digest(tokenizer),
        template_digest=models.template_digest(tokenizer),
        data_digest=data_digest(map(bytes, _keys(items))),
        precision=str(trainer.placement.reference_path()),
    )


def cached(trainer: BasicTrainer, items: Sequence[Item], load: Callable[[], torch.nn.Module]) -> Path:
    """Return the folder with the reference's log-probabilities of these items, scored now if it is not there.

    load: gives the reference; not called where no model is needed.
    """
    run = trainer.run_config
    if run.load_reference_logprobs:
        return Path(run.load_reference_logprobs).expanduser()
    meta = meta_of(trainer, items)
    identity = json.dumps([asdict(meta)[key] for key in IDENTITY])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = Path(run.cache_dir).expanduser() / "reference_logprobs" / digest
    if not trainer.gathered([is_done(folder)])[0]:  # what rank 0 sees: another run may be writing it
        score(trainer, load(), items, folder, meta)
    wait_for(lambda: is_done(folder))  # a shared disk may show it later
    return folder


@torch.no_grad()
def score(trainer: BasicTrainer, reference: torch.nn.Module, items: Sequence[Item], folder: Path, meta: Meta) -> None:
    """Score every sequence of the items with the reference into the folder; ranks share the work, a killed run goes on.

    The run works in a folder of its own and renames it when whole: two runs with the same data do not meet.
    """
    own = hashlib.sha256(str(trainer.run_config.run_dir.resolve()).encode()).hexdigest()[:8]
    part = folder.with_name(f"{folder.name}.{own}.part")
    reference = trainer.placement.place_reference(reference)
    rank, world_size = trainer.processes.rank, trainer.processes.world_size
    batches = batches_of(list(_sequences(items)), trainer.model_config.eval_batch_size, trainer.packing)
    todo = left_to_do(batches, stored_keys(part, meta), rank, world_size)

    def logps(rows: list[Tokens]) -> Scored:
        batch = trainer.batch_of([Item((tokens,)) for tokens in rows])
        found = trainer.token_logps_of(reference, batch.sequences).float()
        return partial(split_rows, on_host({"logps": found}), [tokens.num_supervised for tokens in rows])

    steps = max(trainer.gathered([len(todo)]))  # all ranks take every step: a sharded model needs them together
    with closing(Writer(part, meta, rank)) as writer:
        score_all(todo, writer, logps, "reference", rank == 0)
    for _ in range(steps - len(todo)):
        logps(batches[-1][-1:])
    if rank == 0:
        finish(part, meta, {tokens.key for tokens in _sequences(items)})
        if is_done(folder):  # another run was first
            remove_folder(part)
        else:
            replace_folder(part, folder)


def attach(trainer: BasicTrainer, items: Sequence[Item], folder: Path) -> Sequence[Item]:
    """Give every item its cached reference log-probabilities; ValueError on another model, tokenizer or a gap."""
    meta = meta_of(trainer, items)
    origin = ("quantity", "teacher_digest", "tokenizer_digest", "precision", "backend")
    reader = Reader(folder, {key: getattr(meta, key) for key in origin}, trainer.tokenizer.decode)
    missing = np.flatnonzero(~reader.held(_keys(items)))
    if len(missing):
        first = next(islice(_sequences(items), int(missing[0]), None))
        shown = reader.explain(first.ids, first.response)
        raise ValueError(f"{folder} lacks {len(missing)} of {len(_keys(items))} sequences. The first: {shown}")

    def item(number: int) -> Item:
        found = items[number]
        return found._replace(reference_logps=tuple(StoredLogps(reader, t) for t in _sequences([found])))

    return Items(len(items), item, columns_of(items))
