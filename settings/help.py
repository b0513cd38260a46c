"""The text of `launch.py --help`, and of `launch.py help=loss/adpa`: a group's choices, or the keys of one of them.

A method says its formula, needs and source itself; they are read from its source, so nothing here imports torch.
"""

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from settings.methods import config_fields, find_method, needs_of
from settings.paths import CONFIG, ROOT
from settings.source import class_value
from settings.tasks import TASKS
from settings.typed import nearest

GROUPS = ("loss", "model", "datasets", "pipeline")
MEANT = {
    "loss": "what is minimized: sft, dpo, dckd, adpa and others",
    "model": "architecture, lengths, batch size, precision, LoRA",
    "datasets": "rows: a file of yours (local) or a data set of the hub; datasets=[a,b] mixes them",
    "pipeline": "a chain of stages, each a task of its own",
    "section": "keys of one task, as SECTION.KEY=VALUE: cache, generation, evaluation and others",
}
DATA = {
    "responses": "rows with responses",
    "pairs": "rows with chosen and rejected",
    "feedback": "pairs, or responses with a label",
    "prompts": "prompts",
    "rewards": "responses with a reward",
}
SCORED = "prompts and a verifier or reward model, or responses with a reward"  # where a method's keys have a verifier
REFERENCE = {"logps": "reference log-probabilities (live or cached)", "distributions": "a live reference model"}
TEACHER = {
    "logprob": "a teacher cache (task=cache)",
    "advantage": "generations (task=generate) and an advantage cache on them (task=cache cache.reference=FOLDER)",
    "token_logp": "caches of log-probabilities of the response tokens (task=cache cache.quantity=token_logp)",
    "value": "a cache of the teacher's values (task=cache cache.quantity=value), or of its log-probabilities",
    "live": "live teachers",
}
FILES = {"responses": "sft.jsonl", "prompts": "prompts.jsonl", "rewards": "rewards.jsonl"}  # else pairs.jsonl
ROWS = "model=tiny 'datasets=[local]' datasets.local.train="
FINISHED = {  # keys of models that a method asks -> the finished run that an example takes for it
    "teacher": "outputs/teacher/FINAL",
    "reference_teacher": "outputs/teacher_sft/FINAL",
    "reverse_teacher": "outputs/reverse/FINAL",
    "teacher_cache": "outputs/teacher/FINAL",
    "positive_cache": "outputs/teacher_dpo/FINAL",
    "negative_cache": "outputs/reverse/FINAL",
}
EXAMPLES = (
    ("pipeline=quickstart", "the whole chain on a small world"),
    ("loss=sft model=tiny datasets=[local] datasets.local.train=sft.jsonl exp_name=sft lr=1e-3", "SFT on a file"),
    ("loss=dpo model=tiny datasets=[local] datasets.local.train=pairs.jsonl exp_name=dpo lr=1e-4", "DPO on a file"),
    (
        "task=cache model=tiny datasets=[local] datasets.local.train=pairs.jsonl exp_name=cache "
        "model.load_from=outputs/dpo/FINAL",
        "what a teacher thinks of the responses",
    ),
    (
        "loss=dckd model=tiny datasets=[local] datasets.local.train=pairs.jsonl exp_name=dckd lr=1e-4 "
        "loss.teacher_cache=outputs/cache/CACHE",
        "its student",
    ),
    (
        "pipeline=adpa_plus exp_name=mine dry_run=true pipeline.teacher=tiny pipeline.student=tiny "
        "pipeline.data.sft.datasets=[deita] pipeline.data.pairs.datasets=[dpo_mix]",
        "a plan, without running it",
    ),
)


def asked_for(arguments: list[str]) -> bool:
    """Tell whether the command line asks for help."""
    return any(word in ("--help", "-h") or word.startswith("help=") for word in arguments)


def help_text(arguments: list[str]) -> str:
    """Return the help of every help=NAME and, with --help, of every choice (`loss=dpo --help`); else the overview.

    Raises ValueError for a name that is not known.
    """
    names = [word.partition("=")[2] for word in arguments if word.startswith("help=")]
    if {"--help", "-h"} & set(arguments):
        names += [
            word.replace("=", "/", 1)
            for word in arguments
            if "=" in word
            and word.partition("=")[0] in GROUPS
            and (CONFIG / f"{word.replace('=', '/', 1)}.yaml").is_file()
        ]
    return "\n\n".join(map(help_of, names)) if names else overview()


def overview() -> str:
    """Return what launch.py does, six examples, the groups, and where keys are explained."""
    tried = [f"    # {why}\n    launch.py {line}" for line, why in EXAMPLES]
    groups = [f"  {group:<9} {meant}" for group, meant in MEANT.items()]
    return "\n".join(
        [
            "launch.py aligns a small language model with a bigger teacher's preferences: it composes a configuration,",
            "checks it, and runs one task (task=NAME) or a chain of them (pipeline=NAME) into outputs/EXP_NAME.",
            "",
            "Examples:",
            *tried,
            "",
            "Groups, chosen by GROUP=NAME (help=GROUP lists the names):",
            *groups,
            "",
            f"Tasks: {', '.join(TASKS)} (default: train).",
            "",
            "Keys: help=GROUP/NAME prints those of a choice with their comments (help=loss/adpa, help=section/cache,",
            "help=pipeline/quickstart), help=config those of a run: lr, n_epochs, ... The comments stand in config/.",
            "Any key can be set: KEY=VALUE, SECTION.KEY=VALUE; ++KEY=VALUE where a choice does not have it.",
            "--cfg job prints the composed configuration, --hydra-help the options of Hydra.",
        ]
    )


def help_of(name: str) -> str:
    """Return a group's choices (`loss`), or the keys of one (`loss/adpa`, `section/cache`, `config`)."""
    group, _, choice = name.strip("/").removesuffix(".yaml").partition("/")
    if group == "config" and not choice:
        return shown(CONFIG / "config.yaml")
    if group not in MEANT:
        known = ["config", *MEANT]
        return _unknown(name, known, [one for kind in MEANT for one in _paths(kind)])
    if not choice:
        return f"{group}: {MEANT[group]}\n\n" + "\n".join(
            f"  {one:<24} {first_comment(CONFIG / group / f'{one}.yaml')}".rstrip() for one in choices(group)
        )
    file = CONFIG / group / f"{choice}.yaml"
    if choice not in choices(group):
        return _unknown(name, _paths(group), [])
    method = [about_method(file)] if group == "loss" else []
    return "\n\n".join([*method, *(shown(part) for part in with_bases(file))])


def _paths(group: str) -> list[str]:
    return [f"{group}/{one}" for one in choices(group)]


def _unknown(name: str, listed: list[str], more: list[str]) -> str:
    """Raise ValueError with the nearest name and the list."""
    hint = nearest(name, [*listed, *more])
    said = hint if "Did you mean" in hint else ""
    raise ValueError(f"help={name} is not known.{said} There are: {', '.join(sorted(listed))}.")


def data_of(trainer: str) -> str:
    """Return what data a method asks for; of two that ask for prompts only one may need somebody who scores."""
    data = needs_of(trainer).data
    return SCORED if data == "prompts" and "verifier" in config_fields(trainer) else DATA[data]


def example_of(file: Path) -> list[str]:
    """Return commands to copy: what makes each cache that a loss needs, then the training."""
    values = values_of(file)
    trainer = str(values["trainer"])
    needs = needs_of(trainer)
    rows = ROWS + FILES.get(needs.data, "pairs.jsonl")
    before, given = [], []
    for key in (key for key, value in values.items() if value == "???"):
        if key == "generations":
            before.append(f"task=generate {rows} exp_name=said model.load_from=outputs/start/FINAL")
            given.append("loss.generations=outputs/said/generations.jsonl")
        elif key == "advantages":
            both = "model.load_from=outputs/teacher/FINAL cache.reference=outputs/teacher_sft/FINAL"
            own = "cache.generations=outputs/said/generations.jsonl"
            before.append(f"task=cache {rows} exp_name=asked {both} {own}")
            given.append("loss.advantages=outputs/asked/CACHE")
        elif key.endswith("_cache"):
            name = "asked" if key == "teacher_cache" else f"asked_{key.removesuffix('_cache')}"
            quantity = f" cache.quantity={needs.teacher}" if needs.teacher != "logprob" else ""
            before.append(f"task=cache {rows} exp_name={name} model.load_from={FINISHED[key]}{quantity}")
            given.append(f"loss.{key}=outputs/{name}/CACHE")
        else:
            given.append(f"loss.{key}={FINISHED[key]}")
    if needs.data == "prompts" and "verifier" in config_fields(trainer):
        given.append("loss.verifier=worlds.gsm8k:check")
    start = ["model.load_from=outputs/start/FINAL"] if needs.teacher == "advantage" else []
    return [*before, " ".join([f"loss={file.stem} {rows} exp_name=mine", *start, *given])]


def page_of(name: str) -> str:
    """Return the page of docs/ that a method has a section in, else one that speaks of it, else that of all losses."""
    pages = {one: one.read_text(encoding="utf-8") for one in sorted((ROOT / "docs").glob("losses_*.md"))}
    for pattern in (rf"^## .*(?<![\w-]){re.escape(name)}(?![\w-])", rf"`(loss=)?{re.escape(name)}`"):
        found = next((one for one, said in pages.items() if re.search(pattern, said, re.M)), None)
        if found:
            return f"docs/{found.name}"
    return "docs/losses.md"


def about_method(file: Path) -> str:
    """Return commands to copy, what a loss minimizes with its YAML's values, what it needs, and where it is from."""
    values = values_of(file)
    trainer = str(values["trainer"])
    needs, found = needs_of(trainer), find_method(trainer)
    asked = [data_of(trainer), REFERENCE.get(needs.reference, ""), TEACHER.get(needs.teacher, "")]
    if needs.reference_if and asked[1]:
        asked[1] += " if " + " and ".join(f"loss.{key}={value}" for key, value in needs.reference_if)
    texts = {}
    for name in ("formula", "source"):
        value = class_value(found, name)
        texts[name] = str(ast.literal_eval(value[1])) if value else "not said"
    formula = re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[1])), texts["formula"])
    lines = [f"loss={file.stem} ({trainer})", f"  formula  L = {formula}"]
    lines += [f"  needs    {'; '.join(filter(None, asked))}", f"  source   {texts['source']}"]
    tried = [f"  python launch.py {line}" for line in example_of(file)]
    return "\n".join([*tried, "", *lines, f"  page     {page_of(file.stem)}"])


def values_of(file: Path) -> dict[str, Any]:
    """Return the values of a choice, those of its `defaults` beneath."""
    values: dict[str, Any] = {}
    for part in reversed(with_bases(file)):
        values |= yaml.safe_load(part.read_text(encoding="utf-8")) or {}
    return values


def first_comment(file: Path) -> str:
    """Return the comment that a file begins with, up to 90 characters; else its `name`."""
    first = file.read_text(encoding="utf-8").split("\n", 1)[0]
    said = first.lstrip("# ").strip() if first.startswith("#") else ""
    return said if len(said) <= 90 else said[:87].rsplit(" ", 1)[0] + " ..."


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
    """Return the keys of a file as they stand there, one without a value as required; what only Hydra reads is left
    out.
    """
    blocks = file.read_text(encoding="utf-8").strip().split("\n\n")
    kept = [block for block in blocks if not block.startswith("hydra:")]
    kept[0] = "\n".join(line for line in kept[0].splitlines() if not line.startswith(("defaults:", "  - ")))
    keys = re.sub(r'"?\?\?\?"?(?: {7}(?= ))?', "(required)", "\n\n".join(kept))  # comments stay where they stood
    return f"---- config/{file.relative_to(CONFIG)}\n{keys}"
