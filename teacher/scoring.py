"""How each quantity is computed from the logits of one or two frozen models; teacher/writing.py writes it.

A function a row of quantities.TABLE, of the same name. Letters: N response tokens of a batch (flat), K entries, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataloader import Sequences, Tokens, collate
from functional import gather_logps, log_normalizers, token_logps
from models import ResponseLogits, response_logits
from teacher.cache import Arrays
from teacher.entries import topk_entries
from teacher.precision import teacher_logits
from teacher.quantities import TABLE, Quantity


class Asked(NamedTuple):
    """Each model's logits on one batch, computed when asked for, so that two [N, V] are never held; and the knobs."""

    logits: tuple[Callable[[], ResponseLogits], ...]
    k: int
    beta: float


def logprob(asked: Asked) -> dict[str, Tensor]:
    """Return the teacher's K most probable ids, their log-probabilities and the mass outside."""
    ids, logps, tail = topk_entries(asked.logits[0]().logits, asked.k)
    return {"ids": ids, "values": logps, "tail": tail}


def advantage(asked: Asked) -> dict[str, Tensor]:
    """Return beta (log pi_teacher - log pi_reference) at the teacher's K most probable ids (ADPA, arXiv 2502.17927)."""
    found = logprob(asked)
    logps = found["values"]
    return found | {
        "values": asked.beta * (logps - gather_logps(asked.logits[1]().logits, found["ids"])),
        "teacher_logps": logps,
    }


def token_logp(asked: Asked) -> dict[str, Tensor]:
    """Return the log-probability of each response token."""
    out = asked.logits[0]()
    return {"logps": token_logps(out.logits, out.targets)}


def value(asked: Asked) -> dict[str, Tensor]:
    """Return the log-sum-exp of the logits that predict each response token."""
    return {"values": log_normalizers(asked.logits[0]().logits)}


def function_named(name: str) -> Callable[[Asked], dict[str, Tensor]]:
    """Return the function of this module that scores a quantity; ValueError where its row has none."""
    found = globals().get(name)
    if found is None:
        raise ValueError(f"teacher/quantities.py has a row {name!r}: teacher/scoring.py needs a function of that name")
    return found


SCORES = {row.name: function_named(row.name) for row in TABLE}


class Scorer:
    """One or two frozen models that score batches of sequences.

    computing: the context in which a quantity of a policy's path is scored; teachers need none. packing: how batches
    are laid (forward/packing.py).
    """

    def __init__(
        self,
        quantity: Quantity,
        teachers: Sequence[Any],
        tokenizer: Any,
        k: int = 0,
        beta: float = 1.0,
        computing: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
        packing: str = "none",
    ) -> None:
        self.quantity, self.teachers, self.k, self.beta, self.computing = quantity, teachers, k, beta, computing
        self.vocab_size, self.pad_id, self.packing = len(tokenizer), tokenizer.pad_token_id, packing

    def __call__(self, rows: Sequence[Tokens]) -> list[Arrays]:
        """Return the quantity's arrays of each row."""
        return self.begun(rows)()

    @torch.inference_mode()
    def begun(self, rows: Sequence[Tokens]) -> Callable[[], list[Arrays]]:
        """Let the device score rows, and return what waits for their arrays: another thread may call it."""
        device = next(self.teachers[0].parameters()).device
        batch = collate(list(rows), self.pad_id, self.packing).to(device)
        asked = tuple(lambda model=model: self._logits(model, batch) for model in self.teachers)
        found = SCORES[self.quantity.name](Asked(asked, self.k, self.beta))
        return partial(split_rows, on_host(found), [row.num_supervised for row in rows])

    def _logits(self, model: Any, batch: Sequences) -> ResponseLogits:
        if not self.quantity.policy_path:
            return teacher_logits(model, batch, self.vocab_size)
        with self.computing(model):
            return response_logits(model, batch, self.vocab_size)


class OnHost(NamedTuple):
    """Arrays on their way to the host's memory, and what to wait for before they are read (None: they are there)."""

    arrays: dict[str, Tensor]
    ready: torch.cuda.Event | None


def on_host(found: dict[str, Tensor]) -> OnHost:
    """Begin to copy tensors of one device to the host, a copy each, behind what the device is computing."""
    arrays = {name: array.to("cpu", non_blocking=True) for name, array in found.items()}
    if not any(array.is_cuda for array in found.values()):
        return OnHost(arrays, None)
    ready = torch.cuda.Event()
    ready.record()
    return OnHost(arrays, ready)


def split_rows(found: OnHost, lengths: list[int]) -> list[Arrays]:
    """Split flat arrays [N, ...] into those of each row, as numpy arrays."""
    if found.ready is not None:
        found.ready.synchronize()
    parts = {name: [part.numpy() for part in array.split(lengths)] for name, array in found.arrays.items()}
    return [{name: arrays[i] for name, arrays in parts.items()} for i in range(len(lengths))]


def batches_of(sequences: Sequence[Tokens], size: int, packing: str = "none") -> list[list[Tokens]]:
    """Cut each content once into batches, longest first, so that memory fails at once if it does.

    Where a prompt that several begin with is computed once (packing `prompts`), those are neighbors, the longest first.
    Batches do not depend on who scores them, nor on what a killed run has left: other neighbors mean other padding,
    and other last bits.
    """
    unique = {t.key: t for t in sequences}
    ordered = sorted(unique, key=lambda key: (-unique[key].length, key))
    if packing == "prompts":
        groups: dict[bytes, list[bytes]] = {}
        for key in ordered:
            groups.setdefault(_prompt(unique[key]), []).append(key)
        ordered = [key for group in groups.values() for key in group]
    return [[unique[key] for key in ordered[start : start + size]] for start in range(0, len(ordered), size)]


def _prompt(tokens: Tokens) -> bytes:
    """Return the ids before the first supervised one."""
    ids, response = tokens.arrays()
    return bytes(ids[: int(np.argmax(response))].tobytes())


def left_to_do(batches: list[list[Tokens]], written: set[bytes], rank: int, world_size: int) -> list[list[Tokens]]:
    """Return this process's share of the batches that are not written."""
    share = batches[rank::world_size]
    return [batch for batch in share if not all(t.key in written for t in batch)]


def missing(batches: list[list[Tokens]], written: set[bytes]) -> list[list[Tokens]]:
    """Return the batches without the sequences that are written, for those who score each sequence alone."""
    return [[t for t in batch if t.key not in written] for batch in batches]
