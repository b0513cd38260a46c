"""The table of all losses in docs/losses.md, generated from the code: `python -m docs.losses_table` writes it.

Cost counts passes: every learned sequence 3 (forward, and a backward pass twice as dear), every scored one 1, by
watching the models while the loss is computed on six pairs; SFT on the chosen responses is 1.
"""

import re
import string
from pathlib import Path

import torch

from settings.help import data_of
from tests.golden.coverage import LOSS_CASES
from tests.support.bigram import items_of, loss_of, trainer_of
from trainers.basic import BasicTrainer

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- losses-table: written by python -m docs.losses_table -->", "<!-- /losses-table -->"
DATA = {"responses": "responses", "pairs": "pairs"}  # shorter here than in help=loss/NAME
REFERENCE = {"": "", "logps": "; reference log-probs (live or cached)", "distributions": "; a live reference"}
TEACHER = {
    "": "",
    "logprob": "; teacher cache",
    "advantage": "; generations and an advantage cache",
    "token_logp": "; caches of token log-probs",
    "value": "; a cache of the teacher's values, or of log-probabilities",
    "live": "; live teachers",
}


CORE = ("sft", "dpo", "dckd", "adpa")
REWARD_BASED = ("bradley-terry", "ppo", "grpo", "reward-weighted-distill")
OWN_TEACHER = ("opsd",)  # the reference is the teacher
GROUPS = ("Core: the stages of ADPA+", "Preference losses", "Distillation", "Reward-based")
KEYS = {"floor": "advantage_floor"}  # what a formula calls a key of the YAML that has another name there
HEAD = (
    "| loss | minimized | defaults | needs | source | cost | golden cases |",
    "|---|---|---|---|---|---|---|",
)


def passes(name: str) -> int:
    """Count the passes of one evaluation of the loss and its gradient on the six pairs."""
    trainer = trainer_of(name)
    items = items_of(trainer, name)
    counted = 0

    def watch(module: torch.nn.Module, arguments: tuple, keywords: dict, output: object) -> None:
        nonlocal counted
        counted += len(keywords["input_ids"]) * (3 if torch.is_grad_enabled() and module is trainer.policy else 1)

    for model in (trainer.policy, trainer.reference, *trainer.frozen_models.values()):
        model.register_forward_hook(watch, with_kwargs=True)
    loss_of(trainer, items)
    return counted


def group_of(name: str) -> str:
    """Return the group that a loss is listed in."""
    if name in CORE:
        return "Core: the stages of ADPA+"
    if name in REWARD_BASED:
        return "Reward-based"
    taught = type(trainer_of(name)).needs.teacher or name in OWN_TEACHER
    return "Distillation" if taught else "Preference losses"


def with_keys(trainer: BasicTrainer) -> tuple[str, str]:
    """Return what a method minimizes with the names of its keys where a run prints their values, and these values."""
    formula, config = type(trainer).formula, trainer.config
    names = [field for _, field, _, _ in string.Formatter().parse(formula) if field]
    values = {name: getattr(config, name) for name in names}
    plain, said = "L = " + formula.format(**values), trainer.objective()
    assert said.startswith(plain), f"{said} does not begin with the method's formula"
    more = re.sub(r"^ \+ [\d.]+ NLL", " + `nll_weight` NLL", said.removeprefix(plain))
    values |= {"nll_weight": config.nll_weight} if "`nll_weight`" in more else {}
    shown = formula.format(**{name: f"`{KEYS.get(name, name)}`" for name in names}) + more
    return shown, ", ".join(f"`{KEYS.get(name, name)}` {value}" for name, value in values.items())


def row(name: str, sft: int) -> str:
    """Return a loss's line."""
    trainer = trainer_of(name)
    method = type(trainer)
    teacher = "; two live teachers" if name in ("gopd", "aligndistil", "online-adpa") else TEACHER[method.needs.teacher]
    data = data_of(f"{method.__module__}.{method.__name__}")
    needs = DATA.get(method.needs.data, data) + REFERENCE[trainer.needs.reference] + teacher
    cases = ", ".join(f"`{case}`" for case in LOSS_CASES[name])
    formula, defaults = (part.replace("|", "\\|") for part in with_keys(trainer))
    return f"| `{name}` | {formula} | {defaults} | {needs} | {method.source} | {passes(name) / sft:.2f} | {cases} |"


def table() -> str:
    """Return the tables in Markdown, one a group."""
    names = sorted(path.stem for path in (ROOT / "config" / "loss").glob("*.yaml"))
    sft, found = passes("sft"), []
    for group in GROUPS:
        found += ["" if found else None, f"**{group}**", "", *HEAD]
        found += [row(name, sft) for name in names if group_of(name) == group]
    return "\n".join(line for line in found if line is not None)


def main() -> None:
    """Write the table between its marks in docs/losses.md."""
    page = ROOT / "docs" / "losses.md"
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
