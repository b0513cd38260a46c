"""The text of `launch.py --help`: the tasks, the choices of each group, and every key with its comment."""

import re
from pathlib import Path

from settings.paths import CONFIG
from settings.tasks import TASKS

GROUPS = ("loss", "model", "datasets", "pipeline")


def help_text(usage: str, arguments: list[str]) -> str:
    """Return the help; choices on the command line (`loss=dpo --help`) show the keys of those choices, too."""
    chosen = [_choice(argument) for argument in arguments]
    files = [CONFIG / "config.yaml", *sorted((CONFIG / "section").glob("*.yaml"))]
    files += [part for file in chosen if file for part in with_bases(file)]
    groups = [f"{group}=NAME: {', '.join(choices(group))}" for group in GROUPS]
    return "\n\n".join(
        [
            usage.strip(),
            f"task=NAME: {', '.join(TASKS)}",
            *groups,
            "Keys, as KEY=VALUE or SECTION.KEY=VALUE. `loss=NAME --help` adds those of a loss, `model=NAME --help` "
            "those of a\nmodel; --cfg job prints the composed config, --hydra-help the options of Hydra.",
            *(shown(file) for file in files),
        ]
    )


def choices(group: str) -> list[str]:
    """Return the choices of a group."""
    return sorted(file.stem for file in (CONFIG / group).glob("*.yaml"))


def with_bases(file: Path) -> list[Path]:
    """Return a choice's file and, after it, those whose keys it takes over by its `defaults`."""
    line = next((row for row in file.read_text(encoding="utf-8").splitlines() if row.startswith("defaults:")), "")
    names = re.findall(r"[\w/-]+(?=@_here_|,|\])", line.replace("_self_", ""))
    bases = [file.parent / f"{name}.yaml" for name in names]
    return [file, *(part for base in bases if base.is_file() for part in with_bases(base))]


def shown(file: Path) -> str:
    """Return the keys of a file as they stand there; what only Hydra reads is left out."""
    blocks = file.read_text(encoding="utf-8").strip().split("\n\n")
    kept = [block for block in blocks if not block.startswith("hydra:")]
    kept[0] = "\n".join(line for line in kept[0].splitlines() if not line.startswith(("defaults:", "  - ")))
    return f"---- config/{file.relative_to(CONFIG)}\n" + "\n\n".join(kept)


def _choice(argument: str) -> Path | None:
    group, _, name = argument.partition("=")
    file = CONFIG / group / f"{name}.yaml"
    return file if group in GROUPS and file.is_file() else None
