"""The import order of the repository, read from the source: one way, methods apart, the world alone."""

import ast
import graphlib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# A module imports only what stands on an earlier line (or, in a package, its neighbours without a circle).
# fmt: off
ORDER = (
    ("typed_config",),
    ("sections",),
    (
        "functional", "schema", "teacher_cache", "intervals", "conversations", "smollm2", "report_charts", "digests", "calculator", "sweeps",
        "estimate", "resources", "model_card",
    ),
    ("dataloader", "plan", "report", "checkers", "calculator_generation"),
    ("models", "pipeline", "report_tables"),
    ("saving", "value_head", "generation"),
    ("model_shape",),
    ("trainers", "judge"),
    ("lengths",),
    ("tasks",),
    ("launch",),
)
# fmt: on
ALONE = (  # these import nothing of ours
    "calculator", "estimate", "resources", "functional", "typed_config", "teacher_cache", "intervals", "smollm2", "worlds", "model_card",
)  # fmt: skip
PACKAGES = ("generation", "trainers", "tasks", "worlds")
NOT_IN_A_METHOD = {"hydra", "omegaconf", "accelerate", "wandb", "launch", "pipeline", "tasks"}


def module_files() -> dict[str, Path]:
    """Return our modules (dotted name: file), the scripts and tests left out."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        files |= {f"{package}.{path.stem}": path for path in (ROOT / package).glob("*.py") if path.stem != "__init__"}
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
METHODS = sorted({yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer", "").rpartition(".")[0] for path in LOSSES} - {""})


def rank(name: str) -> int:
    """Return the line of ORDER that a module stands on."""
    head = name.split(".")[0]
    for number, names in enumerate(ORDER):
        if head in names:
            return number
    raise AssertionError(f"{name} has no place in ORDER of {__file__}: put it where it belongs")


@pytest.mark.parametrize("name", sorted(name for name in FILES if not name.startswith("worlds.")))
def test_a_module_imports_only_what_comes_before_it(name: str) -> None:
    for other in OURS[name]:
        if other.startswith("worlds."):
            assert name.startswith("tasks."), f"{name} imports {other}: only tasks may know a world"
        elif name.split(".")[0] != other.split(".")[0]:
            assert rank(other) < rank(name), f"{name} imports {other}, which comes later or stands beside it"


def test_there_is_no_circle() -> None:
    tuple(graphlib.TopologicalSorter(OURS).static_order())


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.split(".")[0] in ALONE))
def test_the_foundations_import_nothing_of_ours(name: str) -> None:
    package = name.split(".")[0]
    assert not {other for other in OURS[name] if package not in PACKAGES or other.split(".")[0] != package}


def test_the_teacher_cache_knows_no_model() -> None:
    assert not {name.split(".")[0] for name in IMPORTS["teacher_cache"]} & {"torch", "transformers"}


def test_the_pipeline_talks_to_launch_only_through_a_command_line() -> None:
    assert OURS["pipeline"] | OURS["plan"] <= {"schema", "plan", "digests"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_no_other_method_and_no_machinery(method: str) -> None:
    found = IMPORTS[method]
    assert not (found & set(METHODS)), f"{method} imports another method"
    assert not ({name.split(".")[0] for name in found} & NOT_IN_A_METHOD)


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("trainers.") and name not in METHODS))
def test_what_methods_share_knows_no_method(name: str) -> None:
    assert not (OURS[name] & set(METHODS))
