"""The teachers of a method, beside policy and reference: frozen models that it asks while it trains (live teachers, a
reward model), and the entries of its teacher caches.

Letters: a micro-batch has N response tokens, V words; a cache K entries a token. Sizes are bytes on a device.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from estimate.arithmetic import (
    FLOAT32,
    LAZY,
    Batch,
    Memory,
    Model,
    Setup,
    Work,
    chunk_bytes,
    chunk_elements,
    forward_flops,
    logits_bytes,
    scored_block,
)
from estimate.shape import shape_of
from settings.needs import Needs
from settings.schema import ModelConfig
from teacher.mixture import ONLY, named

TEACHERS = ("teacher", "teachers", "reference_teacher")  # keys of the loss section, where needs.teacher is "live"
REWARD_MODEL = "reward_model"
CACHES = ("teacher_cache", "advantages")
DIVERGENCE = 8  # of functional.py: tensors of a chunk's size that the generalized JSD and its slope hold


class Live(NamedTuple):
    """A frozen model: the key that names it, its shape, and whether it gives scores (a reward model), not logits."""

    key: str
    model: Model
    scores: bool = False

    @property
    def parameters(self) -> int:
        """Return its parameters; a reward model has no head of its own."""
        head = self.model.vocab * self.model.hidden
        return self.model.parameters - (head if self.scores and not self.model.tied else 0)


class Asked(NamedTuple):
    """What asking takes: the models' weights, what full sharding gathers of them, the peak while they answer, and the
    answers that the loss works on."""

    weights: int
    gathered: int
    peak: int
    kept: int


def folders_of(loss: Mapping[str, Any], needs: Needs) -> dict[str, str]:
    """Return the folder of each frozen model by its key of the loss section; of several teachers each one's."""
    found: dict[str, str] = {}
    for key in TEACHERS if needs.teacher == "live" else ():
        for name, folder in named(loss[key]).items() if loss.get(key) else ():
            found[key if name == ONLY else f"{key}.{name}"] = folder
    if loss.get(REWARD_MODEL):
        found[REWARD_MODEL] = loss[REWARD_MODEL]
    return found


def live_of(
    loss: Mapping[str, Any],
    needs: Needs,
    config: ModelConfig,
    made: Mapping[str, ModelConfig],
    may_build: bool = True,
) -> list[Live]:
    """Return the shapes of a method's frozen models; `made`: the models that stages which have not run will write.

    ValueError names the key of one whose architecture nobody can read.
    """
    found = []
    for key, folder in folders_of(loss, needs).items():
        model = made.get(folder) or replace(config.of_folder(folder), use_peft=False)
        try:
            found.append(Live(key, shape_of(replace(model, use_peft=False), may_build), key == REWARD_MODEL))
        except ValueError as error:
            raise ValueError(f"loss.{key}={folder}: {error}") from error
    return found


def live_flops(live: Sequence[Live], work: Work) -> float:
    """Return the FLOPs of asking each of them about the sequences that are learned from."""
    without_head = work._replace(responses=0)
    return sum(forward_flops(one.model, without_head if one.scores else work) for one in live)


def asked(live: Sequence[Live], batch: Batch, setup: Setup, width: int, whole: bool) -> Asked:
    """Return what asking takes; `width`: bytes of a stored weight, `whole`: the loss works on distributions [N, V].

    One teacher after the other is asked, and answers of several are held until they are mixed: that takes four more
    tensors [N, V] in float32 (functional.weighted_logps). Large logits of a packed row stay hidden states.
    """
    sharded = setup.strategy == "fsdp" and setup.devices > 1
    weights = sum(one.parameters for one in live) * width // (setup.devices if sharded else 1)
    gathered = sum(one.model.outside + 2 * one.model.block for one in live) * width if sharded else 0
    peak = held = 0
    teachers = [one for one in live if not one.scores]
    for one in live:
        output, answer = logits_bytes(one.model, batch, FLOAT32)
        if one.scores:
            output = answer = 0
        elif batch.masks is not None and batch.responses * one.model.vocab > LAZY:
            output, answer = 0, batch.responses * one.model.hidden * width
        elif width != FLOAT32:  # its last layer is computed at response tokens alone
            output = 0
        peak = max(peak, held + max(scored_block(one.model, batch, width), output + answer))
        held += answer
    answers = [logits_bytes(one.model, batch, FLOAT32)[1] for one in teachers]
    if len(answers) > 1:
        peak, held = max(peak, held + 4 * max(answers)), max(answers)
    if answers and not whole:  # a log-probability of each sampled token
        peak = max(peak, held + max(chunk_bytes(one.model, batch.responses, FLOAT32, setup.gpu) for one in teachers))
    return Asked(weights, gathered, peak, held if whole else 0)


def with_live(
    memory: Memory, live: Sequence[Live], batches: Sequence[Batch | None], setup: Setup, needs: Needs, width: int
) -> Memory:
    """Add frozen models to the memory of training; batches: the largest of training, and of an evaluation if there is.

    Where responses are the data's the models are asked behind the student's forward pass, whose activations are there;
    where the student writes them before it. The answers stay as long as the loss's graph does: to the end of the step.
    """
    if not live:
        return memory
    whole = needs.data != "prompts"
    training, evaluating = (None if batch is None else asked(live, batch, setup, width, whole) for batch in batches)
    assert training is not None and batches[0] is not None, "there is a training batch"
    static, terms, phases = training.weights + training.gathered, dict(memory.terms), dict(memory.phases)
    before = phases["end of the forward pass"] if whole else static_of(memory)
    phases = {name: size + static + training.kept for name, size in phases.items()}
    phases["loss"] += divergence_bytes(batches[0], live, setup) if training.kept else 0
    phases["end of the forward pass"] -= 0 if setup.micro_batches > 1 else training.kept
    phases["asking frozen models"] = before + static + training.peak
    if evaluating is not None:
        phases["evaluation"] += max(0, evaluating.peak - training.kept)
    terms |= {"frozen models": training.weights, "answers of frozen models": training.peak}
    if training.gathered:
        terms["gathered weights"] = terms.get("gathered weights", 0) + training.gathered
    return Memory({name: size for name, size in terms.items() if size}, phases)


def divergence_bytes(batch: Batch, live: Sequence[Live], setup: Setup) -> int:
    """Return what a divergence of two distributions takes beyond the chunk of a log-probability."""
    entries = batch.responses * max(one.model.vocab for one in live if not one.scores)
    chunk = max(chunk_bytes(one.model, batch.responses, setup.compute, setup.gpu) for one in live if not one.scores)
    return max(0, FLOAT32 * min(chunk_elements(setup.gpu), DIVERGENCE * entries) - chunk)


def entry_bytes(loss: Mapping[str, Any], needs: Needs, batch: Batch, top_k: int) -> int:
    """Return what the entries of every teacher cache take; `top_k`: K of a cache that is not written yet.

    An entry is an id (8 bytes) and a value (4), of an advantage the teacher's log-probability, too. Half of a batch's
    response tokens have advantages: the generated ones.
    """
    widths = []
    for folder in (f for key in CACHES if loss.get(key) for f in named(loss[key]).values()):
        meta = Path(str(folder)).expanduser() / "meta.json"
        widths.append(json.loads(meta.read_text(encoding="utf-8"))["k"] if meta.is_file() else top_k)
    advantage = needs.teacher == "advantage"
    return batch.responses * sum(max(1, k) for k in widths) * (16 if advantage else 12) // (2 if advantage else 1)


def with_entries(memory: Memory, entries: int) -> Memory:
    """Add the entries of teacher caches, which lie on the device as long as their batch."""
    if not entries:
        return memory
    phases = {name: size + entries for name, size in memory.phases.items()}
    return Memory({**memory.terms, "entries of teacher caches": entries}, phases)


def static_of(memory: Memory) -> int:
    """Return what lies on the device between two steps."""
    names = ("weights", "optimizer states", "frozen reference", "communication buckets")
    return sum(memory.terms.get(name, 0) for name in names)
