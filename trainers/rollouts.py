"""Rollouts: what the policy answers to prompts while it trains, and what the responses are worth.

A rollout answers the prompts of `rollout_batches` optimizer steps with the policy as it stands, then `rollout_epochs`
passes of steps learn from them. Responses are a function of (seed, step, example, number) and of the weights: any
layout gives the same, and a run resumes between rollouts. Offline the responses, and maybe their rewards, come with the
data.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataloader import Example, Tokens
from models import last_token_scores
from rewards.verifiers import resolve_verifier, scored
from settings.schema import one_of, require
from settings.typed import Code, Place
from tokens.columns import PROMPT, SIDES, Sides, labeled, numbers_of, sides_of, taken, with_prompts
from trainers.basic import GENERATED, SCORED, BasicTrainer
from trainers.batches import Item, Items
from trainers.sampling import Said, answers, stop_ids

Micros = list[list[Item]]


@dataclass(frozen=True)
class RolloutConfig:
    """Values of config/loss/shared/rollout.yaml."""

    n: int
    max_new_tokens: int
    rollout_batches: int
    rollout_epochs: int

    def __post_init__(self) -> None:
        for key in ("n", "max_new_tokens", "rollout_batches", "rollout_epochs"):
            require(getattr(self, key) >= 1, f"loss.{key}={getattr(self, key)} must be at least 1")

    @property
    def period(self) -> int:
        """Return how many optimizer steps learn from one rollout."""
        return self.rollout_batches * self.rollout_epochs


@dataclass(frozen=True)
class UnscoredConfig(RolloutConfig):
    """Values of methods whose every response is the policy's, and which no verifier or reward model scores."""

    is_online = True
    has_rewards = False
    verifier = None
    reward_model = None


@dataclass(frozen=True)
class RewardedConfig(RolloutConfig):
    """Values of config/loss/shared/rewarded.yaml."""

    online: str
    verifier: Code | None
    reward_model: Place | None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss.online", self.online.lower(), ("auto", "true", "false"))
        require(
            not (self.verifier and self.reward_model),
            f"loss.verifier={self.verifier} and loss.reward_model={self.reward_model} both give rewards: keep one",
        )
        require(
            not self.is_online or self.has_rewards,
            "loss.online=true needs somebody who scores new responses: set loss.verifier=module:function or "
            "loss.reward_model=FOLDER "
            "(or leave loss.online out, to learn from responses and rewards in the data)",
        )

    @property
    def has_rewards(self) -> bool:
        """Tell whether a verifier or a reward model gives the rewards."""
        return bool(self.verifier or self.reward_model)

    @property
    def is_online(self) -> bool:
        """Tell whether the policy answers while it trains; auto: where somebody scores what it says."""
        return self.has_rewards if self.online.lower() == "auto" else self.online.lower() == "true"


class Given(NamedTuple):
    """Responses that the data gives, [m] each: their rows, which side of it they are, their rewards, and how many
    tokens of each are supervised.
    """

    rows: np.ndarray
    sides: np.ndarray
    rewards: np.ndarray
    supervised: np.ndarray


class Rollouts:
    """The rollout that a trainer learns from now, and who scores its responses."""

    def __init__(self, trainer: BasicTrainer, config: Any) -> None:
        run = trainer.run_config
        self.trainer, self.config = trainer, config
        self.examples: dict[str, Sequence[Example]] = {}
        self.places: dict[str, Given] = {}
        self.verifier = resolve_verifier(config.verifier, "loss.verifier") if config.verifier else None
        self.kept: list[Micros] = []
        require(
            run.save_every % config.period == 0,
            f"save_every={run.save_every}: a rollout lasts {config.period} steps (loss.rollout_batches x "
            "loss.rollout_epochs) and is "
            f"not kept in checkpoints; a multiple of {config.period} works",
        )
        cached = run.cache_reference_logprobs or run.load_reference_logprobs
        require(
            not (config.is_online and cached),
            "reference log-probabilities cannot be cached where the policy answers: every response is new",
        )

    # ---- items

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Make an item of each prompt (online) or of each response with its reward (offline)."""
        self.examples[split] = examples
        sides = sides_of(examples)
        if self.config.is_online:
            every = np.arange(len(examples))
            columns = with_prompts(examples, sides, np.full((len(examples), 1), PROMPT), every)
            bare = labeled(columns, np.zeros(len(examples)))
            return Items(len(examples), lambda i: prompt_item(examples[i].prompt, i), bare)
        self.places[split] = given = self._given(examples, sides)

        def item(number: int) -> Item:
            source, side = int(given.rows[number]), SIDES[given.sides[number]]
            return Item((getattr(examples[source], side),), label=float(given.rewards[number]), source=source)

        columns = labeled(taken(sides, given.sides[:, None], given.rows), given.rewards)
        return Items(len(given.rows), item, columns)

    def _given(self, examples: Sequence[Example], sides: Sides) -> "Given":
        """Return the responses of all rows with their rewards: 1 and 0 for chosen and rejected, else the column."""
        there = sides.lengths >= 0
        require(
            bool(there.any(axis=1).all()),
            "a row has a prompt and no response: let the policy answer, with loss.verifier=module:function or "
            "loss.reward_model=FOLDER to score what it says",
        )
        rows, slots = np.nonzero(there)  # row after row
        rewards = (slots == SIDES.index("chosen")).astype(np.float64)
        if not self.config.has_rewards:
            single = slots == SIDES.index("response")
            rewards[single] = numbers_of(examples, "reward", rows[single], reward_of)
        return Given(rows, slots, rewards, sides.supervised[rows, slots])

    # ---- steps

    def micro_items(self, step: int, make: Callable[[int], Micros]) -> Micros:
        """Return the micro-batches of a step: of a new rollout where a period begins, else of the one that is kept."""
        if new := self.new_batches(step):
            self.kept = [make(number) for number in new]
        return self.kept[(step - 1) % self.config.period % self.config.rollout_batches]

    def new_batches(self, step: int) -> Sequence[int]:
        """Return the numbers of the batches that a rollout of this step answers: all of a period where one begins."""
        periods, place = divmod(step - 1, self.config.period)
        first = periods * self.config.rollout_batches + 1
        return range(first, first + self.config.rollout_batches) if place == 0 else ()

    def responded(self, micros: Micros, step: int) -> Micros:
        """Return items with responses and rewards; held-out prompts (step 0) are answered once."""
        split = "train" if step else "test"
        if self.config.is_online:
            micros = [self._answered(items, step, self.config.n if step else 1) for items in micros]
        if not self.config.has_rewards:
            return micros
        if step:
            self.trainer.tally[SCORED] += sum(item.source >= 0 for items in micros for item in items)
        return [self._rewarded(items, split) for items in micros]

    def _answered(self, items: list[Item], step: int, n: int) -> list[Item]:
        repeated = [(item, k) for item in items for k in range(n)]
        seeds = [row_seed(self.trainer.run_config.seed, step, item.source, k) for item, k in repeated]
        prompts = [item.sequences[0].ids for item, _ in repeated]
        found = answers(self.trainer, prompts, seeds, self.config.max_new_tokens, step)
        if step:
            known = zip(repeated, found, strict=True)
            self.trainer.tally[GENERATED] += sum(len(said.ids) for (item, _), said in known if item.source >= 0)
        return [
            with_response(item, prompt, said) for (item, _), prompt, said in zip(repeated, prompts, found, strict=True)
        ]

    def _rewarded(self, items: list[Item], split: str) -> list[Item]:
        if self.verifier is None:
            batch = self.trainer.batch_of(items)
            with torch.no_grad():
                scores = last_token_scores(self.trainer.frozen_models["reward_model"], batch.sequences).tolist()
            return [item._replace(label=score) for item, score in zip(items, scores, strict=True)]
        return [item if item.source < 0 else item._replace(label=self._checked(item, split)) for item in items]

    def _checked(self, item: Item, split: str) -> float:
        assert self.verifier is not None
        conversation = self.examples[split][item.source].conversation
        text = response_text(self.trainer.tokenizer, item.sequences[0], stop_ids(self.trainer))
        try:
            return scored(self.verifier, conversation, text)
        except Exception as error:
            raise ValueError(
                f"loss.verifier={self.config.verifier} failed on the response {text[:200]!r}: {error!r}"
            ) from error


class RolloutTrainer(BasicTrainer):
    """What methods share that learn from rollouts: items, the steps that a rollout lasts, the reward model."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rollouts = Rollouts(self, self.config)
        self.steps_per_batch = self.config.rollout_epochs

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return the reward model, if one scores."""
        return {"reward_model": (self.config.reward_model, "reward")} if self.config.reward_model else {}

    def answers_while_training(self) -> bool:
        """Tell whether the responses are the policy's own."""
        return bool(self.config.is_online)

    def objective(self) -> str:
        """Return the formula with the run's numbers, whose responses are learned from, and who scores them."""
        whose = "the policy's own" if self.config.is_online else "the data's"
        scorer = self.config.verifier or self.config.reward_model
        return f"{super().objective()}; responses: {whose}" + (f", rewards by {scorer}" if scorer else "")

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Take prompts, or given responses with their rewards."""
        return self.rollouts.items(examples, split)

    def data_digest(self) -> str:
        """Hash also what a verifier may read beside a prompt, such as a reference answer."""
        digest = hashlib.sha256(f"{super().data_digest()} ".encode())
        if self.rollouts.verifier:  # the JSON of a list, a row after the other
            for number, example in enumerate(self.rollouts.examples["train"]):
                told = json.dumps(example.conversation.meta, sort_keys=True, default=str)
                digest.update(f"{', ' if number else '['}{told}".encode())
            digest.update(b"]")
        return digest.hexdigest()[:16]

    def micro_items(self, step: int) -> Micros:
        """Return the micro-batches of the rollout that this step learns from."""
        return self.rollouts.micro_items(step, super().micro_items)

    def new_batches(self, step: int) -> Sequence[int]:
        """Return the batches that are answered anew."""
        return self.rollouts.new_batches(step)

    def may_stop(self, step: int) -> bool:
        """Stop between rollouts only."""
        return super().may_stop(step) and step % self.config.period == 0

    @torch.no_grad()
    def rollout(self, micros: Micros, step: int) -> Micros:
        """Answer, score, and note of each token what the method wants to remember."""
        return [self.noted(items) for items in self.rollouts.responded(micros, step)]

    def noted(self, items: list[Item]) -> list[Item]:
        """Return the items of a micro-batch with their notes."""
        raise NotImplementedError


def prompt_item(prompt: list[int], source: int) -> Item:
    """Return an item with a prompt that waits for its response."""
    return Item((Tokens(prompt, [False] * len(prompt)),), label=0.0, source=source)


def reward_of(example: Example) -> float:
    """Return the number in a row's `reward` column, or 1 or 0 for its `label`; ValueError if it has neither."""
    meta = example.conversation.meta
    found = meta.get("reward", meta.get("label"))
    if not isinstance(found, (bool, int, float)):
        raise ValueError(
            f"a row has no reward: give a column `reward` (a number) or `label` (true or false); it has {sorted(meta)}"
        )
    return float(found)


def row_seed(seed: int, step: int, source: int, number: int) -> int:
    """Return the seed of one response, a function of the run's seed, the step, the example and the response's
    number.
    """
    digest = hashlib.sha256(f"{seed} {step} {source} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def with_response(item: Item, prompt: list[int], said: Said) -> Item:
    """Give an item the response to a prompt; that of a filler stays unsupervised."""
    tokens = Tokens([*prompt, *said.ids], [False] * len(prompt) + [item.source >= 0] * len(said.ids))
    logps = None if said.logps is None else np.asarray(said.logps if item.source >= 0 else [], np.float32)
    return item._replace(sequences=(tokens,), sampler_logps=logps)


def sampled_logps(items: Sequence[Item], own: Tensor) -> Tensor:
    """Return the log-probabilities [N] with which the responses were sampled: the policy's `own`, except for items that
    carry those of older weights. An importance ratio is to these.
    """
    given = [item.sampler_logps for item in items]
    if all(one is None for one in given):
        return own
    parts = own.split([item.sequences[0].num_supervised for item in items])
    joined = [part if one is None else torch.from_numpy(one).to(part) for part, one in zip(parts, given, strict=True)]
    return torch.cat(joined)


def response_text(tokenizer: Any, tokens: Tokens, stop: list[int]) -> str:
    """Return the text of the supervised tokens without the one that ends the turn; other special tokens stay visible to
    who scores it.
    """
    ids = [i for i, on in zip(tokens.ids, tokens.response, strict=True) if on]
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in stop else ids, clean_up_tokenization_spaces=False)
