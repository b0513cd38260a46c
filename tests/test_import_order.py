"""The import order of the rooms, read from the source: one way, methods apart, the worlds alone."""

import ast
import graphlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# A room imports only rooms on an earlier line; its own modules import each other without a circle.
ORDER = (
    ("settings",),
    ("conversations", "assets", "pipeline"),
    ("templates",),
    ("tokens",),
    ("forward",),
    ("functional", "dataloader"),
    ("models",),
    ("engine", "generation"),
    ("teacher",),
    ("rewards", "estimate"),
    ("trainers",),
    ("evaluation",),
    ("report",),
    ("tasks",),
    ("launch",),
)
ROOMS = tuple(
    sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "benchmarks"))
)
WITHOUT_TORCH = {"torch", "transformers", "accelerate", "peft", "datasets", "vllm", "wandb"}
NOT_IN_A_METHOD = {"hydra", "omegaconf", "accelerate", "wandb", "launch", "pipeline", "tasks"}


def module_files() -> dict[str, Path]:
    """Return our modules (dotted name: file), scripts and tests left out."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for room in ROOMS:
        files |= {f"{room}.{path.stem}": path for path in (ROOT / room).glob("*.py") if path.stem != "__init__"}
    return files


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere in it; `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import in line {node.lineno}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = module_files()
IMPORTS = {name: imports_of(path) for name, path in FILES.items()}
OURS = {name: {other for other in found if other in FILES} for name, found in IMPORTS.items()}
LOSSES = sorted((ROOT / "config" / "loss").glob("*.yaml"))
METHODS = sorted(
    {yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer", "").rpartition(".")[0] for path in LOSSES} - {""}
)


def room_of(name: str) -> str:
    """Return the room of a module, or the module itself if it stands at the root."""
    return name.split(".")[0]


def rank(name: str) -> int:
    """Return the line of ORDER that a module stands on."""
    for number, rooms in enumerate(ORDER):
        if room_of(name) in rooms:
            return number
    raise AssertionError(f"{name} has no place in ORDER of {__file__}: put it where it belongs")


@pytest.mark.parametrize("name", sorted(name for name in FILES if room_of(name) != "worlds"))
def test_a_module_imports_only_rooms_that_come_before_its_own(name: str) -> None:
    for other in OURS[name]:
        if room_of(other) == room_of(name):
            continue
        if room_of(other) == "worlds":
            assert room_of(name) == "tasks", f"{name} imports {other}: only tasks may know a world"
        else:
            assert rank(other) < rank(name), f"{name} imports {other}, whose room comes later or stands beside its own"


def test_there_is_no_circle() -> None:
    tuple(graphlib.TopologicalSorter(OURS).static_order())


@pytest.mark.parametrize("name", ["forward.chunks", *sorted(n for n in FILES if room_of(n) in ("settings", "worlds"))])
def test_the_foundations_import_nothing_of_ours(name: str) -> None:
    assert {room_of(other) for other in OURS[name]} <= ({room_of(name)} if name != "forward.chunks" else set())


def test_the_maths_knows_of_nothing_but_chunks_of_logits() -> None:
    assert OURS["functional"] == {"forward.chunks"}


@pytest.mark.parametrize("name", sorted(n for n in FILES if room_of(n) in ("settings", "pipeline")))
def test_settings_and_pipeline_import_no_torch(name: str) -> None:
    assert not {room_of(other) for other in IMPORTS[name]} & WITHOUT_TORCH


def test_the_teacher_cache_knows_no_model() -> None:
    assert not {room_of(name) for name in IMPORTS["teacher.cache"]} & {"torch", "transformers"}


@pytest.mark.parametrize("name", sorted(n for n in FILES if room_of(n) == "pipeline"))
def test_the_pipeline_talks_to_launch_only_through_a_command_line(name: str) -> None:
    assert {room_of(other) for other in OURS[name]} <= {"settings", "pipeline"}


@pytest.mark.parametrize("name", sorted(n for n in FILES if room_of(n) == "tasks"))
def test_a_task_imports_no_other_task(name: str) -> None:
    assert not {other for other in OURS[name] if room_of(other) == "tasks"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_no_other_method_and_no_machinery(method: str) -> None:
    found = IMPORTS[method]
    assert not (found & set(METHODS)), f"{method} imports another method"
    assert not ({room_of(name) for name in found} & NOT_IN_A_METHOD)


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("trainers.") and name not in METHODS))
def test_what_methods_share_knows_no_method(name: str) -> None:
    assert not (OURS[name] & set(METHODS))
