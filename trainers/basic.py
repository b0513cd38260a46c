"""BasicTrainer: the one loop. A method says what an item is, counts its units and returns sums; the rest is here.

Per optimizer step: count every term's units over all micro-batches and ranks, scale each term's SUM by 1 / global
count, back-propagate, clip, update. So 1x8, 8x1 and two ranks give the gradient of the same global mean.
Data order, dropout and learning rate are functions of (seed, step): a resumed run needs no generator state.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import models
from dataloader import Example, Tokens, epoch_order, local_micro_batches
from functional import row_sums, token_logps
from models import ResponseLogits, response_logits
from schema import Settings
from teacher_cache import content_key
from trainers import checkpoint, signals
from trainers.batches import Batch, Item, make_batch
from trainers.metrics import Mean, MetricsFile, Window, means


def learning_rate_scale(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the factor on the peak rate at `step` (from 0): linear warm-up from 0, then cosine, linear or constant."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return max(0.0, 1.0 - progress) if schedule == "linear" else 1.0


def check_strategy(asked: str, accelerator: Accelerator) -> str:
    """Return the strategy that runs; raise ValueError if another one was asked for (accelerate drops FSDP on CPU)."""
    kind = accelerator.distributed_type.value
    running = {"NO": "none", "FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(kind, "ddp")
    asks_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    wanted = "fsdp" if asked == "auto" and asks_fsdp else asked
    if wanted not in ("auto", running):
        raise ValueError(
            f"strategy {wanted!r} was asked for, {running!r} is running ({accelerator.num_processes} processes on "
            f"{accelerator.device.type}). accelerate runs FSDP on GPUs only; use accelerate_config/cpu_2.yaml on CPU"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise ValueError(
            f"{world} processes were started but each runs alone and would write the same folder. On CPU start with "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N launch.py ..., not `use_cpu: true`"
        )
    return running


class BasicTrainer:
    """Train a policy on items. Subclasses set `needs_reference` and define items, counts and sums."""

    VERSION: ClassVar[int] = 1  # raise it when a method's numbers change: pipelines then run its stages again
    needs_reference: ClassVar[bool] = False

    def __init__(self, settings: Settings, tokenizer: Any, accelerator: Accelerator) -> None:
        self.settings, self.run_config, self.model_config = settings, settings.run, settings.model
        self.config: Any = settings.loss
        self.tokenizer, self.accelerator = tokenizer, accelerator
        self.vocab_size = len(tokenizer)
        world, accum = accelerator.num_processes, settings.model.gradient_accumulation_steps
        if settings.model.batch_size % (world * accum):
            raise ValueError(
                f"model.batch_size={settings.model.batch_size} (global) is not divisible by {world} processes x "
                f"model.gradient_accumulation_steps={accum}; a multiple of {world * accum} works"
            )
        self.micro_size = settings.model.batch_size // (world * accum)
        self.reference: torch.nn.Module | None = None

    # ---- what a method defines

    def items(self, examples: list[Example], split: str) -> list[Item]:
        """Turn examples into items, teacher signals attached."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """Count the units of each term in a batch."""
        raise NotImplementedError

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return each term's weighted SUM over the batch, and metrics."""
        raise NotImplementedError

    # ---- shared pieces

    def sequence_logps(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Return log pi(y|x) of every row, [S*B]; policy and reference go through this same function."""
        with self._autocast(model):
            out = response_logits(model, batch.sequences, self.vocab_size)
        return row_sums(token_logps(out.logits, out.targets), out.rows, len(batch.sequences.ids))

    @torch.no_grad()
    def reference_logps(self, batch: Batch) -> Tensor:
        """Return the reference's log pi_0(y|x) [S*B]: from the batch if cached, else live."""
        if batch.reference_logps is not None:
            return batch.reference_logps
        if self.reference is not None:
            return self.sequence_logps(self.reference, batch)
        with self.accelerator.unwrap_model(self.policy).disable_adapter():  # LoRA: the base model is the reference
            return self.sequence_logps(self.policy, batch)

    def _autocast(self, model: torch.nn.Module) -> Any:
        device = self.accelerator.device
        dtype = models.resolve_dtype(self.model_config.policy_dtype, device)
        stored = next(model.parameters()).dtype
        return nullcontext() if stored == dtype else torch.autocast(device.type, dtype)

    def batch_of(self, items: list[Item]) -> Batch:
        """Pad items onto this rank's device."""
        pad = self.tokenizer.pad_token_id
        with_reference = self.needs_reference and items[0].reference_logps is not None
        return make_batch(items, pad, with_reference).to(self.accelerator.device)

    # ---- the loop

    def fit(
        self, policy: torch.nn.Module, reference: torch.nn.Module | None, train: list[Item], test: list[Item]
    ) -> dict[str, float]:
        """Train to the end, resuming from the newest whole checkpoint; return the last evaluation's metrics."""
        run, accelerator = self.run_config, self.accelerator
        self.reference = reference if reference is None else self._place_reference(reference)
        optimizer = self._optimizer(policy)
        self.policy, self.optimizer = accelerator.prepare(policy, optimizer)
        self.train_items, self.test_items = train, test
        self.steps_per_epoch = math.ceil(len(train) / self.model_config.batch_size)
        self.total_steps = run.n_steps or run.n_epochs * self.steps_per_epoch
        self.warmup_steps = round(run.warmup * self.total_steps) if run.warmup < 1 else int(run.warmup)
        self.window, self.examples_seen = Window(), 0
        step = self._resume()
        first = step + 1
        self.rows = MetricsFile(run.run_dir / "metrics.jsonl", step) if accelerator.is_main_process else None
        self.tracker = _tracker(self.settings) if accelerator.is_main_process else None
        if run.do_first_eval and step == 0:
            self._evaluate_and_log(0)
        started, tokens = time.perf_counter(), 0
        bar = tqdm(
            total=self.total_steps,
            initial=step,
            desc=run.exp_name,
            mininterval=1,
            disable=not accelerator.is_local_main_process,
        )
        last_eval: dict[str, float] = {}
        for step in range(first, self.total_steps + 1):
            tokens += self._step(step)
            bar.update()
            if run.log_every and (step % run.log_every == 0 or step == self.total_steps):
                self._log_train(step, tokens, time.perf_counter() - started)
                started, tokens = time.perf_counter(), 0
            if step == self.total_steps or (run.eval_every and step % run.eval_every == 0):
                last_eval = self._evaluate_and_log(step)
            stop = step < self.total_steps and signals.stop_agreed(self._reduce)
            if stop or (run.save_every and step % run.save_every == 0 and step < self.total_steps):
                self._save(step)
            if stop:
                signals.leave(step)
        bar.close()
        if self.tracker is not None:
            self.tracker.finish()
        return last_eval

    def _place_reference(self, reference: torch.nn.Module) -> torch.nn.Module:
        if self.accelerator.distributed_type.value == "FSDP":
            return self.accelerator.prepare_model(reference, evaluation_mode=True)
        return reference.to(self.accelerator.device)

    def _optimizer(self, policy: torch.nn.Module) -> torch.optim.Optimizer:
        run = self.run_config
        params = [p for p in policy.parameters() if p.requires_grad]
        if run.optimizer == "SGD":
            return torch.optim.SGD(params, lr=run.lr, weight_decay=run.weight_decay)
        cls = torch.optim.AdamW if run.optimizer == "AdamW" else torch.optim.Adam
        return cls(params, lr=run.lr, betas=(run.betas[0], run.betas[1]), eps=1e-8, weight_decay=run.weight_decay)

    def _micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step; ranks without a row get an uncounted filler."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        size, world = self.model_config.batch_size, self.accelerator.num_processes
        order = epoch_order(len(self.train_items), self.run_config.seed, epoch)
        chosen = order[index * size : (index + 1) * size]
        self.examples_seen += len(chosen)
        return list(self._deal(self.train_items, chosen, self.micro_size, world))

    def _deal(self, items: list[Item], indices: list[int], micro_size: int, world: int) -> Iterator[Batch]:
        micro_steps = math.ceil(math.ceil(len(indices) / world) / micro_size)
        for micro in local_micro_batches(indices, micro_size, micro_steps, self.accelerator.process_index, world):
            yield self.batch_of([items[i] for i in micro] or [items[indices[0]].filler()])

    def _global_counts(self, batches: list[Batch]) -> dict[str, float]:
        counted = [self.counts(batch) for batch in batches]
        names = list(counted[0])
        local = torch.tensor([float(sum(c[name] for c in counted)) for name in names], dtype=torch.float64)
        return dict(zip(names, self._reduce(local).tolist(), strict=True))

    def _reduce(self, table: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return table
        return self.accelerator.reduce(table.to(self.accelerator.device), "sum").cpu()

    def _terms(self, batch: Batch, counts: dict[str, float]) -> tuple[Tensor, dict[str, Mean]]:
        """Return a batch's share of the global mean loss, and its metrics with the terms among them."""
        with self._autocast(self.policy):
            out = response_logits(self.policy, batch.sequences, self.vocab_size)
        sums, metrics = self.sums(out, batch)
        units = self.counts(batch)
        # A term without a unit anywhere adds nothing; its sum (zero) stays in the graph so that ranks agree.
        loss = torch.stack([value / max(1.0, counts[name]) for name, value in sums.items()]).sum()
        terms = {f"term/{name}": Mean(value.detach(), units[name]) for name, value in sums.items()}
        return loss, {**terms, **metrics}

    def _step(self, step: int) -> int:
        """Do one optimizer step; return the number of supervised tokens this rank saw."""
        run, accelerator = self.run_config, self.accelerator
        _seed_step(run.seed, step, accelerator.process_index)
        self.policy.train()
        batches = self._micro_batches(step)
        counts = self._global_counts(batches)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.policy):
                loss, metrics = self._terms(batch, counts)
                # DDP and FSDP average gradients over ranks; the counts are already global.
                accelerator.backward(loss * accelerator.num_processes)
            self.window.add(metrics)
        norm = float(accelerator.clip_grad_norm_(self.policy.parameters(), self.model_config.max_grad_norm))
        if not math.isfinite(norm):
            raise ValueError(
                f"step {step}: the gradient norm is {norm}; the update was not made. Lower lr or check the data"
            )
        scale = learning_rate_scale(step - 1, self.total_steps, self.warmup_steps, run.scheduler)
        for group in self.optimizer.param_groups:
            group["lr"] = run.lr * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window.add({"grad_norm": Mean(norm, 1.0)})
        return sum(int(batch.sequences.response.sum()) for batch in batches)

    # ---- evaluation and logging

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the global means over the test items, `loss/eval` among them."""
        window = Window()
        self.policy.eval()
        world = self.accelerator.num_processes
        for start in range(0, len(self.test_items), self.model_config.eval_batch_size * world):
            stop = min(start + self.model_config.eval_batch_size * world, len(self.test_items))
            for batch in self._deal(
                self.test_items, list(range(start, stop)), self.model_config.eval_batch_size, world
            ):
                window.add(self._terms(batch, dict.fromkeys(self.counts(batch), 1.0))[1])
        return _named(means(window.reduced(self._reduce)), "eval")

    def _evaluate_and_log(self, step: int) -> dict[str, float]:
        if not self.test_items:
            return {}
        row = self.evaluate()
        self._write({"step": step, "examples": self.examples_seen, **row})
        return row

    def _log_train(self, step: int, tokens: int, seconds: float) -> None:
        row = _named(means(self.window.reduced(self._reduce)), "train")
        total = float(self._reduce(torch.tensor([float(tokens)], dtype=torch.float64))[0])
        lr = self.optimizer.param_groups[0]["lr"]
        speed = {"tokens_per_second": round(total / max(seconds, 1e-9), 1)}
        self._write({"step": step, "examples": self.examples_seen, **row, "lr": lr, **speed})
        self.window = Window()

    def _write(self, row: dict[str, Any]) -> None:
        if self.rows is not None:
            self.rows.write(row)
        if self.tracker is not None:
            self.tracker.log(row, step=row["step"])

    # ---- save and resume

    def data_digest(self) -> str:
        """Hash the training sequences in their order: a resume on other data is refused."""
        digest = hashlib.sha256()
        for item in self.train_items:
            for tokens in item.sequences:
                digest.update(content_key(tokens.ids, tokens.response))
        return digest.hexdigest()[:16]

    def _save(self, step: int) -> None:
        sums = self.window.reduced(self._reduce)
        if not self.accelerator.is_main_process:
            self.window = Window()  # rank 0 carries the window of all from here on
        else:
            self.window.sums = sums
        state = {
            "examples": self.examples_seen,
            "window": sums,
            "data": self.data_digest(),
            "total_steps": self.total_steps,
        }
        run = self.run_config
        checkpoint.save(
            run.run_dir, step, self.policy, self.optimizer, state, self.accelerator.is_main_process, run.keep_last
        )
        if run.intermediate_checkpoints:
            self.save_model(f"step-{step}")
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        folder = checkpoint.newest(self.run_config.run_dir)
        if folder is None:
            return 0
        state = checkpoint.load(folder, self.policy, self.optimizer)
        for key, now in (("data", self.data_digest()), ("total_steps", self.total_steps)):
            if state[key] != now:
                raise ValueError(
                    f"{folder} was written with {key}={state[key]}, this run has {now}. Use the same data and schedule, "
                    "another exp_name, or remove the folder"
                )
        self.examples_seen = state["examples"]
        if self.accelerator.is_main_process:
            self.window.sums = state["window"]
        self.accelerator.print(f"resumed from {folder}")
        return state["step"]

    def save_model(self, name: str) -> None:
        """Write the policy as an ordinary Hugging Face folder run_dir/name (LoRA merged); all ranks call it."""
        state = self.accelerator.get_state_dict(self.policy)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.policy)
            models.save_model(model, self.tokenizer, self.run_config.run_dir / name, state_dict=state)
        self.accelerator.wait_for_everyone()


def supervised_sequence(tokens: Tokens | None, what: str, method: str) -> Tokens:
    """Return the tokens, or refuse a row that lacks what the method learns from."""
    if tokens is None:
        raise ValueError(f"loss={method} needs {what} in every row, and one has none. Check datasets= and its format")
    return tokens


def _named(values: dict[str, float], split: str) -> dict[str, float]:
    """Sum the terms to loss/SPLIT and give every name its split."""
    terms = {k: v for k, v in values.items() if k.startswith("term/")}
    row = {f"loss/{split}": sum(terms.values())}
    for name, value in values.items():
        head, _, tail = name.partition("/")
        row[name if name == "grad_norm" else (f"{head}_{split}/{tail}" if tail else f"{name}/{split}")] = value
    return row


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, rank), so that it needs no state in a checkpoint."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


def _tracker(settings: Settings) -> Any:
    """Start wandb if it is enabled; offline unless asked for, and never waiting for a login."""
    if not settings.wandb["enabled"]:
        return None
    import wandb

    mode = settings.wandb["mode"]
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise ValueError("wandb.mode=online needs WANDB_API_KEY in the environment; or use wandb.mode=offline")
    run_dir = settings.run.run_dir
    return wandb.init(
        project=settings.wandb["project"], entity=settings.wandb["entity"], group=settings.wandb["group"],
        name=str(run_dir.relative_to(run_dir.parents[1])), mode=mode, dir=str(run_dir), config=settings.raw,
    )  # fmt: skip
