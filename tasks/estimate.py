"""task=estimate: what a run would take, without loading weights; beside a finished run, what it did take.

Also the table below the plan that `pipeline=NAME dry_run=true` prints. The arithmetic is in estimate/arithmetic.py.
"""

import glob
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from engine import environment
from estimate import arithmetic
from estimate import lengths as counting
from estimate.arithmetic import Batch, Memory, Model, Setup, Work
from estimate.live import REWARD_MODEL, entry_bytes, folders_of, live_flops, live_of, with_entries, with_live
from estimate.shape import shape_of
from estimate.tables import comparison, cost_table, single, table
from estimate.text_lengths import SAID
from pipeline.plan import Stage
from settings.artifacts import write_json
from settings.methods import needs_under
from settings.needs import Needs
from settings.paths import found as find
from settings.schema import ModelConfig, Settings, settings_from, typed
from settings.tasks import ESTIMATED
from teacher.quantities import quantity_of

DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")  # files of the drivers of GPUs
OPTIMIZER_STATES = {"AdamW": 2, "Adam": 2, "RMSprop": 1, "SGD": 0}


def run(settings: Settings) -> None:
    """Estimate, print a table and write estimate.json into the run's folder."""
    if settings.estimate.run:
        found = compared(settings)
        print(comparison(found))
    else:
        if settings.estimate.measure:
            settings = replace(
                settings, estimate=replace(settings.estimate, tokens_per_second=measured_speed(settings))
            )
        found = estimated(settings, settings.estimate.of)
        print(single(found))
    path = settings.run.run_dir / "estimate.json"
    write_json(path, found)


def compared(settings: Settings) -> dict[str, Any]:
    """Estimate a finished run from its own configuration and lay what it really took beside it."""
    return compared_run(Path(settings.estimate.run or "").expanduser(), {**settings.raw["estimate"], "rows": None})


def compared_run(folder: Path, section: dict[str, Any]) -> dict[str, Any]:
    """Estimate the training run in a folder as it was laid out; `section` is the estimate section that asks."""
    for name in ("config.yaml", "resources.json"):
        if not (folder / name).is_file():
            raise ValueError(f"estimate.run={folder} has no {name}: give the folder of a finished task=train")
    raw = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(raw, dict)
    actual = json.loads((folder / "resources.json").read_text(encoding="utf-8"))
    plain = {str(key): value for key, value in raw.items()}
    layout = {"devices": actual["devices"], "accelerator": actual["device"]}
    layout["strategy"] = "fsdp" if actual["strategy"] in ("fsdp", "deepspeed") else actual["strategy"]
    plain["estimate"] = {**section, **layout, "run": None}
    return {"predicted": estimated(settings_from(plain), "train"), "actual": actual, "run": str(folder)}


# ---- one run


def layout_of(settings: Settings) -> tuple[str, int]:
    """Return strategy and number of devices."""
    devices = settings.estimate.devices or 1
    asked = settings.estimate.strategy
    if asked == "auto" and settings.run.strategy in ("none", "ddp", "fsdp"):
        asked = settings.run.strategy
    if devices == 1:
        return "none", 1
    return ("fsdp" if asked in ("auto", "none") else asked), devices


def is_gpu(settings: Settings) -> bool:
    """Tell whether a GPU is planned for; torch is asked only where a driver shows that there may be one."""
    wanted = settings.estimate.accelerator
    if wanted != "auto":
        return wanted == "gpu"
    if not any(found for pattern in DEVICES for found in glob.glob(pattern)):
        return False
    if settings.estimate.lengths == "text":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
        return not hidden and environment.cuda_of_torch() is not None
    import torch

    return torch.cuda.is_available()


def width_of(name: str, settings: Settings) -> int:
    """Return the bytes of a number of the precision called `name` on the device that is planned for."""
    return {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2 if is_gpu(settings) else 4}[name]


def setup_of(settings: Settings, needs: Needs) -> Setup:
    """Return how training would be laid out."""
    run, config = settings.run, settings.model
    strategy, devices = layout_of(settings)
    live = bool(needs.reference) and not (run.cache_reference_logprobs or run.load_reference_logprobs)
    return Setup(
        strategy,
        devices,
        config.gradient_accumulation_steps,
        master=4 if config.master_dtype == "auto" else width_of(config.master_dtype, settings),
        compute=width_of(config.policy_dtype, settings),
        reference=width_of(config.reference_dtype, settings) if live and not config.use_peft else 0,
        live=live,
        states=OPTIMIZER_STATES[run.optimizer],
        checkpointing=config.activation_checkpointing,
        gpu=is_gpu(settings),
    )


def check_batch(settings: Settings, devices: int) -> None:
    """Refuse a batch that the trainer would refuse, with what would work."""
    config = settings.model
    if config.batch_size % (devices * config.gradient_accumulation_steps):
        unit = devices * config.gradient_accumulation_steps
        raise ValueError(
            f"model.batch_size={config.batch_size} (global) is not divisible by {devices} devices x "
            "model.gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps}; {math.ceil(config.batch_size / unit) * unit} would work"
        )


def estimated(settings: Settings, task: str, made: Mapping[str, ModelConfig] | None = None) -> dict[str, Any]:
    """Return the estimate of one task of a run as plain numbers; ValueError if its model has no readable
    configuration. made: the models, by folder, that other stages will have written by then.
    """
    model = shape_of(settings.model, settings.estimate.lengths != "text")
    if task == "train":
        return training(settings, model, made or {})
    return {"cache": scoring, "generate": generation}[task](settings, model)


def report(
    settings: Settings,
    task: str,
    model: Model,
    memory: Memory,
    devices: int,
    strategy: str,
    lengths: counting.Lengths | None,
    total: Work | None,
    flops: arithmetic.Flops | None,
    disk: int | None = None,
) -> dict[str, Any]:
    """Return the metrics that every task has, as they are written to estimate.json."""
    config, speed = settings.estimate, None
    if config.flops_per_second_per_device:
        speed = devices * config.flops_per_second_per_device * config.utilization
    process = {} if is_gpu(settings) else arithmetic.process_bytes(memory)
    hours = arithmetic.hours_of(flops.total, total.tokens, config.tokens_per_second, speed) if flops and total else None
    return {
        "task": task,
        "loss": settings.raw["loss"]["name"] if task == "train" else None,
        "strategy": strategy,
        "devices": devices,
        "parameters": model.parameters,
        "embedding": model.embedding,
        "trainable": model.trainable if task == "train" else 0,
        "tokens": None if total is None else round(total.tokens),
        "response_tokens": None if total is None else round(total.responses),
        "sequences": None if total is None else round(total.sequences),
        "lengths": "unknown: set n_examples, n_steps or estimate.tokens" if lengths is None else lengths.source,
        "flops": None if flops is None else {**flops._asdict(), "total": flops.total},
        "flops_per_token": None if flops is None or not total else flops.total / max(1.0, total.tokens),
        "memory": memory.terms,
        "phases": memory.phases,
        "peak_bytes": memory.peak,
        "peak_phase": memory.phase,
        "process": process,
        "device_bytes": memory.peak + sum(process.values()),
        "device_memory_gb": config.device_memory_gb,
        "disk_bytes": disk,
        "tokens_per_second": config.tokens_per_second,
        "hours": hours,
    }


def training(settings: Settings, model: Model, made: Mapping[str, ModelConfig]) -> dict[str, Any]:
    """Estimate task=train."""
    run, config, needs = settings.run, settings.model, needs_under(settings.raw["loss"])
    setup = setup_of(settings, needs)
    check_batch(settings, setup.devices)
    lengths = counting.training_lengths(settings, needs)
    slots = counting.slots_of(needs)
    batch, evaluating = batch_of(settings, lengths, setup.devices, slots), evaluation_batch(settings, needs)
    live = live_of(settings.raw["loss"], needs, config, made, settings.estimate.lengths != "text")
    memory = arithmetic.training_memory(model, batch, setup, evaluating)
    memory = with_live(memory, live, (batch, evaluating), setup, needs, width_of(config.reference_dtype, settings))
    memory = with_entries(memory, entry_bytes(settings.raw["loss"], needs, batch, settings.cache.top_k))
    total = flops = None
    if lengths is not None:
        total = lengths.work.times(passes_of(settings, lengths.number))
        # Scored once into a cache, or in every pass.
        scored = (
            (total if setup.live else lengths.work) if needs.reference and not run.load_reference_logprobs else None
        )
        flops = arithmetic.training_flops(model, total, scored, config.activation_checkpointing)
        flops = flops._replace(frozen=live_flops(live, total))
    found = report(settings, "train", model, memory, setup.devices, setup.strategy, lengths, total, flops)
    return {**found, "frozen_models": {one.key: one.parameters for one in live}}


def passes_of(settings: Settings, number: int) -> float:
    """Return how often the training data is gone through; the last step of an epoch may be a smaller one."""
    run, size = settings.run, settings.model.batch_size
    if not run.n_steps or not number:
        return run.n_epochs
    epochs, steps = divmod(run.n_steps, math.ceil(number / size))
    return epochs + min(1.0, steps * size / number)


def batch_of(settings: Settings, lengths: counting.Lengths | None, devices: int, slots: int) -> Batch:
    """Return a device's largest micro-batch; full-length rows where nothing is known of the data."""
    if lengths is None:
        lengths = counting.unknown(settings)
    return counting.largest_batch(settings, lengths, devices, slots)


def evaluation_batch(settings: Settings, needs: Needs) -> Batch | None:
    """Return the largest batch of the evaluation during training; None without held-out data."""
    config = settings.model
    if not any(dataset.test for dataset in settings.datasets.values()):
        return None
    lengths = counting.training_lengths(
        replace(settings, estimate=replace(settings.estimate, tokens=None)), needs, "test"
    )
    if lengths is not None and lengths.measured:
        return counting.chunked_batch(lengths, config.eval_batch_size, counting.packing_of(settings))
    rows = config.eval_batch_size * counting.slots_of(needs)
    return counting.full_batch(settings, lengths or counting.unknown(settings), rows)


def scoring(settings: Settings, model: Model) -> dict[str, Any]:
    """Estimate task=cache: forward passes of one teacher or two, each process with whole models or, under FSDP, a part
    of them, and the folder on disk.
    """
    config = settings.cache
    _, devices = layout_of(settings)
    lengths = counting.cache_lengths(settings)
    batch = None
    if lengths is not None and lengths.measured:
        batch = counting.chunked_batch(lengths, config.batch_size)
    if batch is None:
        known = lengths or counting.unknown(settings)
        batch = counting.full_batch(settings, known, config.batch_size)
    quantity = quantity_of(config)
    teachers = 0 if config.backend == "server" else quantity.num_models  # a server's memory and work are not ours
    width = width_of(settings.model.reference_dtype, settings)
    spread = devices > 1 and config.backend == "hf" and "fsdp" in (settings.estimate.strategy, settings.run.strategy)
    shards = devices if spread else 1
    memory = arithmetic.scoring_memory(model, batch, width, teachers, shards, is_gpu(settings))
    flops = disk = None
    if lengths is not None:
        flops = arithmetic.Flops(teachers * arithmetic.forward_flops(model, lengths.work))
        disk = arithmetic.cache_bytes(quantity, config.top_k, model.vocab, lengths.work, config.codec)
    work = None if lengths is None else lengths.work
    strategy = "fsdp" if spread else whole(devices)
    return report(settings, "cache", model, memory, devices, strategy, lengths, work, flops, disk)


def generation(settings: Settings, model: Model) -> dict[str, Any]:
    """Estimate task=generate: prompts read once, and every response as long as generation.max_new_tokens allows."""
    config = settings.generation
    _, devices = layout_of(settings)
    lengths = counting.prompt_lengths(settings)
    new = config.max_new_tokens
    longest = max((n for item in lengths.items for n, _, _ in item), default=0) if lengths else 0
    if lengths is None or not lengths.measured:
        longest = settings.model.max_prompt_length
    rows = config.batch_size * config.n
    memory = arithmetic.generation_memory(model, rows, longest + new, width_of(settings.model.policy_dtype, settings))
    total = flops = None
    if lengths is not None:
        prompts = lengths.work
        mean = prompts.tokens / max(1.0, prompts.sequences)
        responses = prompts.sequences * config.n
        total = Work(responses, responses * (mean + new), responses * (mean + new) ** 2, responses * new)
        flops = arithmetic.Flops(arithmetic.forward_flops(model, total))
    return report(settings, "generate", model, memory, devices, whole(devices), lengths, total, flops)


def whole(devices: int) -> str:
    """Return the strategy of tasks that do not shard: every process holds the whole model."""
    return "none" if devices == 1 else "whole model each"


# ---- speed


def measured_speed(settings: Settings) -> float:
    """Time the real model on its largest micro-batch; return tokens a second of all devices, as if they did not
    wait.
    """
    needs = needs_under(settings.raw["loss"])
    from estimate.speed import tokens_per_second

    setup = setup_of(settings, needs)
    slots = counting.slots_of(needs)
    batch = batch_of(settings, counting.training_lengths(settings, needs), setup.devices, slots)
    asked = [folder for key, folder in folders_of(settings.raw["loss"], needs).items() if key != REWARD_MODEL]
    return setup.devices * tokens_per_second(settings, batch.rows, batch.length, batch.responses, setup.live, asked)


# ---- a pipeline


def launched(stage: Stage) -> dict[str, Any]:
    """Return the layout that a stage's accelerate configuration starts; ZeRO-3 shards as full FSDP does."""
    words = stage.command
    if "--config_file" not in words:
        return {}
    named = words[words.index("--config_file") + 1]
    found = yaml.safe_load((find(named) or Path(named)).read_text(encoding="utf-8"))
    strategies = {"FSDP": "fsdp", "DEEPSPEED": "fsdp", "NO": "none"}
    return {"devices": found["num_processes"], "strategy": strategies.get(found["distributed_type"], "ddp")}


def of_stage(
    stage: Stage, section: dict[str, Any], made: Mapping[str, ModelConfig] | None = None
) -> dict[str, Any] | str:
    """Estimate a stage, or say why not; `section` is the estimate section of the pipeline's own command."""
    task = stage.config["task"]
    if task not in ESTIMATED:
        return f"task={task}"
    own = launched(stage) if section["devices"] is None else {}
    if section["lengths"] == "auto":
        own["lengths"] = "text"
    try:
        return estimated(settings_from({**stage.config, "estimate": {**section, **own}}), task, made)
    except ValueError as error:
        return str(error).splitlines()[0].rstrip(".")


def costs(stages: list[Stage], section: dict[str, Any]) -> str:
    """Return a table of what the training stages of a finished pipeline were predicted to take and what they took."""
    rows: list[tuple[str, dict[str, Any] | str]] = []
    for stage in [stage for stage in stages if (stage.folder / "resources.json").is_file()]:
        try:
            rows.append((stage.label, compared_run(stage.folder, section)))
        except ValueError as error:  # the run stands, whatever an estimate says
            rows.append((stage.label, str(error).splitlines()[0]))
    return cost_table(rows)


def print_plan(stages: list[Stage], section: dict[str, Any]) -> None:
    """Print the table of a pipeline's stages, of its first seed."""
    first = [stage for stage in stages if stage.seed == stages[0].seed]
    made = made_by(first)
    rows = [(stage.name, of_stage(stage, section, made)) for stage in first]
    print("\n" + table(rows))
    if any(SAID in found["lengths"] for _, found in rows if isinstance(found, dict)):
        print(f"tokens {SAID}, without the chat template; estimate.lengths=tokens counts them as training does")


def made_by(stages: list[Stage]) -> dict[str, ModelConfig]:
    """Return the models that training stages write, by their folder: teachers of stages that come after them."""
    return {
        str(stage.folder / "FINAL"): typed(stage.config["model"], ModelConfig)
        for stage in stages
        if stage.config["task"] == "train"
    }
