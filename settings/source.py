"""Read Python modules without importing them: what they import, their VERSION, the fields of their classes.

Importing a method loads torch, which takes seconds. A digest, a plan and the refusal of a misspelt key need none of it.
"""

import ast
import hashlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from settings.paths import ROOT


class Module(NamedTuple):
    """A module, as its file is written."""

    name: str
    file: Path
    tree: ast.Module
    code: str  # digest of the file
    imports: tuple[str, ...]  # dotted names, wherever they stand; `from a import b` gives a and a.b
    versions: tuple[int, ...]  # VERSION numbers, at its top or in its classes

    @property
    def package(self) -> str:
        """Return the package that it lies in."""
        return self.name if self.file.name == "__init__.py" else self.name.rpartition(".")[0]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements and those inside them; expressions, nine tenths of a tree, are passed by."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, name, []))
        for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            yield from statements(part.body)


@cache
def _read(name: str, file: Path, size: int, modified: int) -> Module:
    source = file.read_bytes()
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from error
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    imports: dict[str, None] = {}
    versions = []
    for node in statements(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= dict.fromkeys(imported(node, package))
        elif (value := value_of(node, "VERSION")) is not None:
            versions.append(ast.literal_eval(value))
    return Module(name, file, tree, hashlib.sha256(source).hexdigest(), tuple(imports), tuple(versions))


def imported(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """Yield the dotted names of an import inside a package."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    parts = package.split(".")
    above = parts[: len(parts) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    yield base
    yield from (f"{base}.{alias.name}" for alias in node.names)


def value_of(node: ast.AST, name: str) -> ast.expr | None:
    """Return the expression that a statement assigns to a name; None if it assigns none."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    assigns = any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return node.value if assigns else None  # type: ignore[attr-defined]


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """Return the file of a module of the repository, of the folder where the command was typed, or of sys.path."""
    places: list[str] | None = [str(root), str(Path.cwd()), *(place for place in sys.path if place)]
    spec = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), places)
        if spec is None:
            return None
        places = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if places is None and end < len(parts):
            return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def read_module(name: str, root: Path = ROOT) -> Module:
    """Read a module; ValueError if there is none of this name."""
    file = module_file(name, root)
    if file is None:
        raise ValueError(f"there is no module {name!r}: it must lie in the repository, here, or on PYTHONPATH")
    return _current(name, file)


def _current(name: str, file: Path) -> Module:
    stat = file.stat()
    return _read(name, file, stat.st_size, stat.st_mtime_ns)


def closure(name: str, root: Path = ROOT) -> tuple[Module, ...]:
    """Return a module and all of the repository, or of its own package, that it imports, directly or through others.

    Libraries are left out: their versions stand in versions.json.
    """
    near = frozenset({name.split(".")[0], *_near_names(root)})
    found = _closure(name, root, Path.cwd(), near)
    if any(module is not _current(module.name, module.file) for module in found):  # a file was edited since
        _closure.cache_clear()
        found = _closure(name, root, Path.cwd(), near)
    return found


@cache
def _closure(name: str, root: Path, here: Path, near: frozenset[str]) -> tuple[Module, ...]:
    waiting, seen = [name], {name: read_module(name, root)}
    while waiting:
        for other in seen[waiting.pop()].imports:
            if other in seen or other.split(".")[0] not in near:
                continue
            file = module_file(other, root)
            if file is not None and "site-packages" not in file.parts:
                seen[other] = read_module(other, root)
                waiting.append(other)
    return tuple(seen[key] for key in sorted(seen))


def _near_names(root: Path) -> set[str]:
    """Return the names of modules and packages in the repository, here, and in the folders of PYTHONPATH."""
    named = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    places = [folder for folder in {root, Path.cwd(), *map(Path, named)} if folder.is_dir()]
    return {entry.removesuffix(".py") for folder in places for entry in os.listdir(folder)}


def in_repository(module: Module, root: Path = ROOT) -> bool:
    """Tell whether a module is one of the repository's."""
    return _within(module.file, root)


@cache  # a plan asks it of every module of every stage
def _within(file: Path, root: Path) -> bool:
    return file.resolve().is_relative_to(root.resolve())


# ---- classes


class Found(NamedTuple):
    """A class and the module that defines it."""

    module: Module
    node: ast.ClassDef


def find_class(module: Module, name: str, root: Path = ROOT) -> Found | None:
    """Find a class that a module defines or imports by `from ... import`; None if it cannot be seen."""
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Found(module, node)
    for statement in module.tree.body:
        if not isinstance(statement, ast.ImportFrom):
            continue
        for alias in statement.names:
            if (alias.asname or alias.name) == name:
                base = next(imported(statement, module.package))
                there = module_file(base, root)
                return find_class(read_module(base, root), alias.name, root) if there is not None else None
    return None


def ancestry(found: Found, root: Path = ROOT) -> Iterator[Found]:
    """Yield a class and those it inherits from, as far as they can be seen, the nearest first."""
    yield found
    for base in found.node.bases:
        parent = _named(found.module, base.value if isinstance(base, ast.Subscript) else base, root)
        if parent is not None:
            yield from ancestry(parent, root)


def _named(module: Module, expression: ast.expr, root: Path) -> Found | None:
    """Find the class that `Name`, or `module.Name`, means in a module."""
    if isinstance(expression, ast.Name):
        return find_class(module, expression.id, root)
    if not isinstance(expression, ast.Attribute):
        return None
    written = ast.unparse(expression.value)
    places = [name for name in module.imports if name == written or name.endswith(f".{written}")]
    there = next((name for name in places if module_file(name, root) is not None), None)
    return find_class(read_module(there, root), expression.attr, root) if there is not None else None


def class_value(found: Found, name: str, root: Path = ROOT) -> tuple[Found, ast.expr] | None:
    """Return the expression that a class, or the nearest it inherits from, gives to an attribute."""
    for one in ancestry(found, root):
        for node in one.node.body:
            if (value := value_of(node, name)) is not None:
                return one, value
    return None


def field_types(found: Found, root: Path = ROOT) -> dict[str, str]:
    """Return the fields of a dataclass with their types as they are written."""
    fields: dict[str, str] = {}
    for one in reversed(list(ancestry(found, root))):
        for node in one.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = ast.unparse(node.annotation)
    return {name: kind for name, kind in fields.items() if "ClassVar" not in kind}
