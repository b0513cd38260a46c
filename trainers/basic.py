"""BasicTrainer: the one loop. A method says what it needs and what an item is, counts its units and returns sums.

Per optimizer step: count every term's units over all micro-batches and ranks, scale each term's SUM by 1 / global
count, back-propagate, clip, update. So 1x8, 8x1 and two ranks give the gradient of the same global mean.
Data order, dropout and learning rate are functions of (seed, step): a resumed run needs no generator state.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataloader import Example, epoch_order
from engine import export, preemption
from engine.logbook import Logbook
from engine.metrics import Mean, Window, means, named
from engine.optimizer import UNREAD, check_finite, learning_rate_scale, scheduled_steps, seed_step
from engine.placement import Placement
from engine.prefetch import Prefetch
from forward.chunks import Logits
from forward.dealing import deal
from forward.responses import response_logits, scoring
from forward.rows import Sequences
from functional import token_logps
from models import packing_of
from settings.needs import Needs
from settings.schema import Settings
from trainers import keeping
from trainers.batches import Batch, Item, cost_of, items_digest, make_batch
from trainers.sampling import Sampler, check_responder, due
from trainers.value_head import VALUE_HEAD

GENERATED = "generated_tokens"  # in metrics.jsonl: tokens that the policy wrote so far to learn from
SCORED = "scored_responses"  # the same: responses that a verifier or reward model scored so far to learn from


class BasicTrainer:
    """Train a policy on items. Subclasses set Config, needs, formula and source, and define items, counts and sums."""

    VERSION: ClassVar[int] = 2  # raise it when a method's numbers change: pipelines then run its stages again
    Config: ClassVar[type]  # the dataclass of config/loss/NAME.yaml
    needs: Needs
    formula: ClassVar[str]  # what is minimized, with the config's keys in {braces}
    source: ClassVar[str]  # arXiv number or author
    # What the model ends in: lm | reward | value (a causal model that also estimates what is to come).
    head: ClassVar[str] = "lm"
    kind: ClassVar[str] = "imitation"  # imitation | preference | policy_gradient: the learning rate that suits it
    held_out_in_part = False  # the teacher's signals are of the training split alone: there is no loss/eval

    def __init__(self, settings: Settings, tokenizer: Any, placement: Placement) -> None:
        self.settings, self.run_config, self.model_config = settings, settings.run, settings.model
        self.config: Any = settings.loss
        self.needs = self.needs.under(vars(self.config))
        self.tokenizer, self.placement, self.processes = tokenizer, placement, placement.processes
        self.vocab_size = len(tokenizer)
        world_size, accum = self.processes.world_size, settings.model.gradient_accumulation_steps
        if settings.model.batch_size % (world_size * accum):
            raise ValueError(
                f"model.batch_size={settings.model.batch_size} (global) is not divisible by {world_size} processes x "
                f"model.gradient_accumulation_steps={accum}; a multiple of {world_size * accum} works"
            )
        self.micro_size = settings.model.batch_size // (world_size * accum)
        self.packing = packing_of(settings.model)
        self.reference: torch.nn.Module | None = None
        self.frozen_models: dict[str, torch.nn.Module] = {}  # frozen models beside policy and reference
        self.aligns_bytes = False  # frozen language models may have a tokenizer of their own, kept in:
        self.frozen_tokenizers: dict[str, Any] = {}
        self.responder: Any = None  # rollout.backend=vllm: who answers (trainers/sampling.py)
        check_responder(self)
        self.steps_per_batch = 1  # optimizer steps that learn from each batch of an epoch
        self.ahead: Prefetch[list[Batch]] | None = None  # makes the batches of the next step
        self.keeps_start = False  # items carry the start's log-probabilities even beside a live reference, which moves
        self.norms: dict[int, Tensor | float] = {}  # step -> gradient norm, not looked at yet
        self.tally = {GENERATED: 0, SCORED: 0}  # of this process, and not in `state` yet
        self.state: dict[str, float] = {}  # what a method carries from step to step; goes into checkpoints

    # ---- what a method defines

    def items(self, examples: Sequence[Example], split: str) -> Sequence[Item]:
        """Turn examples into items, teacher signals attached."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count the units of each term in a batch."""
        raise NotImplementedError

    def sums(self, out: Any, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return each term's weighted SUM over the batch, and metrics."""
        raise NotImplementedError

    def forward(self, model: torch.nn.Module, sequences: Sequences) -> Any:
        """Return what `sums` works on: the logits at response tokens."""
        return response_logits(model, sequences, self.vocab_size)

    def frozen_model_folders(self) -> dict[str, tuple[str, str]]:
        """Return (folder, head) of the frozen models that the method asks besides the reference: live teachers, a
        reward model.
        """
        return {}

    def rollout(self, micros: list[list[Item]], step: int) -> list[list[Item]]:
        """Complete a step's micro-batches by what the policy does now (step 0: held-out ones); all ranks call it."""
        return micros

    def answers_while_training(self) -> bool:
        """Tell whether this run learns from what the policy says while it trains."""
        return False

    def may_stop(self, step: int) -> bool:
        """Tell whether a checkpoint after this step holds all that the next one needs, such as an engine's weights."""
        return step % self.settings.rollout.refresh_every == 0

    def prepared(self, batches: list[Batch], training: bool) -> list[Batch]:
        """Set `shared` where a method must know something of the whole global batch before its parts; all ranks call
        it.
        """
        return batches

    def objective(self) -> str:
        """Return the formula with the run's numbers."""
        return "L = " + self.formula.format(**vars(self.config))

    # ---- shared pieces

    def token_logps_of(self, model: torch.nn.Module, sequences: Sequences) -> Tensor:
        """Return log pi of every response token [N]; policy and reference go through this same function."""
        with self.autocast(model):
            out = response_logits(model, sequences, self.vocab_size)
        return token_logps(out.logits, out.targets)

    @contextmanager
    def reference_model(self) -> Iterator[torch.nn.Module]:
        """Yield the reference: a model of its own, or with LoRA the policy with its adapter off."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.placement.unwrapped(self.policy).disable_adapter(), scoring(self.policy):
                yield self.policy

    def reference_logps(self, batch: Batch) -> Tensor:
        """Return the reference's log pi_0 of every response token [N]: from the batch if cached, else live."""
        return self._reference_scores(batch.sequences, batch.reference_logps)

    def scored_reference_logps(self, batch: Batch) -> Tensor:
        """Return the same of the sequences that are scored without learning."""
        assert batch.scored is not None
        return self._reference_scores(batch.scored, batch.scored_reference_logps)

    @torch.no_grad()
    def _reference_scores(self, sequences: Sequences, cached: Tensor | None) -> Tensor:
        if cached is not None:
            return cached
        with self.reference_model() as model:
            return self.token_logps_of(model, sequences)

    @torch.no_grad()
    def reference_logits(self, batch: Batch) -> Logits:
        """Return the reference's logits [N, V] at the response tokens."""
        with self.reference_model() as model, self.autocast(model):
            return response_logits(model, batch.sequences, self.vocab_size).logits

    @torch.no_grad()
    def scored_reference_logits(self, batch: Batch) -> Logits:
        """Return the same of the sequences that are scored without learning."""
        assert batch.scored is not None
        with self.reference_model() as model, self.autocast(model):
            return response_logits(model, batch.scored, self.vocab_size).logits

    def global_sum(self, *values: Tensor) -> list[float]:
        """Sum scalars over all ranks, in float64."""
        return self._reduce(torch.stack([value.detach().double().cpu() for value in values])).tolist()

    def gathered(self, values: list[Any]) -> list[Any]:
        """Join the lists of all ranks, in the order of ranks."""
        return self.processes.gathered(values)

    def autocast(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return the context in which a model is run in its precision."""
        return self.placement.precision(model)

    def batch_of(self, items: list[Item]) -> Batch:
        """Lay items onto this rank's device."""
        return self.made(items).to(self.placement.device)

    def made(self, items: list[Item]) -> Batch:
        """Lay items, not yet on the device."""
        return make_batch(items, self.tokenizer.pad_token_id, self.packing)

    # ---- the loop

    def fit(
        self, policy: torch.nn.Module, reference: torch.nn.Module | None, train: Sequence[Item], test: Sequence[Item]
    ) -> dict[str, float]:
        """Train to the end, resuming from the newest whole checkpoint; return the last evaluation's metrics."""
        fits = keeping.settle_rate(self, policy)
        run, processes = self.run_config, self.processes
        self.reference = reference and self.placement.place_reference(reference, moving=bool(run.sync_reference))
        self.placement.place_policy(policy, run)
        self.policy = self.placement.policy
        self.train_items, self.test_items = train, test
        self.steps_per_epoch = math.ceil(len(train) / self.model_config.batch_size)
        self.total_steps = run.n_steps or run.n_epochs * self.steps_per_epoch * self.steps_per_batch
        self.schedule_steps = scheduled_steps(run, self.total_steps, self.steps_per_batch)
        self.warmup_steps = round(run.warmup * self.schedule_steps) if run.warmup < 1 else int(run.warmup)
        self.window, self.examples_seen = Window(), 0
        step = keeping.resume(self)
        first = step + 1
        self.book = Logbook(self.settings, processes, step, self.total_steps, fits)
        sample = Sampler(self, step) if run.sample_every else None
        if run.do_first_eval and step == 0:
            self._evaluate_and_log(0)
        self.ahead = None if self.moves_its_data() else Prefetch(self.batches, self.total_steps)
        started, tokens, last_eval = time.perf_counter(), 0, dict[str, float]()
        for step in range(first, self.total_steps + 1):
            tokens += self._step(step)
            self.book.advance()
            if run.log_every and (step % run.log_every == 0 or step == self.total_steps):
                self._log_train(step, tokens, time.perf_counter() - started)
                started, tokens = time.perf_counter(), 0
            if step == self.total_steps or (run.eval_every and step % run.eval_every == 0):
                last_eval = self._evaluate_and_log(step)
            if sample is not None and due(run.sample_every, step, self.total_steps):
                sample(step)
            whole = step < self.total_steps and self.may_stop(step)
            stop = whole and preemption.stop_agreed(self._reduce)
            if stop or (whole and run.save_every and step % run.save_every == 0):
                keeping.save(self, step)
            if stop:
                preemption.leave(step)
        self.check_norms()
        for open_one in (self.ahead, self.responder):
            if open_one is not None:
                open_one.close()
        self.book.close()
        return last_eval

    def micro_items(self, step: int) -> list[list[Item]]:
        """Return this rank's micro-batches of a step; ranks without a row get an uncounted filler."""
        done = self.run_config.first_step // self.steps_per_batch
        epoch, index = divmod(done + step - 1, self.steps_per_epoch)
        size, world_size = self.model_config.batch_size, self.processes.world_size
        order = epoch_order(len(self.train_items), self.run_config.seed, epoch)
        chosen = order[index * size : (index + 1) * size]
        micros = self.deal(
            self.train_items, chosen, self.micro_size, world_size, self.model_config.tokens_per_micro_batch
        )
        return self.rollout(list(micros), step)

    def new_batches(self, step: int) -> Sequence[int]:
        """Return the numbers of the global batches of an epoch's order that a step is the first to use."""
        return (step,)

    def examples_in(self, step: int) -> int:
        """Return how many items of the data all ranks together take up in a step."""
        size, per_epoch = self.model_config.batch_size, self.steps_per_epoch
        done = self.run_config.first_step // self.steps_per_batch
        places = [(done + number - 1) % per_epoch * size for number in self.new_batches(step)]
        return sum(min(size, len(self.train_items) - place) for place in places)

    def batches(self, step: int) -> list[Batch]:
        """Return this rank's batches of a step, not yet on its device."""
        made = [self.made(items) for items in self.micro_items(step)]
        return [batch.pinned() for batch in made] if self.placement.device.type == "cuda" else made

    def moves_its_data(self) -> bool:
        """Tell whether what is learned from depends on the policy as it stands, so that no step can be made ahead."""
        own = type(self)
        return own.rollout is not BasicTrainer.rollout or own.micro_items is not BasicTrainer.micro_items

    def deal(
        self, items: Sequence[Item], indices: Sequence[int], micro_size: int, world_size: int, budget: int | None = None
    ) -> Iterator[list[Item]]:
        """Yield this rank's micro-batches of the items at `indices`, the same number on every rank."""
        chosen = [items[i] for i in indices]
        costs = [cost_of(item, self.packing) for item in chosen]
        for micro in deal(costs, micro_size, world_size, budget)[self.processes.rank]:
            yield [chosen[place] for place in micro] or [chosen[costs.index(min(costs))].filler()]

    def global_counts(self, batches: list[Batch]) -> dict[str, float]:
        """Count the units of each term over all micro-batches and ranks."""
        counted = [self.counts(batch) for batch in batches]
        names = list(counted[0])
        local = torch.tensor([float(sum(c[name] for c in counted)) for name in names], dtype=torch.float64)
        return dict(zip(names, self._reduce(local).tolist(), strict=True))

    def _reduce(self, table: Tensor) -> Tensor:
        return self.processes.reduce(table)

    def terms(self, batch: Batch, counts: dict[str, float]) -> tuple[Tensor, dict[str, Mean]]:
        """Return a batch's share of the global mean loss, and its metrics with the terms among them."""
        with self.autocast(self.policy):
            out = self.forward(self.policy, batch.sequences)
        sums, metrics = self.sums(out, batch)
        units = self.counts(batch)
        # A term without a unit anywhere adds nothing; its sum (zero) stays in the graph so that ranks agree.
        loss = torch.stack([value / max(1.0, counts[name]) for name, value in sums.items()]).sum()
        terms = {f"term/{name}": Mean(value.detach(), units[name]) for name, value in sums.items()}
        return loss, {**terms, **metrics}

    def _step(self, step: int) -> int:
        """Do one optimizer step; return the number of supervised tokens this rank saw."""
        run = self.run_config
        seed_step(run.seed, run.first_step + step, self.processes.rank)
        self.policy.train()
        with scoring(self.policy):  # what a rollout answers and what `prepared` looks at is not learned from
            found = self.batches(step) if self.ahead is None else self.ahead.get(step)
            batches = self.prepared([batch.to(self.placement.device) for batch in found], True)
        self.examples_seen += self.examples_in(step)
        counts = self.global_counts(batches)
        for i, batch in enumerate(batches):
            with self.placement.micro_batch(last=i == len(batches) - 1):
                loss, metrics = self.terms(batch, counts)
                self.placement.backward(loss)
            self.window.add(metrics)
        scale = learning_rate_scale(run.first_step + step - 1, self.schedule_steps, self.warmup_steps, run.scheduler)
        norm = self.norms[step] = self.placement.step(run.lr * scale, self.model_config.max_grad_norm)
        if not self.placement.reads_late or len(self.norms) >= UNREAD:
            self.check_norms()
        if run.sync_reference and step % run.sync_reference == 0:
            assert self.reference is not None, "checked before the model was loaded"
            self.placement.move_reference(self.reference, run.sync_reference_rate)
        self.window.add({"grad_norm": Mean(norm, 1.0)})
        return sum(counted.tokens for batch in batches for counted in batch.counted)

    def check_norms(self) -> None:
        """Refuse to go on, or to write anything, after a gradient that was not a number."""
        norms, self.norms = self.norms, {}
        check_finite(norms)

    # ---- evaluation and logging

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the global means over the test items; `loss/eval` where every term of the loss is among them."""
        window = Window()
        with scoring(self.policy):
            for batch in self._test_batches():
                window.add(self.terms(batch, dict.fromkeys(self.counts(batch), 1.0))[1])
        return named(means(window.reduced(self._reduce)), "eval", is_whole=not self.held_out_in_part)

    def _test_batches(self) -> Iterable[Batch]:
        """Give the batches of the test items, one by one where a method does not want to see all of them at once."""
        size, world_size = self.model_config.eval_batch_size, self.processes.world_size
        micros = self.deal(self.test_items, range(len(self.test_items)), size, world_size)
        if not self.moves_its_data() and type(self).prepared is BasicTrainer.prepared:
            return (self.batch_of(items) for items in micros)
        return self.prepared([self.batch_of(items) for items in self.rollout(list(micros), 0)], False)

    def _evaluate_and_log(self, step: int) -> dict[str, float]:
        self.check_norms()
        if not self.test_items:
            return {}
        row = self.evaluate()
        self.book.write({"step": step, "examples": self.examples_seen, **row})
        return row

    def _log_train(self, step: int, tokens: int, seconds: float) -> None:
        self.check_norms()
        row = named(means(self.window.reduced(self._reduce)), "train")
        total = self.add_tally(tokens)
        lr = self.placement.optimizer.param_groups[0]["lr"]
        speed = {"tokens_per_second": round(total / max(seconds, 1e-9), 1)}
        said = {name: int(self.state[name]) for name in self.tally if name in self.state}
        self.book.write({"step": step, "examples": self.examples_seen, **row, "lr": lr, **speed, **said})
        self.window = Window()

    def add_tally(self, tokens: int = 0) -> float:
        """Add what the processes counted to the run's state, and return the sum of their `tokens`."""
        total, *counts = self._reduce(torch.tensor([tokens, *self.tally.values()], dtype=torch.float64)).tolist()
        for name, count in zip(self.tally, counts, strict=True):
            if count:
                self.state[name] = self.state.get(name, 0.0) + count
            self.tally[name] = 0
        return float(total)

    # ---- save and resume

    def data_digest(self) -> str:
        """Hash the training sequences in their order: a resume on other data is refused."""
        return items_digest(self.train_items)

    @cached_property
    def digest_of_data(self) -> str:
        """Return the data's digest, made once: the items of a run stay what they are."""
        return self.data_digest()

    def save_model(self, name: str) -> None:
        """Write the policy as an ordinary Hugging Face folder run_dir/name (LoRA merged); all ranks call it."""
        state = self.placement.whole_weights()
        state = {key: value for key, value in state.items() if not key.startswith(VALUE_HEAD)}  # an aid of training
        if self.processes.is_main:
            model = self.placement.unwrapped(self.policy)
            export.save_model(model, self.tokenizer, self.run_config.run_dir / name, state_dict=state)
        self.processes.wait()
