"""TRL's trainers, an optimizer step a turn: runs in the rivals' environment, from the repository's root.

    python -m benchmarks.rivals.trl_worker sft|dpo|dpo_precomputed|gkd MODEL_FOLDER MICRO_BATCH ACCUMULATION MAX_LENGTH

The rows come as token ids in the order in which our trainer takes them up, so every step has the very same sequences
and, before either side moves them, the same micro-batches. Activation checkpointing is off, as it is with ours by
default (TRL's default is on); everything else that costs time is TRL's default.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.measure import Clock, ComputedTokens
from benchmarks.turns import Served


def common(folder: str, micro: int, accumulation: int) -> dict[str, Any]:
    """Return the arguments that every trainer gets."""
    gpu = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-7,
        "use_cpu": not gpu,
        "bf16": gpu,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def read_rows(path: str) -> list[list[dict[str, list[int]]]]:
    """Read the rows that our process wrote: the sides of each item."""
    return [json.loads(line)["sides"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def first_supervised(side: dict[str, list[int]]) -> int:
    """Return the place of the first supervised token."""
    return side["response"].index(1)


def pairs_of(rows: list[list[dict[str, list[int]]]]) -> Dataset:
    """Return the columns of DPO after tokenizing."""
    found = []
    for chosen, rejected in rows:
        start = min(first_supervised(chosen), first_supervised(rejected))
        prompt, sides = chosen["ids"][:start], (chosen["ids"][start:], rejected["ids"][start:])
        found.append({"prompt_ids": prompt, "chosen_ids": sides[0], "rejected_ids": sides[1]})
    return Dataset.from_list(found)


class Prepared(trl.DPOTrainer):
    """DPO on rows that are token ids already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def labeled(examples: list[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Pad rows for GKD, whose own collator wants conversations."""
    longest = max(len(e["input_ids"]) for e in examples)
    fill = lambda values, with_: values + [with_] * (longest - len(values))  # noqa: E731
    labels = [[t if on else -100 for t, on in zip(e["input_ids"], e["completion_mask"], strict=True)] for e in examples]
    return {
        "input_ids": torch.tensor([fill(e["input_ids"], pad) for e in examples]),
        "attention_mask": torch.tensor([fill([1] * len(e["input_ids"]), 0) for e in examples]),
        "labels": torch.tensor([fill(row, -100) for row in labels]),
    }


def trainer_of(method: str, model: Any, folder: str, rows: Any, args: dict[str, Any], max_length: int) -> Any:
    """Make TRL's trainer of a method."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if method.startswith("dpo"):
        config = trl.DPOConfig(**args, max_length=max_length, precompute_ref_log_probs=method == "dpo_precomputed")
        return Prepared(model=model, args=config, train_dataset=pairs_of(rows), processing_class=tokenizer)
    data = Dataset.from_list([{"input_ids": side["ids"], "completion_mask": side["response"]} for (side, *_) in rows])
    if method == "sft":
        config = trl.SFTConfig(**args, max_length=max_length, completion_only_loss=True)
        return trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return GKDTrainer(
        model=model,
        teacher_model=load(folder),
        args=GKDConfig(**args, max_length=max_length, lmbda=0.0, beta=0.5, temperature=1.0),
        data_collator=lambda examples: labeled(examples, tokenizer.pad_token_id),
        train_dataset=data,
        processing_class=tokenizer,
    )


def load(folder: str) -> Any:
    """Load a model as we do: float32 weights."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Turns(TrainerCallback):
    """Waits before every step and tells its cost behind it."""

    def __init__(self, served: Served, computed: ComputedTokens) -> None:
        self.served, self.computed, self.clock = served, computed, None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the turn."""
        if self.clock is None:
            self.computed.taken()
            self.served.answer(trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__)
        self.served.wait()
        self.clock = self.clock or Clock()
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell seconds, peak and computed tokens."""
        self.served.answer(**self.clock.end(), computed=self.computed.taken())


def main() -> None:
    """Train until nobody asks for a further step."""
    served, (method, folder, micro, accumulation, max_length) = Served(), sys.argv[1:]
    model = load(folder)
    rows = read_rows(served.wait()["rows"])
    with tempfile.TemporaryDirectory() as out:
        args = common(out, int(micro), int(accumulation))
        trainer = trainer_of(method, model, folder, rows, args, int(max_length))
        trainer.add_callback(Turns(served, ComputedTokens(model)))
        trainer.train()


if __name__ == "__main__":
    main()
