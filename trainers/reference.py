"""Reference log-probabilities as an artefact: scored once, keyed by content, checked for coverage, no pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from models import model_digest, tokenizer_digest
from teacher_cache import content_key
from trainers.basic import BasicTrainer
from trainers.batches import Item


def _keys(item: Item) -> list[str]:
    return [content_key(s.ids, s.response).hex() for s in item.sequences]


def meta_of(reference_source: str, tokenizer: Any) -> dict[str, str]:
    """Say what the numbers depend on besides the sequences themselves."""
    return {"model": model_digest(reference_source), "tokenizer": tokenizer_digest(tokenizer)}


@torch.no_grad()
def score(
    trainer: BasicTrainer, reference: torch.nn.Module, items: list[Item], folder: Path, meta: dict[str, str]
) -> None:
    """Score every sequence of the items with the reference and write the folder, DONE last. Rank 0 writes.

    Every rank scores all items where there is one process; with several each takes its share.
    """
    trainer.reference = reference.to(trainer.accelerator.device).eval()
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    scores: dict[str, float] = {}
    size = trainer.model_config.eval_batch_size
    for start in tqdm(range(rank * size, len(items), size * world), desc="reference", mininterval=1, disable=rank > 0):
        chunk = items[start : start + size]
        logps = trainer.sequence_logps(trainer.reference, trainer.batch_of(chunk)).float().cpu()
        slots = len(chunk[0].sequences)
        for i, item in enumerate(chunk):
            for slot, key in enumerate(_keys(item)):
                scores[key] = float(logps[slot * len(chunk) + i])
        assert slots * len(chunk) == len(logps)
    trainer.reference = None
    if world > 1:
        gathered: list[dict[str, float]] = [{} for _ in range(world)]
        torch.distributed.all_gather_object(gathered, scores)
        scores = {key: value for part in gathered for key, value in part.items()}
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        keys = sorted(scores)
        save_file({"logps": torch.tensor([scores[k] for k in keys])}, folder / "logps.safetensors")
        (folder / "meta.json").write_text(json.dumps({**meta, "keys": keys}), encoding="utf-8")
        (folder / "DONE").touch()
    trainer.accelerator.wait_for_everyone()


def attach(items: list[Item], folder: Path, meta: dict[str, str]) -> list[Item]:
    """Give every item its cached reference log-probabilities; ValueError on another model, tokenizer or a gap."""
    if not (folder / "DONE").is_file():
        raise ValueError(f"{folder} is not a finished folder of reference log-probabilities (no DONE)")
    stored = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    for key, value in meta.items():
        if stored[key] != value:
            raise ValueError(
                f"{folder} was scored with another {key}: digest {stored[key]}, this run has {value}. Score again"
            )
    logps = dict(zip(stored["keys"], load_file(folder / "logps.safetensors")["logps"].tolist(), strict=True))
    missing = sum(key not in logps for item in items for key in _keys(item))
    if missing:
        total = sum(len(item.sequences) for item in items)
        raise ValueError(
            f"{folder} lacks {missing} of {total} sequences: other data, template or truncation. Score again"
        )
    return [item._replace(reference_logps=tuple(logps[key] for key in _keys(item))) for item in items]
