"""task=train: load data and models, hand them to the method's trainer, save FINAL."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from dataloader import Example, load_examples
from engine import checkpoint, export, meter, preemption
from engine.compiling import check_compiler
from engine.processes import Processes
from engine.strategy import placement_of
from report.inspection import warnings
from report.run_facts import facts_of, write_card
from rewards.reward_model import check_reward_model
from settings.artifacts import write_text
from settings.methods import method_class
from settings.schema import Settings
from teacher.cache import check_whole
from teacher.precision import teacher_dtype
from teacher.vocabulary import check_reads_ours
from templates import turn_end
from tokens.columns import SIDES, sides_of
from tokens.examples import held
from trainers import reference
from trainers.basic import BasicTrainer
from trainers.batches import Item, joined, num_tokens
from trainers.value_head import add_value_head


def run(settings: Settings) -> None:
    """Train with the method that the loss names; the model lands in run_dir/FINAL."""
    processes = Processes()
    check_compiler(settings.model, processes.device)
    used = meter.Meter()
    placement = placement_of(settings.run.strategy, settings.model, processes)
    tokenizer = models.load_tokenizer(settings.model)
    trainer: BasicTrainer = method_class(settings.raw["loss"]["trainer"])(settings, tokenizer, placement)
    check_inputs(settings, trainer)
    train, test = _examples(settings, tokenizer)
    if trainer.needs.data == "pairs":
        for part in (train, test):
            _check_pairs(part, settings.raw["loss"]["name"])
    objective = f"loss={settings.raw['loss']['name']}: {trainer.objective()}"
    processes.print(f"{objective}\nstrategy={placement.name}, {processes.world_size} process(es)")
    if processes.is_main:
        write_text(settings.run.run_dir / "objective.txt", objective + "\n")
        for line in warnings(train, test, turn_end(tokenizer).id, settings.model.max_length):
            print(line, flush=True)
    for key in ("eval_every", "do_first_eval"):
        if getattr(settings.run, key) and not test:
            processes.print(f"warning: {key} does nothing: no data set has a test split (datasets.NAME.test=FILE)")
    _show(train[0], tokenizer, processes)
    items = trainer.items(train, "train")
    test_items = trainer.items(test, "test") if test else []
    ref_model = None
    if trainer.needs.reference:
        ref_model, items, test_items = _reference(settings, trainer, items, test_items)
    policy = _policy(settings, trainer)
    _load_frozen_models(settings, trainer, policy)
    used.restart()
    before = checkpoint.examples_seen(settings.run.run_dir)
    with preemption.watched():
        trainer.fit(policy, ref_model, items, test_items)
    _record(settings, trainer, used, trainer.examples_seen - before)
    trainer.save_model("FINAL")
    if processes.is_main:
        facts = facts_of(trainer.settings, trainer.objective(), trainer.head, len(train), len(test))
        write_card(settings.run.run_dir / "FINAL", facts)
        checkpoint.remove_all(settings.run.run_dir)
    if processes.world_size > 1:
        # DDP goes before its process group: as the group's last owner it would join gloo's thread with Python's lock
        # held, and that thread may be waiting for the lock (seen as a rank that never ends).
        del trainer, placement
        gc.collect()  # DDP and its hooks refer to each other
        processes.close()


def check_inputs(settings: Settings, trainer: BasicTrainer) -> None:
    """Refuse a folder or file of the model or the loss that is not there, before rows are tokenized."""
    models.model_source(settings.model)
    for folder, _ in trainer.frozen_model_folders().values():
        models.local_source(folder)
    for key in ("teacher_cache", "advantages"):
        value = getattr(trainer.config, key, None)
        for cache in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(cache, str) and not cache.startswith(("hub:", "hf://")):
                check_whole(Path(cache).expanduser(), f"loss.{key}: ")
    file = getattr(trainer.config, "generations", None)
    if isinstance(file, str) and not Path(file).expanduser().is_file():
        raise ValueError(f"loss.generations={file}: no such file; task=generate writes generations.jsonl")


def _examples(settings: Settings, tokenizer: object) -> tuple[Sequence[Example], Sequence[Example]]:
    run = settings.run
    limits = {"train": run.n_examples, "test": run.n_eval_examples}
    train, test = (
        load_examples(
            settings.datasets, split, tokenizer, settings.model, limit, run.seed, run.tokens_dir, run.num_proc
        )
        for split, limit in limits.items()
    )
    return train, test


def _check_pairs(examples: Sequence[Example], loss: str) -> None:
    """Refuse a row that holds no pair, by its place."""
    lacks = sides_of(examples).lengths[:, :2] < 0
    for row in np.flatnonzero(lacks.any(axis=1)).tolist():
        missing = [name for name, lacking in zip(SIDES, lacks[row], strict=False) if lacking]
        raise ValueError(
            f"{examples[row].where}: loss={loss} learns from pairs, and this row has no {' and no '.join(missing)}; it "
            f"gives {held(examples[row])}. Check datasets= and its format, or remove the row"
        )


def _show(example: Example, tokenizer: Any, processes: Processes) -> None:
    """Print one decoded example, both sides of a pair, so that a template gone wrong is seen before the first step."""
    tokens = example.chosen or example.response
    if tokens is None:
        return
    sides = {"": tokens} if example.rejected is None else {" chosen": tokens, " rejected": example.rejected}
    lines = [f"first example ({len(tokens.ids)} tokens): {tokenizer.decode(tokens.ids)[:400]!r}"]
    for name, side in sides.items():
        supervised = tokenizer.decode([i for i, on in zip(side.ids, side.response, strict=True) if on])
        lines.append(f"supervised{name}: {supervised[:200]!r}")
    processes.print("\n".join(lines))


def _record(settings: Settings, trainer: BasicTrainer, used: meter.Meter, examples: int) -> None:
    """Write what this process and its neighbors used into resources.json; all ranks call it."""
    everyone, items = trainer.processes.gathered([used.used()]), trainer.train_items
    tokens = examples * num_tokens(items) / len(items)
    if trainer.processes.is_main:
        device, name = "gpu" if used.gpu else "cpu", trainer.placement.name
        found = meter.write(settings.run.run_dir, everyone, used.seconds, tokens, device, name)
        print(meter.sentence(found, settings.run.run_dir))


def _policy(settings: Settings, trainer: BasicTrainer) -> torch.nn.Module:
    config = settings.model
    placement = trainer.placement
    policy = models.load_model(
        config, dtype=placement.master_dtype(), trainable=True, head=trainer.head, empty=placement.empty
    )
    if trainer.head == "reward":
        models.set_padding(policy, trainer.tokenizer)
    model = export.add_lora(policy, config) if config.use_peft else policy
    if trainer.head == "value":
        add_value_head(model)
    return model


def _load_frozen_models(settings: Settings, trainer: BasicTrainer, policy: torch.nn.Module) -> None:
    """Load the frozen models that the method asks: they read the policy's token ids, so they must know its tokens, or
    the same text in their own.
    """
    for name, (folder, head) in trainer.frozen_model_folders().items():
        if head == "reward":
            check_reward_model(folder, f"loss.{name}")
        device = trainer.placement.device
        if head == "lm":
            dtype = teacher_dtype(settings.model, device, trainer.placement.narrow)
        else:
            dtype = models.resolve_dtype(settings.model.reference_dtype, device)
        config = settings.model.of_folder(folder)
        tokenizer = models.load_tokenizer(config)
        if head == "lm" and trainer.aligns_bytes:
            trainer.frozen_tokenizers[name] = tokenizer
        else:
            check_reads_ours(trainer.tokenizer, tokenizer, f"{name} {folder}")
        model = models.load_model(config, dtype=dtype, trainable=False, head=head, empty=trainer.placement.empty)
        if head == "lm" and name not in trainer.frozen_tokenizers:
            _check_width(model, policy, trainer, f"{name} {folder}")
        trainer.frozen_models[name] = trainer.placement.place_frozen(model)


def _check_width(model: Any, policy: Any, trainer: BasicTrainer, what: str) -> None:
    """Refuse a teacher whose head has fewer of the tokenizer's ids than the policy's, or more; padding rows beyond the
    tokenizer's last id may differ, they are cut off.
    """
    rows = [one.config.get_text_config().vocab_size for one in (policy, model)]
    own, other = (min(number, len(trainer.tokenizer)) for number in rows)
    if own != other:
        raise ValueError(
            f"{what} has {rows[1]} rows for the {len(trainer.tokenizer)} tokens, the policy {rows[0]}: "
            "their distributions are over different ids. Use a model of the same family"
        )


def _reference(
    settings: Settings, trainer: BasicTrainer, items: Sequence[Item], test_items: Sequence[Item]
) -> tuple[torch.nn.Module | None, Sequence[Item], Sequence[Item]]:
    """Return the frozen reference, or None and items that carry its log-probabilities (or LoRA, whose base it is)."""
    run, config = settings.run, models.start_of(settings.model)
    cached = run.cache_reference_logprobs or run.load_reference_logprobs
    if trainer.keeps_start and not cached:
        items, test_items = _scored(settings, trainer, items, test_items)
    if config.use_peft and not cached and not settings.model.from_checkpoint:
        return None, items, test_items
    if not cached:
        dtype = trainer.placement.reference_dtype(moving=bool(run.sync_reference))
        model = models.load_model(config, dtype=dtype, trainable=False, empty=trainer.placement.empty)
        return model, items, test_items
    return None, *_scored(settings, trainer, items, test_items)


def _scored(
    settings: Settings, trainer: BasicTrainer, items: Sequence[Item], test_items: Sequence[Item]
) -> tuple[Sequence[Item], Sequence[Item]]:
    """Return the items with the reference's log-probabilities, scored once and shared between runs."""
    # The starting policy is the reference: a checkpoint of an interrupted run moves the policy only.
    config = models.start_of(settings.model)
    dtype = trainer.placement.reference_dtype(moving=False)

    def load() -> torch.nn.Module:
        return models.load_model(config, dtype=dtype, trainable=False, empty=trainer.placement.empty)

    folder = reference.cached(trainer, joined(items, test_items), load)
    trainer.processes.print(f"reference log-probabilities: {folder}")
    return reference.attach(trainer, items, folder), reference.attach(trainer, test_items, folder)
