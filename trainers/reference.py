"""Reference log-probabilities as an artifact: a teacher cache of quantity token_logp, shared between runs.

Scored once by the trainer's own numeric path, keyed by content; task=cache cache.quantity=token_logp writes the same.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import models
from dataloader import Tokens
from settings.artifacts import is_done, remove_folder, replace_folder
from teacher.cache import (
    IDENTITY,
    Arrays,
    Meta,
    Reader,
    Writer,
    content_key,
    data_digest,
    finish,
    stored_keys,
    wait_for,
)
from teacher.scoring import batches_of, left_to_do, score_all, split_rows
from trainers.basic import BasicTrainer
from trainers.batches import Item


def _sequences(items: list[Item]) -> list[Tokens]:
    return [tokens for item in items for tokens in (*item.sequences, *item.scored)]


def _key(tokens: Tokens) -> bytes:
    return content_key(tokens.ids, tokens.response)


def meta_of(trainer: BasicTrainer, items: list[Item]) -> Meta:
    """Say what the numbers depend on: the model, its numeric path, the sequences and who cut them."""
    config, tokenizer = trainer.model_config, trainer.tokenizer
    return Meta(
        quantity="token_logp",
        k=0,
        vocab_size=trainer.vocab_size,
        teacher_digest=models.config_digest(models.start_of(config)),
        reference_digest=None,
        tokenizer_digest=models.tokenizer_digest(tokenizer),
        template_digest=models.template_digest(tokenizer),
        data_digest=data_digest(_key(tokens) for tokens in _sequences(items)),
        precision=str(trainer.placement.reference_path()),
    )


def cached(trainer: BasicTrainer, items: list[Item], load: Callable[[], torch.nn.Module]) -> Path:
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
def score(trainer: BasicTrainer, reference: torch.nn.Module, items: list[Item], folder: Path, meta: Meta) -> None:
    """Score every sequence of the items with the reference into the folder; ranks share the work, a killed run goes on.

    The run works in a folder of its own and renames it when whole: two runs with the same data do not meet.
    """
    own = hashlib.sha256(str(trainer.run_config.run_dir.resolve()).encode()).hexdigest()[:8]
    part = folder.with_name(f"{folder.name}.{own}.part")
    reference = trainer.placement.place_reference(reference)
    rank, world_size = trainer.processes.rank, trainer.processes.world_size
    batches = batches_of(_sequences(items), trainer.model_config.eval_batch_size)
    todo = left_to_do(batches, stored_keys(part, meta), rank, world_size)

    def logps(rows: list[Tokens]) -> list[Arrays]:
        batch = trainer.batch_of([Item((tokens,)) for tokens in rows])
        found = trainer.token_logps_of(reference, batch.sequences).float()
        return split_rows({"logps": found}, [sum(tokens.response) for tokens in rows])

    steps = max(trainer.gathered([len(todo)]))  # all ranks take every step: a sharded model needs them together
    writer = Writer(part, meta, rank)
    score_all(todo, writer, logps, "reference", rank == 0)
    writer.close()
    for _ in range(steps - len(todo)):
        logps(batches[-1][-1:])
    if rank == 0:
        finish(part, meta, {_key(tokens) for tokens in _sequences(items)})
        if is_done(folder):  # another run was first
            remove_folder(part)
        else:
            replace_folder(part, folder)


def attach(trainer: BasicTrainer, items: list[Item], folder: Path) -> list[Item]:
    """Give every item its cached reference log-probabilities; ValueError on another model, tokenizer or a gap."""
    meta = meta_of(trainer, items)
    origin = ("quantity", "teacher_digest", "tokenizer_digest", "precision", "backend")
    reader = Reader(folder, {key: getattr(meta, key) for key in origin}, trainer.tokenizer.decode)
    sequences = _sequences(items)
    missing = [tokens for tokens in sequences if not reader.holds(_key(tokens))]
    if missing:
        shown = reader.explain(missing[0].ids, missing[0].response)
        raise ValueError(f"{folder} lacks {len(missing)} of {len(sequences)} sequences. The first: {shown}")
    return [
        item._replace(reference_logps=tuple(reader.get(t.ids, t.response)["logps"] for t in _sequences([item])))
        for item in items
    ]
