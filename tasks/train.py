"""task=train: load data and models, hand them to the method's trainer, save FINAL."""

import gc
import importlib
from dataclasses import replace

import torch
from accelerate import Accelerator

import models
from dataloader import Example, load_examples
from engine import checkpoint
from engine import export as saving
from engine import meter as resources
from engine import preemption as signals
from engine.compiling import check_compiler
from engine.optimizer import check_strategy
from report.run_facts import facts_of, write_card
from rewards.reward_model import check_reward_model
from settings.schema import Settings
from trainers import reference
from trainers.basic import BasicTrainer
from trainers.batches import Item
from trainers.value_head import add_value_head


def run(settings: Settings) -> None:
    """Train with the method that the loss names; the model lands in run_dir/FINAL."""
    # Without this accelerate starts every process of a CPU run on its own, unless a variable tells it otherwise.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    check_compiler(settings.model, accelerator.device)
    meter = resources.Meter()
    running = check_strategy(settings.run.strategy, accelerator)
    module, _, name = settings.raw["loss"]["trainer"].rpartition(".")
    trainer_class = getattr(importlib.import_module(module), name)
    tokenizer = models.load_tokenizer(settings.model)
    trainer: BasicTrainer = trainer_class(settings, tokenizer, accelerator)
    train, test = _examples(settings, tokenizer)
    objective = f"loss={settings.raw['loss']['name']}: {trainer.objective()}"
    accelerator.print(f"{objective}\nstrategy={running}, {accelerator.num_processes} process(es)")
    if accelerator.is_main_process:
        (settings.run.run_dir / "objective.txt").write_text(objective + "\n", encoding="utf-8")
    _show(train[0], tokenizer, accelerator)
    items = trainer.items(train, "train")
    test_items = trainer.items(test, "test") if test else []
    ref_model = None
    if trainer.needs.reference:
        ref_model, items, test_items = _reference(settings, trainer, items, test_items)
    policy = _policy(settings, trainer)
    _load_frozen_models(settings, trainer)
    meter.restart()
    before = checkpoint.examples_seen(settings.run.run_dir)
    with signals.watched():
        trainer.fit(policy, ref_model, items, test_items)
    _record(settings, trainer, meter, trainer.examples_seen - before, running)
    trainer.save_model("FINAL")
    if accelerator.is_main_process:
        facts = facts_of(settings, trainer.objective(), trainer.head, len(train), len(test))
        write_card(settings.run.run_dir / "FINAL", facts)
        checkpoint.remove_all(settings.run.run_dir)
    if accelerator.num_processes > 1:
        # DDP goes before its process group: as the group's last owner it would join gloo's thread with Python's lock
        # held, and that thread may be waiting for the lock (seen as a rank that never ends).
        del trainer
        accelerator.free_memory()
        gc.collect()  # DDP and its hooks refer to each other
        accelerator.end_training()


def _examples(settings: Settings, tokenizer: object) -> tuple[list[Example], list[Example]]:
    run = settings.run
    train = load_examples(settings.datasets, "train", tokenizer, settings.model, run.n_examples, run.seed)
    test = load_examples(settings.datasets, "test", tokenizer, settings.model, run.n_eval_examples, run.seed)
    return train, test


def _show(example: Example, tokenizer: object, accelerator: Accelerator) -> None:
    """Print one decoded example, so that a template gone wrong is seen before the first step."""
    tokens = example.chosen or example.response
    if tokens is not None:
        text = tokenizer.decode(tokens.ids)  # type: ignore[attr-defined]
        supervised = tokenizer.decode([i for i, on in zip(tokens.ids, tokens.response, strict=True) if on])  # type: ignore[attr-defined]
        accelerator.print(f"first example ({len(tokens.ids)} tokens): {text[:400]!r}\nsupervised: {supervised[:200]!r}")


def _record(settings: Settings, trainer: BasicTrainer, meter: resources.Meter, examples: int, running: str) -> None:
    """Write what this process and its neighbors used into resources.json; all ranks call it."""
    used, items = trainer.gathered([meter.used()]), trainer.train_items
    tokens = examples * sum(len(s.ids) for item in items for s in item.sequences) / len(items)
    if trainer.accelerator.is_main_process:
        device = "gpu" if meter.gpu else "cpu"
        found = resources.write(settings.run.run_dir, used, meter.seconds, tokens, device, running)
        print(resources.sentence(found, settings.run.run_dir))


def _policy(settings: Settings, trainer: BasicTrainer) -> torch.nn.Module:
    config = settings.model
    if config.master_dtype == "auto":  # float32 master weights: an update of 5e-7 vanishes in bfloat16
        master = torch.float32
    else:
        master = models.resolve_dtype(config.master_dtype, trainer.accelerator.device)
    policy = models.load_model(config, dtype=master, trainable=True, head=trainer.head, empty=trainer.is_filled)
    if trainer.head == "reward":
        models.set_padding(policy, trainer.tokenizer)
    model = saving.add_lora(policy, config) if config.use_peft else policy
    if trainer.head == "value":
        add_value_head(model)
    return model


def _load_frozen_models(settings: Settings, trainer: BasicTrainer) -> None:
    """Load the frozen models that the method asks: they read the policy's token ids, so they must share its
    tokenizer.
    """
    for name, (folder, head) in trainer.frozen_model_folders().items():
        if head == "reward":
            check_reward_model(folder, f"loss.{name}")
        device = trainer.accelerator.device
        if head == "lm":
            dtype = models.teacher_dtype(settings.model, device)
        else:
            dtype = models.resolve_dtype(settings.model.reference_dtype, device)
        config = replace(
            settings.model,
            name_or_path=folder,
            tokenizer_name_or_path=None,
            load_from=None,
            from_checkpoint=None,
            build=None,
        )
        tokenizer = models.load_tokenizer(config)
        if tokenizer.get_vocab() != trainer.tokenizer.get_vocab():
            raise ValueError(
                f"{name} {folder} has another tokenizer than the policy ({len(tokenizer)} and {len(trainer.tokenizer)} "
                "tokens, or other "
                "words): it would read other text. Use a model of the same family"
            )
        model = models.load_model(
            config, source=folder, dtype=dtype, trainable=False, head=head, empty=trainer.is_filled
        )
        trainer.frozen_models[name] = trainer.place_reference(model)


def _reference(
    settings: Settings, trainer: BasicTrainer, items: list[Item], test_items: list[Item]
) -> tuple[torch.nn.Module | None, list[Item], list[Item]]:
    """Return the frozen reference, or None and items that carry its log-probabilities (or LoRA, whose base it is)."""
    run, config = settings.run, settings.model
    cached = run.cache_reference_logprobs or run.load_reference_logprobs
    if config.use_peft and not cached:
        return None, items, test_items
    dtype = models.reference_path(config, trainer.accelerator.device).weights

    def load() -> torch.nn.Module:
        return models.load_model(config, dtype=dtype, trainable=False, empty=trainer.is_filled)

    if not cached:
        return load(), items, test_items
    # The starting policy is the reference: a checkpoint of an interrupted run moves the policy only.
    folder = reference.cached(trainer, items + test_items, load)
    trainer.accelerator.print(f"reference log-probabilities: {folder}")
    return None, reference.attach(trainer, items, folder), reference.attach(trainer, test_items, folder)
