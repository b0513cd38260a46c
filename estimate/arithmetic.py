"""What a run takes, from plain numbers: FLOPs, bytes on a device, bytes of a teacher cache, hours. Nothing is loaded
here.

Letters: a model has h hidden units, L blocks of `block` parameters, V words; a micro-batch of a device has `rows` rows
of T tokens, C columns from the first response token to the last, N response tokens. Sizes are bytes. Source of the
FLOPs: arXiv 2204.02311, appendix B (6 N a token and attention), with attention causal.
"""

import math
from typing import NamedTuple

from teacher.codec import count_dtype
from teacher.quantities import Quantity
from teacher.shard import RECORD, SEQUENCE

LAZY = 2**23  # of forward/responses.py: logits with more entries are computed by chunks
CHUNK_ELEMENTS = {"cuda": 2**25, "cpu": 2**22}  # of forward/chunks.py: logits that are widened to float32 at a time
FLOAT32 = 4
LIBRARIES = 450 * 10**6  # bytes of a process before its first model, and what it loads at its first step: 400 to 540
ALLOCATOR_KEEPS = 0.5  # share of what comes and goes


class Model(NamedTuple):
    """The numbers of a decoder that its cost depends on; llama.py and meta_model.py read them."""

    hidden: int
    layers: int
    attention: int  # heads x size of a head
    key_value: int  # key-value heads x size of a head
    intermediate: int
    gated: bool  # the feed-forward layer has a gate beside its input
    vocab: int
    parameters: int
    embedding: int  # parameters of the input embedding
    tied: bool  # the output head is the input embedding
    block: int  # parameters of one block
    largest: int  # parameters of the largest tensor
    adapters: int = 0  # trainable parameters of LoRA; 0: all parameters are trained
    adapter_inputs: int = 0  # of one block: units that go into adapters
    adapter_ranks: int = 0  # of one block: units between the two matrices of adapters

    @property
    def trainable(self) -> int:
        """Return the number of parameters that get a gradient."""
        return self.adapters or self.parameters

    @property
    def outside(self) -> int:
        """Return the number of parameters that are in no block: embeddings, head, last norm."""
        return self.parameters - self.layers * self.block


class Work(NamedTuple):
    """Sequences that go through a model: how many, their tokens n, the sum of n squared, and response tokens."""

    sequences: float
    tokens: float
    squares: float
    responses: float

    def times(self, factor: float) -> "Work":
        """Return the same work `factor` times."""
        return Work(*(value * factor for value in self))


class Batch(NamedTuple):
    """A micro-batch of one device: padded rows, or one packed row of all tokens, whose columns are response tokens.

    masks: entries of the attention masks of a packed row, which all blocks share; None: padded rows. joined: keys that
    are laid anew behind those of a shared prompt.
    """

    rows: int
    length: int
    columns: int
    responses: int
    masks: int | None = None
    joined: int = 0

    @property
    def tokens(self) -> int:
        """Return rows x length, padding included."""
        return self.rows * self.length


# ---- FLOPs


class Flops(NamedTuple):
    """Floating-point operations of a run, a multiplication and an addition counted as two."""

    forward: float
    backward: float = 0.0
    recomputation: float = 0.0  # of activation checkpointing
    reference: float = 0.0
    frozen: float = 0.0  # of live teachers and a reward model

    @property
    def total(self) -> float:
        """Return all of them."""
        return sum(self)


def forward_flops(model: Model, work: Work) -> float:
    """Return the FLOPs of a forward pass: 2 a token and parameter of the blocks, causal attention, the head at response
    tokens.
    """
    blocks = 2 * model.layers * (model.block * work.tokens + model.attention * work.squares)
    return blocks + 2 * model.hidden * model.vocab * work.responses


def training_flops(model: Model, work: Work, reference: Work | None, checkpointing: bool) -> Flops:
    """Return the FLOPs of training on `work`; `reference` is what a frozen model of the same shape scores.

    A backward pass costs two forward passes: one for the activations' gradients, one for the weights' (LoRA: only the
    first).
    """
    forward = forward_flops(model, work)
    head = 2 * model.hidden * model.vocab * work.responses
    return Flops(
        forward=forward,
        backward=forward * (1 if model.adapters else 2) + 4 * model.adapters * work.tokens,
        recomputation=forward - head if checkpointing else 0.0,
        reference=forward_flops(model, reference) if reference else 0.0,
    )


def hours_of(
    flops: float, tokens: float, tokens_per_second: float | None, flops_per_second: float | None
) -> float | None:
    """Return the hours of a stage from its speed over all devices, in tokens or FLOPs a second; None if neither is
    known.
    """
    if tokens_per_second:
        return tokens / tokens_per_second / 3600
    return flops / flops_per_second / 3600 if flops_per_second else None


# ---- memory


class Setup(NamedTuple):
    """How a run is laid out and in which precision: bytes of a stored weight, of a computed value, of a reference's
    weight.
    """

    strategy: str  # none | ddp | fsdp: everything sharded over all devices
    devices: int
    micro_batches: int  # per optimizer step and device
    master: int
    compute: int
    reference: int  # 0: no frozen reference in memory
    live: bool  # the reference scores every micro-batch (of LoRA it is the base)
    states: int  # float numbers that the optimizer keeps for a parameter (AdamW: 2)
    checkpointing: bool
    gpu: bool  # there the optimizer works on all parameters at once


class Memory(NamedTuple):
    """Bytes on one device: what there is, and the sums at the moments that can be the peak."""

    terms: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Return the largest sum."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """Return the moment at which it occurs."""
        return max(self.phases, key=lambda name: self.phases[name])


def process_bytes(memory: Memory) -> dict[str, int]:
    """Return what a process on a CPU holds beside what torch allocates (docs/log.md, 2026-11-28).

    The interpreter with its libraries, and what the C library keeps of freed memory: a share of what comes and goes.
    """
    held = sum(memory.terms.get(name, 0) for name in ("weights", "optimizer states", "frozen reference"))
    kept = round(ALLOCATOR_KEEPS * max(0, memory.peak - held))
    return {"interpreter and libraries": LIBRARIES, "kept by the allocator": kept}


def block_activations(model: Model, master: int, compute: int) -> int:
    """Return the bytes a token and block that autograd keeps for the backward pass (checked against autograd in the
    tests).

    Kept are: of both norms the residual and its normalized value; the inputs of the linear layers; queries, keys,
    values (repeated for grouped heads, as a padded batch needs) and their mixture; of the feed-forward layer gate, its
    activation, `up` and the product. Under autocast (master is not compute) the residual is in the stored precision and
    every linear layer keeps an input of its own.
    """
    h = model.hidden
    inner = 4 * model.attention + (4 if model.gated else 2) * model.intermediate
    inputs = 2 * h
    if master != compute:
        norms, inputs = 4 * h * master, 5 * h if model.gated else 4 * h
    else:
        norms = 2 * h * (FLOAT32 + compute)
    if model.adapters:  # the adapters keep their inputs after dropout, with its mask; frozen layers need none
        return norms + compute * (inner + model.adapter_inputs + model.adapter_ranks) + model.adapter_inputs
    return norms + compute * (inner + inputs)


def activations(model: Model, batch: Batch, setup: Setup) -> tuple[int, int]:
    """Return the bytes that all blocks keep until the backward pass, and those of one block at work."""
    residual = max(setup.master, setup.compute)
    block = batch.tokens * block_activations(model, setup.master, setup.compute)
    ends = 2 * batch.tokens * model.hidden * residual  # last norm
    if batch.masks is None:
        block += batch.tokens * batch.length * setup.compute
    else:  # segments' mixtures are kept, and what they are joined to
        block += (batch.tokens * model.attention + 2 * batch.joined * model.key_value) * setup.compute
        ends += batch.masks * setup.compute
    if setup.checkpointing:
        return batch.tokens * model.hidden * residual * model.layers + ends, block
    return block * model.layers + ends, block


def scored_block(model: Model, batch: Batch, width: int) -> int:
    """Return the bytes of a block at work without a gradient: residual, its norm, the feed-forward layer's three
    tensors.
    """
    return batch.tokens * width * 3 * (model.hidden + model.intermediate)


def logits_bytes(model: Model, batch: Batch, width: int) -> tuple[int, int]:
    """Return the bytes of the head's output [rows, C, V] and of the logits at response tokens [N, V]."""
    return batch.rows * batch.columns * model.vocab * width, batch.responses * model.vocab * width


def chunk_elements(gpu: bool) -> int:
    """Return how many logits a chunk has."""
    return CHUNK_ELEMENTS["cuda" if gpu else "cpu"]


def chunk_bytes(model: Model, responses: int, width: int, gpu: bool) -> int:
    """Return the bytes of the loss's chunk: exponentials and two gradients in float32, and its float32 copy if it is
    narrower.
    """
    return (3 if width == FLOAT32 else 4) * FLOAT32 * min(chunk_elements(gpu), responses * model.vocab)


def loss_bytes(model: Model, batch: Batch, setup: Setup) -> int:
    """Return the peak bytes of logits while the loss and its gradient are taken, a live reference's among them.

    Large logits of a packed row are computed by chunks (forward/responses.py).
    """
    if batch.masks is not None and batch.responses * model.vocab > LAZY:
        return chunk_bytes(model, batch.responses, setup.compute, setup.gpu) + chunk_elements(setup.gpu) * setup.compute
    output, kept = logits_bytes(model, batch, setup.compute)
    chunk = chunk_bytes(model, batch.responses, setup.compute, setup.gpu)
    others = max(output, kept + chunk)  # the gradient of the head's output, or the gradient beside its chunk
    if setup.live:
        others = max(others, sum(logits_bytes(model, batch, setup.compute)))
    return kept + others


def evaluation_bytes(model: Model, batch: Batch, setup: Setup) -> int:
    """Return the bytes that an evaluation adds to what is held: a block at work, or the logits and their chunk."""
    output, response = logits_bytes(model, batch, setup.compute)
    heads = output + response + chunk_bytes(model, batch.responses, setup.compute, setup.gpu)
    return max(scored_block(model, batch, setup.compute), heads + (response if setup.live else 0))


def training_memory(model: Model, batch: Batch, setup: Setup, evaluation: Batch | None = None) -> Memory:
    """Return the bytes on a device in training; `evaluation` is the largest batch of an evaluation, if there is one.

    Full sharding keeps nothing whole: a block's weights are gathered in the computing precision for its passes, and its
    gradients are reduced, in float32, with every micro-batch. Without it, autocast keeps copies of the weights in the
    computing precision, and the gradients of a step's micro-batches add up in place.
    """
    shards = setup.devices if setup.strategy == "fsdp" else 1
    sharded = setup.strategy == "fsdp" and setup.devices > 1
    whole = model.trainable * setup.master
    weights = (model.parameters + model.adapters) * setup.master // shards
    states = setup.states * whole // shards
    reference = model.parameters * setup.reference // shards
    buckets = whole if setup.strategy == "ddp" else 0
    matrices = model.layers * model.block + model.hidden * model.vocab
    copies = matrices * setup.compute if setup.compute != setup.master and not sharded else 0
    block_copy = model.block * setup.compute if copies else 0
    # fully_shard keeps the parameters outside of blocks gathered, and two blocks: the one at work and the next one.
    # Of the frozen reference the same; what is outside of its blocks stays gathered, as no backward pass frees it.
    copies_gathered = setup.compute * (2 if setup.reference else 1)
    gathered = (model.outside + 2 * model.block) * copies_gathered if sharded else 0
    reducing = (model.outside + model.block) * FLOAT32 if sharded and not model.adapters else 0
    held = whole if setup.micro_batches > 1 and not sharded else 0
    kept, block = activations(model, batch, setup._replace(master=setup.compute) if sharded else setup)
    gradients = held or (whole // shards)
    # From the last block, with all activations, to the first one, with all gradients; a checkpointed block is computed
    # again.
    again = block if setup.checkpointing else 0
    backward = max(held + kept + again, gradients + block + kept // model.layers)
    temporary = whole // shards if setup.gpu else 2 * model.largest * setup.master // shards
    static = weights + states + reference + buckets
    output, response = logits_bytes(model, batch, setup.compute)
    loss = loss_bytes(model, batch, setup)
    saved_copies = 0 if setup.checkpointing else copies
    phases = {
        "end of the forward pass": static + held + gathered + kept + copies + output + response,
        "loss": static + held + gathered + kept + saved_copies + loss,
        "backward pass": static + gathered + reducing + block_copy + backward,
        "optimizer step": static + whole // shards + temporary,
    }
    if evaluation is not None:
        phases["evaluation"] = static + gathered + copies + evaluation_bytes(model, evaluation, setup)
    terms = {
        "weights": weights,
        "gradients": whole // shards,
        "optimizer states": states,
        "frozen reference": reference,
        "communication buckets": buckets,
        "gathered weights": gathered,
        "copies of the weights": copies,
        "activations": kept,
        "a block at work": block,
        "logits and their gradient": max(loss, output + response),
        "optimizer's temporaries": temporary,
    }
    return Memory({name: size for name, size in terms.items() if size}, phases)


def scoring_memory(model: Model, batch: Batch, width: int, teachers: int, shards: int = 1, gpu: bool = True) -> Memory:
    """Return the bytes on a device of task=cache: one or two teachers in `width` bytes a weight, whole or a part of
    each, and one teacher's logits at a time. A narrow teacher's are float32, of the response positions alone.

    Of sharded teachers each one's parameters outside of its blocks stay gathered, and two blocks of the one at work.
    """
    weights = teachers * model.parameters * width // shards
    gathered = (teachers * model.outside + 2 * model.block) * width if shards > 1 else 0
    block = scored_block(model, batch, width)
    output, response = logits_bytes(model, batch, FLOAT32)
    logits = output + response if width == FLOAT32 else response
    chunk = chunk_bytes(model, batch.responses, FLOAT32, gpu)
    terms = {"weights": weights, "a block at work": block, "logits": logits, "float32 chunk": chunk}
    terms |= {"gathered weights": gathered} if gathered else {}
    held = weights + gathered
    return Memory(terms, {"blocks": held + block, "top k": held + max(logits, response + chunk)})


def generation_memory(model: Model, rows: int, length: int, width: int) -> Memory:
    """Return the bytes on a device of task=generate: the whole model, keys and values of `rows` rows, logits of one
    position.
    """
    weights, cached = model.parameters * width, 2 * model.layers * model.key_value * rows * length * width
    logits = 4 * rows * model.vocab * FLOAT32  # scores, sorted scores, probabilities, draws
    terms = {"weights": weights, "keys and values": cached, "logits": logits}
    # A library that grows keys and values by a token copies one block's at a time.
    return Memory(terms, {"last token": weights + cached + cached // max(1, model.layers) + logits})


# ---- teacher cache

GAP_BITS, LEVEL_BITS, STEP_BITS = 1.0, 5.0, 8.5  # an entry's, beside log2(vocabulary / k) of its id


def cache_bytes(quantity: Quantity, k: int, vocab: int, work: Work, codec: str = "none") -> int:
    """Return the bytes of a cache's arrays and indices on disk (docs/cache_format.md).

    Exact for `none`; for `compact` at most about, as if every token kept k entries, with the bits that an entry took on
    SmolLM2 (docs/log.md): cache.mass keeps fewer.
    """
    if codec == "compact" and quantity.is_wide:
        kinds = 3 if quantity.num_models == 2 else 2
        entry = math.log2(max(2.0, vocab / k)) + GAP_BITS + LEVEL_BITS + (STEP_BITS if kinds == 3 else 0)
        per_response = k * entry / 8 + count_dtype(k).itemsize + kinds + 2 * (kinds - 1)
    else:
        per_response = sum(a.dtype_for(vocab).itemsize * (k if a.wide else 1) for a in quantity.arrays)
    per_token = sum(array.dtype_for(vocab).itemsize for array in SEQUENCE)
    return round(work.responses * per_response + work.tokens * per_token + work.sequences * (RECORD.itemsize + 12))
