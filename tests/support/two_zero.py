"""Run by two processes (test_zero.py): DeepSpeed's engine against plain torch on one process, loss by loss.

Every rank also trains the whole batch alone, without sharding; both ways take the trainer's own terms and counts.
"""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import models
from engine.export import add_lora
from engine.optimizer import optimizer_of
from engine.processes import Processes
from engine.zero import ZeRO
from generation.on_policy import sample_rows
from tests.support.bigram import items_of, trainer_of
from trainers.value_head import add_value_head

ODD = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
BUILD = f"++model.build={ODD}vocab_size: 265}}"  # an odd vocabulary: shards of unequal size
LORA = ["model.use_peft=true", "model.peft.lora_r=4", "model.peft.lora_dropout=0.0"]
CPU = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
# Sums over ragged rows in another order, two or three AdamW steps at 3e-4: at most 6e-6 was seen.
ATOL = 1e-5
PROCESSES = Processes()
CLIP = 0.05  # far below the gradient's norm


class Twin:
    """One trainer, its policy under ZeRO and its twin on this process alone."""

    def __init__(self, loss: str, *overrides: str) -> None:
        self.trainer = trainer_of(loss, BUILD, "lr=3e-4", *overrides)
        self.items = items_of(self.trainer, loss)[:5] + items_of(self.trainer, loss)[-2:]  # 7 do not divide by 2
        self.config = replace(self.trainer.model_config, build_seed=1)
        self.zero = ZeRO(PROCESSES, self.config)
        head = self.trainer.head
        self.alone = self.model(head)
        self.optimizer = optimizer_of(self.alone, self.trainer.run_config)
        self.zero.place_policy(self.model(head, empty=self.zero.empty), self.trainer.run_config)
        self.plain, self.placed = {}, {}
        names = ["reference", *self.trainer.frozen_models] if self.trainer.needs.reference else []
        for seed, name in enumerate(names or self.trainer.frozen_models, 2):
            if name == "reference" and self.config.use_peft:
                continue
            config = replace(self.config, build_seed=seed)
            self.plain[name] = models.load_model(config, trainable=False)
            place = self.zero.place_reference if name == "reference" else self.zero.place_frozen
            self.placed[name] = place(models.load_model(config, trainable=False, empty=self.zero.empty))

    def model(self, head: str, empty: bool = False) -> torch.nn.Module:
        model = models.load_model(self.config, trainable=True, head="lm", empty=empty)
        model = add_lora(model, self.config) if self.config.use_peft else model
        if head == "value":
            add_value_head(model)
        return model

    def use(self, policy: torch.nn.Module, frozen: dict) -> None:
        self.trainer.policy, self.trainer.reference = policy, frozen.get("reference")
        self.trainer.frozen_models = {name: frozen[name] for name in self.trainer.frozen_models}
        policy.train()

    def losses(self, micros: list) -> Iterator[Tensor]:
        """Yield the share of each micro-batch in the global mean loss."""
        batches = self.trainer.prepared([self.trainer.batch_of(micro) for micro in micros], True)
        counts = self.trainer.global_counts(batches)
        return (self.trainer.terms(batch, counts)[0] for batch in batches)

    def step_alone(self, lr: float) -> float:
        self.use(self.alone, self.plain)
        for loss in self.losses([self.items]):
            (loss * 2).backward()  # the counts are of two processes
        norm = float(torch.nn.utils.clip_grad_norm_(self.alone.parameters(), CLIP))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def step_sharded(self, lr: float) -> float:
        self.use(self.zero.policy, self.placed)
        micros = list(self.trainer.deal(self.items, list(range(len(self.items))), 2, 2))
        losses = self.losses(micros)
        for i in range(len(micros)):
            with self.zero.micro_batch(last=i == len(micros) - 1):
                self.zero.backward(next(losses))
        return self.zero.step(lr, CLIP)

    def steps(self, *rates: float, tolerance: float = 2e-5) -> None:
        state = dict(self.trainer.state)
        for lr in rates:
            self.trainer.state = dict(state)
            one = self.step_alone(lr)
            self.trainer.state = dict(state)
            two = self.step_sharded(lr)
            assert one > CLIP and abs(one - two) < tolerance * one, (one, two)

    def check(self) -> None:
        same(self.zero, self.zero.policy, self.alone)


def same(zero: ZeRO, model: torch.nn.Module, alone: torch.nn.Module) -> None:
    whole, expected = zero.whole_weights_of(model), alone.state_dict()
    if not zero.processes.is_main:
        assert whole == {}
        return
    assert whole.keys() == expected.keys(), whole.keys() ^ expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(whole[name], value, atol=ATOL, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def say(name: str, started: float) -> None:
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        print(f"equal {name} ({time.perf_counter() - started:.1f} s)", flush=True)


def rollouts(twin: Twin) -> None:
    """Rollouts of a sharded policy: other numbers of rows and of tokens on each rank."""
    zero, tokenizer = twin.zero, twin.trainer.tokenizer
    prompts = [[4, 5, 6], [7], [8, 9]][: 2 + zero.processes.rank]
    answers = []
    for model in (twin.alone, zero.policy):
        inner = zero.unwrapped(model) if model is zero.policy else model
        inner.eval()
        with zero.generating(model) if model is zero.policy else torch.no_grad():
            answers.append(
                sample_rows(
                    inner, tokenizer, prompts, [1, 2, 3][: len(prompts)], 5 + zero.processes.rank, [1], zero.in_step
                )
            )
        inner.train()
    assert answers[0] == answers[1], answers


def moving_reference_and_resume(twin: Twin) -> None:
    """DPO with sync_reference: the reference follows in float32, and a checkpoint goes on with both."""
    zero, reference = twin.zero, twin.plain["reference"]
    zero.move_reference(twin.placed["reference"], 0.3)
    with torch.no_grad():
        for old, new in zip(reference.parameters(), twin.alone.parameters(), strict=True):
            old.lerp_(new, 0.3)
    same(zero, twin.placed["reference"], reference)
    twin.steps(3e-4)  # its forward pass uses what moved
    folder = [tempfile.mkdtemp() if zero.processes.is_main else None]
    torch.distributed.broadcast_object_list(folder)
    zero.write(Path(folder[0]), {"reference": twin.placed["reference"]})
    again = Twin("dpo")
    again.zero.read(Path(folder[0]), {"reference": again.placed["reference"]})
    again.alone.load_state_dict(twin.alone.state_dict())
    again.optimizer.load_state_dict(twin.optimizer.state_dict())
    again.plain = twin.plain
    again.check()
    again.steps(3e-4, 3e-4)  # moments were restored, too
    again.check()


def refusal(twin: Twin) -> None:
    """A gradient that is not finite changes no weight."""
    before = twin.zero.whole_weights()
    twin.use(twin.zero.policy, twin.placed)
    micros = list(twin.trainer.deal(twin.items, list(range(len(twin.items))), 4, 2))
    with twin.zero.micro_batch(last=True):
        twin.zero.backward(next(twin.losses(micros)) * float("inf"))
    assert math.isnan(twin.zero.step(3e-4, CLIP))
    after = twin.zero.whole_weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def bfloat16(started: float) -> None:
    """Computing in bfloat16 over float32 shards: autocast's numbers, up to the rounding of what is sent."""
    twin = Twin("dpo", "model.policy_dtype=bfloat16")
    twin.steps(3e-4, 3e-4, tolerance=0.02)
    expected = twin.alone.state_dict()
    for name, value in twin.zero.whole_weights().items():
        assert value.dtype == torch.float32
        assert float((value - expected[name]).abs().max()) <= 4 * 3e-4, name  # AdamW moves by the rate, up or down
    say("bfloat16", started)


def main() -> None:
    """Print `equal NAME` for each case."""
    for loss in ("sft", "dpo", "dckd", "adpa", "gkd", "kto", "ppo"):
        started = time.perf_counter()
        twin = Twin(loss)
        twin.steps(3e-4, 1.5e-4)
        if loss == "ppo":
            rollouts(twin)
            twin.steps(3e-4)
        twin.check()
        if loss == "dpo":
            moving_reference_and_resume(twin)
        if loss == "sft":
            refusal(twin)
        say(loss, started)
    for name, loss, overrides, variables in [
        ("lora", "dpo", LORA, {}),
        ("checkpointing", "sft", ["model.activation_checkpointing=true"], {}),
        ("stage 1", "dpo", [], {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
        ("stage 2", "dpo", [], {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("offload", "dpo", [], CPU),
    ]:
        started = time.perf_counter()
        os.environ.update(variables)
        twin = Twin(loss, *overrides)
        twin.steps(3e-4, 1.5e-4)
        if name == "lora":
            rollouts(twin)
        twin.check()
        for key in variables:
            del os.environ[key]
        say(name, started)
    bfloat16(time.perf_counter())
    PROCESSES.close()


if __name__ == "__main__":
    main()
