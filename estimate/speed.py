"""Tokens a second, measured: a few forward and backward passes of the real model on this machine."""

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

import models
from dataloader import Sequences
from engine import export
from functional import token_logps
from settings.schema import Settings
from teacher.precision import teacher_dtype, teacher_logits

TIMED = 3  # passes, after one that is not timed


def random_rows(rows: int, length: int, prompt: int, vocab: int, device: torch.device) -> Sequences:
    """Return rows of random ids, everything after `prompt` tokens supervised."""
    ids = torch.randint(0, vocab, (rows, length), device=device)
    response = torch.zeros(rows, length, dtype=torch.bool, device=device)
    response[:, prompt:] = True
    return Sequences(ids, torch.ones_like(response), response)


def tokens_per_second(
    settings: Settings, rows: int, length: int, responses: int, live_reference: bool, teachers: Sequence[str] = ()
) -> float:
    """Time passes over [rows, length] random tokens on one device; the optimizer's step is left out.

    A live reference is timed as one more forward pass of the same model, live teachers (their folders) as one of each.
    Loads the weights: the only part that does.
    """
    config = settings.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load_model(config, dtype=torch.float32, trainable=True).to(device)
    if config.use_peft:
        model = export.add_lora(model, config)
    dtype, narrow = models.resolve_dtype(config.policy_dtype, device), teacher_dtype(config, device)
    frozen = [models.load_model(config.of_folder(t), dtype=narrow, trainable=False).to(device) for t in teachers]
    prompt = max(1, length - max(1, responses // rows))
    sequences = random_rows(rows, length, prompt, model.config.vocab_size, device)

    def once() -> None:
        for teacher in frozen:
            teacher_logits(teacher, sequences, teacher.config.get_text_config().vocab_size)
        with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
            if live_reference:
                with torch.no_grad():
                    models.response_logits(model, sequences, model.config.vocab_size)
            out = models.response_logits(model, sequences, model.config.vocab_size)
        token_logps(out.logits, out.targets).mean().backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    once()
    started = time.perf_counter()
    for _ in range(TIMED):
        once()
    return TIMED * rows * length / (time.perf_counter() - started)
