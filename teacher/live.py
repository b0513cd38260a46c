"""Several live teachers of a method as one: a mixture of their probabilities, or of their log-probabilities."""

from collections.abc import Mapping
from typing import Any

import torch

from dataloader import Sequences
from functional import weighted_logps
from models import ResponseLogits
from settings.schema import one_of, require
from teacher.mixture import MIXTURES, named, shares
from teacher.precision import teacher_logits


def check_teachers(teacher: Any, weights: Any, mixture: str) -> None:
    """Refuse `loss.teacher`, `loss.teacher_weights` and `loss.mixture` that do not fit each other."""
    one_of("loss.mixture", mixture, MIXTURES)
    folders = named(teacher)
    require(
        bool(folders) and all(isinstance(folder, str) and folder for folder in folders.values()),
        f"loss.teacher={teacher} must be a model folder, a list or a mapping of them",
    )
    require(
        weights is None or len(folders) > 1,
        f"loss.teacher_weights={weights} mixes several teachers: give loss.teacher as a list or a mapping",
    )
    shares(list(folders), weights, "loss.teacher")


def teacher_folders(teacher: Any) -> dict[str, tuple[str, str]]:
    """Return the frozen models of a method: `teacher`, or teacher_NAME of several."""
    folders = named(teacher)
    return {f"teacher_{name}" if name else "teacher": (folder, "lm") for name, folder in folders.items()}


def said(teacher: Any, weights: Any, mixture: str) -> str:
    """Return what a method's objective adds where it has several teachers."""
    found = shares(list(named(teacher)), weights, "loss.teacher")
    if len(found) == 1:
        return ""
    return f"; teacher: the mixture of {mixture} ({', '.join(f'{share:.3g} {name}' for name, share in found.items())})"


@torch.no_grad()
def mixed_logits(
    models: Mapping[str, Any], batch: Sequences, vocab_size: int, teacher: Any, weights: Any, mixture: str
) -> ResponseLogits:
    """Ask each teacher and return what predicts a batch's response tokens: one teacher's logits as they are."""
    found = shares(list(named(teacher)), weights, "loss.teacher")
    asked = [teacher_logits(models[name], batch, vocab_size) for name in teacher_folders(teacher)]
    if len(asked) == 1:
        return asked[0]
    logits = weighted_logps([one.logits for one in asked], list(found.values()), mixture == "log_probabilities")
    return asked[0]._replace(logits=logits)
