"""Reference log-probabilities as an artifact: scored once, keyed by content, shared between runs, no pickle.

A folder holds the log-probability of every response token of every sequence, in float32:
meta.json (model, tokenizer, precision, one key a sequence), logps.safetensors (logps, offsets), DONE last.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from models import config_digest, tokenizer_digest
from settings.schema import ModelConfig
from teacher.cache import content_key
from trainers.basic import BasicTrainer
from trainers.batches import Item

Scores = dict[str, np.ndarray]


def _sequences(item: Item) -> list[Any]:
    return [*item.sequences, *item.scored]


def _keys(item: Item) -> list[str]:
    return [content_key(s.ids, s.response).hex() for s in _sequences(item)]


def meta_of(config: ModelConfig, dtype: torch.dtype, tokenizer: Any) -> dict[str, str]:
    """Say what the numbers depend on besides the sequences themselves."""
    return {
        "model": config_digest(config),
        "tokenizer": tokenizer_digest(tokenizer),
        "dtype": str(dtype).split(".")[-1],
    }


def folder_of(base: Path, items: list[Item], meta: dict[str, str]) -> Path:
    """Return the folder below `base` that these sequences, scored by this model, have."""
    keys = sorted({key for item in items for key in _keys(item)})
    return base / hashlib.sha256(json.dumps([meta, keys]).encode()).hexdigest()[:16]


@torch.no_grad()
def score(
    trainer: BasicTrainer, reference: torch.nn.Module, items: list[Item], folder: Path, meta: dict[str, str]
) -> None:
    """Score every sequence of the items with the reference and write the folder, DONE last; ranks share the work."""
    reference = trainer.placement.place_reference(reference)
    rank, world_size = trainer.processes.rank, trainer.processes.world_size
    size = trainer.model_config.eval_batch_size
    rows = {key: tokens for item in items for key, tokens in zip(_keys(item), _sequences(item), strict=True)}
    work = sorted(rows.items(), key=lambda row: (len(row[1].ids), row[0]))  # like lengths together: little padding
    scores: Scores = {}
    steps = range(0, len(work), size * world_size)  # all ranks take every step: a sharded model needs them together
    for start in tqdm(steps, desc="reference", mininterval=1, disable=rank > 0):
        chunk = work[start + rank * size : start + (rank + 1) * size] or work[start : start + 1]
        batch = trainer.batch_of([Item((tokens,)) for _, tokens in chunk])
        logps = trainer.token_logps_of(reference, batch.sequences).float().cpu().numpy()
        ends = np.cumsum([sum(tokens.response) for _, tokens in chunk])
        scores |= {key: part for (key, _), part in zip(chunk, np.split(logps, ends[:-1]), strict=True)}
    if world_size > 1:
        gathered: list[Scores] = [{} for _ in range(world_size)]
        torch.distributed.all_gather_object(gathered, scores)
        scores = {key: value for part in gathered for key, value in part.items()}
    if rank == 0:
        _write(folder, scores, meta)
    trainer.processes.wait()


def _write(folder: Path, scores: Scores, meta: dict[str, str]) -> None:
    """Write into a folder of this process and rename it: two runs that score the same data do not meet."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    keys = sorted(scores)
    offsets = np.cumsum([0, *(len(scores[key]) for key in keys)])
    logps = torch.from_numpy(np.concatenate([scores[key] for key in keys]))
    save_file({"logps": logps, "offsets": torch.from_numpy(offsets)}, part / "logps.safetensors")
    (part / "meta.json").write_text(json.dumps({**meta, "keys": keys}), encoding="utf-8")
    (part / "DONE").touch()
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def attach(items: list[Item], folder: Path, meta: dict[str, str]) -> list[Item]:
    """Give every item its cached reference log-probabilities; ValueError on another model, tokenizer or a gap."""
    if not (folder / "DONE").is_file():
        raise ValueError(f"{folder} is not a finished folder of reference log-probabilities (no DONE)")
    stored = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for key, value in meta.items():
        if stored[key] != value:
            raise ValueError(
                f"{folder} was scored with another {key}: {stored[key]}, this run has {value}. Score again"
            )
    tensors = load_file(folder / "logps.safetensors")
    parts = np.split(tensors["logps"].numpy(), tensors["offsets"].numpy()[1:-1])
    logps = dict(zip(stored["keys"], parts, strict=True))
    missing = sum(key not in logps for item in items for key in _keys(item))
    if missing:
        total = sum(len(_sequences(item)) for item in items)
        raise ValueError(
            f"{folder} lacks {missing} of {total} sequences: other data, template or truncation. Score again"
        )
    return [item._replace(reference_logps=tuple(logps[key] for key in _keys(item))) for item in items]
