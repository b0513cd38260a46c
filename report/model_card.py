"""The README.md of a trained folder: what was trained from what, on which data, how it ended, and how to do it again.

Pure: facts in, Markdown out. The front matter is what huggingface_hub.ModelCard reads; it names a base model and data
sets only where they are hub names, since a path of this machine means nothing there.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from settings.terminal import clean

_WORD = re.compile(r"[\w./=, -]+")  # nothing in it means anything in Markdown
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # owner/name, or a name alone


class Source(NamedTuple):
    """A data set: its name in the config, where each split comes from, and the digest of files on this machine."""

    name: str
    train: str | None
    test: str | None
    digests: dict[str, str]


class Facts(NamedTuple):
    """All that a card says. `base` is None for a model that was built from its configuration."""

    name: str
    loss: str
    objective: str
    base: str | None
    base_is_folder: bool
    base_digest: str
    head: str
    sources: list[Source]
    num_train: int
    num_test: int
    steps: int | None
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    command: str | None
    versions: Mapping[str, str]
    commit: str | None


def card(facts: Facts) -> str:
    """Return the model card as Markdown with YAML front matter."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {plain(facts.name)}\n\n" + "\n".join(
        [
            f"Trained with prefdistill, {code(f'loss={facts.loss}')}.\n",
            _objective(facts),
            _base(facts),
            _data(facts),
            _metrics(facts),
            _settings(facts),
            _repeat(facts),
        ]
    )


def plain(text: str) -> str:
    """Return a text as Markdown that shows it: no mark-up, link or line break of its own."""
    text = clean(text)
    return (
        re.sub(r"([\\`*_{}\[\]()<>#+!|~&$-])", r"\\\1", " ".join(text.split())) if not _WORD.fullmatch(text) else text
    )


def code(text: str) -> str:
    """Return a text as inline code, whatever backticks it holds."""
    text = clean(text)
    fence = "`" * (_longest(text) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}"


def block(language: str, text: str) -> str:
    """Return a text as a block of code that nothing in it ends."""
    text = clean(text)
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def front_matter(facts: Facts) -> dict[str, Any]:
    """Return what the hub reads."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if facts.head == "reward" else "text-generation",
        "tags": ["prefdistill", clean(facts.loss)],
    }
    if facts.base and not facts.base_is_folder and HUB_NAME.fullmatch(facts.base):
        front["base_model"] = facts.base
    splits = [split for source in facts.sources if not source.digests for split in (source.train, source.test) if split]
    names = sorted({name for split in splits if HUB_NAME.fullmatch(name := split.partition(":")[0])})
    return front | ({"datasets": names} if names else {})


def _objective(facts: Facts) -> str:
    return f"## Objective\n\n{block('text', facts.objective)}\n"


def _base(facts: Facts) -> str:
    start = code(facts.base) if facts.base else "new weights (`model.build`)"
    return f"## Started from\n\n{start}, digest `{facts.base_digest}` (weights and config.json).\n"


def _data(facts: Facts) -> str:
    steps = f", {facts.steps} optimizer steps" if facts.steps is not None else ""
    lines = [
        f"{facts.num_train:,} training rows, {facts.num_test:,} held-out rows, counted after dropping and "
        f"limits{steps}.\n"
    ]
    for source in facts.sources:
        for split, place in (("train", source.train), ("test", source.test)):
            if place:
                digest = f", sha256 `{source.digests[split][:16]}`" if split in source.digests else ""
                lines.append(f"- {plain(source.name)}, {split}: {code(place)}{digest}")
    return "## Data\n\n" + "\n".join(lines) + "\n"


def _metrics(facts: Facts) -> str:
    if not facts.metrics:
        return "## Last metrics\n\nNone were written.\n"
    rows = "\n".join(f"| {plain(name)} | {value:.6g} |" for name, value in sorted(facts.metrics.items()))
    return f"## Last metrics\n\n| metric | value |\n|---|---|\n{rows}\n"


def _settings(facts: Facts) -> str:
    text = yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True)
    return f"## Settings\n\n{block('yaml', text)}\n"


def _repeat(facts: Facts) -> str:
    commit = (
        f"Commit {code(facts.commit)}." if facts.commit else "The code was no git checkout: its commit is not known."
    )
    command = block("bash", facts.command) if facts.command else "The command was not stored."
    versions = ", ".join(plain(f"{name} {number}") for name, number in facts.versions.items()) or "not stored"
    return f"## To do it again\n\n{command}\n\n{commit} Versions: {versions}.\n"
