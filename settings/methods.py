"""What a method says of itself, read from its source: `loss.trainer` names its class, by any path that can be imported.

A class of trainers/ and one of a user's own package are found alike. Reading takes
milliseconds; importing one (method_class) loads torch.
"""

import ast
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from settings.paths import ROOT
from settings.source import Found, class_value, field_types, find_class, module_file, read_module

EXAMPLE = "e.g. trainers.dpo.DPO, or mypackage.mymethod.Mine for a method of your own"


class Needs(NamedTuple):
    """What a method asks for."""

    # responses | pairs | feedback (pairs, or responses with a label) | prompts (or rewarded responses) | rewards
    data: str
    reference: str = ""  # "" | logps (of the response tokens; may be cached) | distributions (a live model)
    # "" | logprob | advantage | token_logp | value (the quantity of the teacher cache) | live (a model in memory)
    teacher: str = ""
    # (key, value) pairs of the loss section under which the reference is needed; none: always
    reference_if: tuple[tuple[str, str], ...] = ()

    def under(self, loss: Mapping[str, Any]) -> "Needs":
        """Return what is needed with these values of the loss section."""
        needed = all(loss.get(key) == value for key, value in self.reference_if)
        return self._replace(reference=self.reference if needed else "", reference_if=())


def find_method(trainer: str, root: Path = ROOT) -> Found:
    """Find the class that loss.trainer names; ValueError says which half is wrong."""
    module, _, name = trainer.rpartition(".")
    if not module or not all(part.isidentifier() for part in trainer.split(".")):
        raise ValueError(f"loss.trainer={trainer!r} must name a class by its import path, {EXAMPLE}")
    if module_file(module, root) is None:
        raise ValueError(
            f"loss.trainer={trainer}: there is no module {module!r}. It must lie in the repository, in the folder "
            "where you type the command, or on PYTHONPATH"
        )
    method = find_class(read_module(module, root), name, root)
    if method is None:
        known = [node.name for node in read_module(module, root).tree.body if isinstance(node, ast.ClassDef)]
        raise ValueError(
            f"loss.trainer={trainer}: {module} has no class {name!r}. It has: {', '.join(known) or 'none'}"
        )
    return method


def needs_of(trainer: str, root: Path = ROOT) -> Needs:
    """Return what a method needs; ValueError where it is not written as Needs(...) in the class or above it."""
    found = class_value(find_method(trainer, root), "needs", root)
    call = found[1] if found is not None else None
    if not isinstance(call, ast.Call):
        raise ValueError(f"loss.trainer={trainer} has no `needs = Needs(...)`, as the methods of trainers/ have")
    given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return Needs(*(ast.literal_eval(argument) for argument in call.args), **given)


def needs_under(loss: Mapping[str, Any], root: Path = ROOT) -> Needs:
    """Return what a method needs with the values of its loss section."""
    return needs_of(loss["trainer"], root).under(loss)


def head_of(trainer: str, root: Path = ROOT) -> str | None:
    """Return what the method's model ends in ("lm", "reward", "value"); None where it cannot be seen."""
    found = class_value(find_method(trainer, root), "head", root)
    return getattr(found[1], "value", None) if found is not None else None


def config_fields(trainer: str, root: Path = ROOT) -> dict[str, str]:
    """Return the keys of the method's loss section with their types as written; empty where they cannot be seen."""
    found = class_value(find_method(trainer, root), "Config", root)
    name = getattr(found[1], "id", "") if found is not None else ""
    config = find_class(found[0].module, name, root) if found is not None else None
    return field_types(config, root) if config is not None else {}


def method_class(trainer: str) -> Any:
    """Import the trainer class that loss.trainer names: one of trainers/, or of a package of the user's own."""
    find_method(trainer)
    module, _, name = trainer.rpartition(".")
    method = getattr(importlib.import_module(module), name)
    basic = importlib.import_module("trainers.basic").BasicTrainer
    if not (isinstance(method, type) and issubclass(method, basic)):
        raise ValueError(f"loss.trainer={trainer} is no subclass of trainers.basic.BasicTrainer, which runs the loop")
    return method
