"""The smallest language model, in float64: logits of the next token are a row of a table. What every loss is proven on.

`trainer_of` puts it under a method's real trainer, with ragged items; `loss_of` and `gradient_of` go through the loop's
own steps (prepared, global counts, terms), for any split into micro-batches.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

import launch
import models
from conversations import Conversation
from dataloader import Example, Tokens
from engine.placement import Replicated
from engine.processes import Processes
from settings.methods import method_class
from teacher.quantities import Entry
from tests.support.helpers import composed
from trainers.basic import BasicTrainer
from trainers.batches import Item
from trainers.csft import with_control
from trainers.opsd import continued

VOCAB, PAD, TOP_K = 11, 0, 3
PATHS = {
    "dckd": ["loss.teacher_cache=none"],
    "adpa": ["loss.generations=none", "loss.advantages=none"],
    "gkd": ["loss.teacher=none"],
    "tvkd": ["loss.teacher_cache=none"],
    "dadpo": ["loss.teacher_cache=none"],
    "ctpd": ["loss.teacher_cache=none", "loss.positive_cache=none", "loss.negative_cache=none"],
    "pad": ["loss.teacher_cache=none"],
    "aligndistil": ["loss.teacher=none", "loss.reverse_teacher=none"],
    "opd": ["loss.teacher=none"],
    "iw-opd": ["loss.teacher=none"],
    "gopd": ["loss.teacher=none", "loss.reference_teacher=none"],
    "distillm2": ["loss.teacher=none"],
    "online-adpa": ["loss.teacher=none", "loss.reference_teacher=none"],
    "ppo": ["loss.verifier=worlds.shop:check"],
    "grpo": ["loss.verifier=worlds.shop:check"],
}
COLUMNS = {"dadpo": 1, "pad": 1, "ctpd": 3}  # log-probabilities of each token that caches give
FIGURES = {"ppo": 5, "grpo": 3, "opd": 2, "iw-opd": 2, "gopd": 2}  # columns that a rollout notes of each token


class Bigram(torch.nn.Module):
    """table [V, V]: row i holds the logits after token i. A reward model reads the first column at the last token, a
    value head the second one."""

    def __init__(self, seed: int, reward: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=generator))
        self.reward, self.config = reward, LlamaConfig(vocab_size=VOCAB, pad_token_id=PAD)
        self.value_head = SimpleNamespace(values=None)

    def get_output_embeddings(self) -> None:
        """Say that no layer of its own makes the logits."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, logits_to_keep: Tensor | None = None):
        """Return an object with logits [B, kept, V], or a reward model's [B, 1]."""
        input_ids = input_ids.clamp_max(VOCAB - 1)  # the tokenizer's padding lies beyond this vocabulary
        if self.reward:
            last = (input_ids != self.config.pad_token_id).long().cumsum(1).argmax(1)
            return SimpleNamespace(logits=self.table[input_ids.gather(1, last[:, None]).squeeze(1), :1])
        logits = self.table[input_ids[:, logits_to_keep]]
        self.value_head.values = logits[..., 1]
        return SimpleNamespace(logits=logits)


def tokens(prompt: list[int], response: list[int]) -> Tokens:
    return Tokens(prompt + response, [False] * len(prompt) + [True] * len(response))


def examples() -> list[Example]:
    """Six pairs with responses of 1 to 5 tokens."""
    rng = np.random.default_rng(3)
    pairs = []
    for i in range(6):
        prompt = [1 + i, 1 + int(rng.integers(9))]
        responses = [rng.integers(1, VOCAB, size=int(rng.integers(1, 6))).tolist() for _ in range(2)]
        pairs.append(
            Example(
                prompt,
                tokens(prompt, responses[0]),
                tokens(prompt, responses[1]),
                None,
                Conversation([], None, None, None, {}),
            )
        )
    return pairs


def entries(sequence: Tokens, rng: np.random.Generator, advantage: bool) -> Entry:
    """Draw a teacher's entries for one response: TOP_K ids a token with log-probabilities, or advantages beside
    them.
    """
    count = sum(sequence.response)
    ids = np.argsort(rng.random((count, VOCAB)), axis=1)[:, :TOP_K]
    logps = np.log(0.9 * rng.dirichlet(np.ones(TOP_K), count)).astype(np.float32)
    tail = np.full(count, 0.1, np.float32)
    values = rng.normal(size=logps.shape).astype(np.float32)
    return Entry(ids, values, tail, logps) if advantage else Entry(ids, logps, tail, None)


def columns(sequence: Tokens, rng: np.random.Generator, count: int) -> Entry:
    """Draw `count` log-probabilities of every response token."""
    values = -rng.exponential(size=(sum(sequence.response), count)).astype(np.float32)
    return Entry(np.zeros(values.shape, np.int64), values, np.zeros(len(values), np.float32))


def on_spans(entry: Entry, rng: np.random.Generator, merge: str) -> Entry:
    """Give entries the form of those of another tokenizer's teacher: some are missing, at some tokens all of them are,
    the first token of a long response is a span of the teacher's, and the last two tokens of a longer one are one.
    Merged spans have the factor in the entries of their first (observed) or last (bayesian) token.
    """
    values = np.where(rng.random(entry.values.shape) < 0.3, -np.inf, entry.values).astype(np.float32)
    spans = np.full(len(values), -1)
    if len(values) > 2:
        spans[-2:] = 0
    if len(values) > 3:
        spans[0], spans[-2:] = 0, 1
    logps = rng.normal(-3, 0.5, size=int(spans.max() + 1)).astype(np.float32)
    for number, logp in enumerate(logps):
        inside = np.flatnonzero(spans == number)
        base = {"none": -1, "observed": inside[0], "bayesian": inside[-1]}[merge]
        values[inside] = np.where((inside == base)[:, None], values[inside] + logp, -np.inf)
    return entry._replace(values=values, spans=spans, span_logps=logps)


def items_of(trainer: BasicTrainer, name: str) -> list[Item]:
    """Make the method's own items; the two methods with a teacher get drawn entries instead of a cache on disk."""
    rng = np.random.default_rng(4)
    if name == "dckd":
        by_bytes = trainer.config.alignment == "bytes"
        drawn = [[entries(side, rng, False) for side in (e.chosen, e.rejected)] for e in examples()]
        merge = trainer.config.span_merge
        drawn = [[on_spans(entry, rng, merge) if by_bytes else entry for entry in both] for both in drawn]
        if trainer.config.span_loss == "gold":  # some entries are of tokens that the student lacks
            lacking = lambda e: e._replace(ids=np.where(rng.random(e.ids.shape) < 0.4, -1, e.ids))  # noqa: E731
            drawn = [[lacking(entry) for entry in both] for both in drawn]
        return [Item((e.chosen, e.rejected), tuple(both)) for e, both in zip(examples(), drawn, strict=True)]
    if name == "tvkd":
        wide = trainer.config.value != "logits"
        drawn = [[entries(side, rng, False) for side in (e.chosen, e.rejected)] for e in examples()]
        first = lambda entry: Entry(entry.ids[:, :1], 3 * entry.values[:, :1], entry.tail)  # noqa: E731
        return [
            Item((e.chosen, e.rejected), tuple(entry if wide else first(entry) for entry in both))
            for e, both in zip(examples(), drawn, strict=True)
        ]
    if name in COLUMNS:
        items = []
        for example in examples():
            third = tokens(example.prompt, rng.integers(1, VOCAB, size=int(rng.integers(1, 6))).tolist())
            sides = (example.chosen, example.rejected, third)[: getattr(trainer.config, "n", 2)]
            items.append(Item(sides, tuple(columns(side, rng, COLUMNS[name]) for side in sides)))
        return items
    if name == "online-adpa":  # given instead of a rollout
        return [Item((e.chosen,), label=0.0) for e in examples()]
    if name == "opsd":  # another prompt of another length for the teacher
        contexts = [[1 + int(rng.integers(9)) for _ in range(1 + i % 3)] for i in range(6)]
        return [
            Item((e.chosen,), scored=(continued(context, e.chosen),))
            for e, context in zip(examples(), contexts, strict=True)
        ]
    if name == "adpa":
        return [Item((e.chosen, e.rejected), (None, entries(e.rejected, rng, True))) for e in examples()]
    if (
        name in FIGURES
    ):  # drawn instead of a rollout; the first column is the old log-probability, of about one in VOCAB
        drawn = [rng.normal(size=(sum(e.chosen.response), FIGURES[name])).astype(np.float32) for e in examples()]
        shift = np.array([-2.4] + [0.0] * (FIGURES[name] - 1), np.float32)
        return [
            Item((e.chosen,), label=1.0, notes=0.5 * part + shift) for e, part in zip(examples(), drawn, strict=True)
        ]
    if name == "reward-weighted-distill":
        return [
            Item((e.chosen,), label=float(reward))
            for e, reward in zip(examples(), rng.normal(size=6).astype(np.float32), strict=True)
        ]
    if name == "csft":  # the tokens of its control texts lie beyond this vocabulary
        sides = [
            (len(e.prompt), side, ids) for e in examples() for side, ids in ((e.chosen, [9, 8]), (e.rejected, [7]))
        ]
        return [Item((with_control(side, length, ids, 99),)) for length, side, ids in sides]
    return trainer.items(examples(), "train")


@cache
def settings_and_tokenizer(name: str, overrides: tuple[str, ...]):
    settings = launch.settings_of(composed(f"loss={name}", "model=tiny", *PATHS.get(name, []), *overrides))
    return settings, tokenizer()


@cache
def tokenizer():
    return models.load_tokenizer(launch.settings_of(composed("model=tiny")).model)


def trainer_of(name: str, *overrides: str) -> BasicTrainer:
    """Make the trainer of loss=name over two bigram models; the reference is another one than the policy."""
    settings, byte_tokenizer = settings_and_tokenizer(name, overrides)
    method = method_class(settings.raw["loss"]["trainer"])
    trainer = method(settings, byte_tokenizer, Replicated(Processes(), settings.model))
    trainer.vocab_size = VOCAB
    trainer.policy, trainer.reference = Bigram(1, method.head == "reward"), Bigram(2)
    trainer.frozen_models = {
        frozen_model: Bigram(2 + i) for i, frozen_model in enumerate(trainer.frozen_model_folders())
    }
    return trainer


def split(trainer: BasicTrainer, items: list[Item], parts: int) -> list:
    size = -(-len(items) // parts)
    return [trainer.batch_of(items[i : i + size]) for i in range(0, len(items), size)]


def loss_of(trainer: BasicTrainer, items: list[Item], parts: int = 1) -> Tensor:
    """Return the global mean loss of the items, computed in `parts` micro-batches."""
    state = dict(trainer.state)
    batches = trainer.prepared(split(trainer, items, parts), True)
    trainer.state = state  # one evaluation of the same step, not the next step
    counts = trainer.global_counts(batches)
    return torch.stack([trainer.terms(batch, counts)[0] for batch in batches]).sum()


def gradient_of(trainer: BasicTrainer, items: list[Item], parts: int = 1) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient in the policy's table [V, V]."""
    loss = loss_of(trainer, items, parts)
    return loss.detach(), torch.autograd.grad(loss, trainer.policy.table)[0]
