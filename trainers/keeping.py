"""What a run keeps: checkpoints, from which the next start goes on, and the learning rate that it settled on."""

from dataclasses import replace
from typing import Any

import torch

from engine import checkpoint
from engine.learning_rate import Rate, fitting, parameters_of, sentence
from engine.metrics import Window
from settings.artifacts import write_json


def save(trainer: Any, step: int) -> None:
    """Write checkpoint-STEP; all ranks call it."""
    trainer.check_norms()
    trainer.add_tally()
    sums = trainer.window.reduced(trainer.processes.reduce)
    if not trainer.processes.is_main:
        trainer.window = Window()  # rank 0 carries the window of all from here on
    else:
        trainer.window.sums = sums
    state = {
        "examples": trainer.examples_seen,
        "window": sums,
        "method": trainer.state,
        "data": trainer.digest_of_data,
        "total_steps": trainer.total_steps,
    }
    run = trainer.run_config
    if trainer.processes.is_main:
        checkpoint.open_folder(run.run_dir, step)
    trainer.processes.wait()
    trainer.placement.write(checkpoint.part(run.run_dir, step), moving_models(trainer))
    trainer.processes.wait()
    if trainer.processes.is_main:
        checkpoint.close_folder(run.run_dir, step, state, run.keep_last)
    if run.intermediate_checkpoints:
        trainer.save_model(f"step-{step}")
    trainer.processes.wait()


def moving_models(trainer: Any) -> dict[str, torch.nn.Module]:
    """Return the models beside the policy that training moves."""
    moves = trainer.run_config.sync_reference and trainer.reference is not None
    return {"reference": trainer.reference} if moves else {}


def resume(trainer: Any) -> int:
    """Read the newest whole checkpoint and return its step, 0 without one; ValueError if it is damaged or another
    run's.
    """
    folder = checkpoint.newest(trainer.run_config.run_dir)
    if folder is None:
        return 0
    state = checkpoint.state_of(folder)
    processes = trainer.processes
    damaged = trainer.gathered(checkpoint.damage(folder, state, processes.rank, processes.world_size))
    if damaged:
        raise ValueError(f"{damaged[0]}. {checkpoint.way_out(folder)}")
    for key, now in (("data", trainer.digest_of_data), ("total_steps", trainer.total_steps)):
        if state[key] != now:
            raise ValueError(
                f"{folder} was written with {key}={state[key]}, this run has {now}. Use the same data and "
                "schedule, another exp_name, or remove the folder"
            )
    trainer.placement.read(folder, moving_models(trainer))
    trainer.examples_seen, trainer.state = state["examples"], state["method"]
    if processes.is_main:
        trainer.window.sums = state["window"]
    processes.print(f"resumed from {folder}")
    return int(state["step"])


def settle_rate(trainer: Any, policy: Any) -> Rate:
    """Put a number in the place of lr=auto, in the trainer and in what is stored of the run; return what would fit."""
    run, settings = trainer.run_config, trainer.settings
    fits = fitting(trainer.kind, parameters_of(policy), trainer.model_config.use_peft)
    if run.lr == "auto":
        trainer.run_config = replace(run, lr=fits.lr)
        trainer.settings = replace(settings, run=trainer.run_config, raw={**settings.raw, "lr": fits.lr})
        trainer.processes.print(sentence(fits))
        if trainer.processes.is_main:
            write_json(run.run_dir / "learning_rate.json", fits._asdict())
    return fits
