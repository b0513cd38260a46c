"""The one command: compose the Hydra config, type it, run one task or a whole pipeline.

python launch.py loss=dpo model=tiny datasets=[local] datasets.local.train=pairs.jsonl exp_name=x ++lr=5e-7
accelerate launch --config_file accelerate_config/fsdp_4gpu.yaml launch.py loss=adpa model=llama ...
python launch.py pipeline=quickstart
"""

import importlib
import importlib.util
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__" and importlib.util.find_spec("hydra") is None:
    sys.exit(
        "error: hydra is not installed for this Python: type .venv/bin/python launch.py, or . .venv/bin/activate first"
    )

# Hydra then raises instead of printing, and `main` below words the message; a user's own setting wins.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from engine import environment
from tokens.sources import check_source

environment.prepare(os.environ)  # before anything imports torch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from pipeline.run_folder import kept_alone, note_error, open_run_dir
from pipeline.sweeps import as_sweep, job_folder
from settings.acting import check_acting
from settings.artifacts import is_done, mark_done, write_text
from settings.help import GROUPS, asked_for, choices, help_text
from settings.methods import config_fields, method_class
from settings.needs import check_needs
from settings.paths import CONFIG
from settings.schema import Settings, require, settings_from, with_loss
from settings.secrets import check_no_secret, hidden, secrets_of
from settings.tasks import TASKS, Task, check_task, unread
from settings.terminal import clean
from settings.typed import check_keys, nearest

# Hydra's own options with a value all say config, info, cfg, package or rerun.
DASHED = re.compile(r"--(?!config|info|cfg|package|experimental)[\w.]+=")


def check_loss(section: dict[str, Any]) -> None:
    """Refuse a loss section without its inputs or with a wrong key; its method is read for that and not imported."""
    missing = [key for key, value in section.items() if value == "???"]
    require(not missing, f"loss={section['name']} needs loss.{missing[0] if missing else ''}=PATH on the command line")
    known = list(config_fields(section.get("trainer", "")))
    if known:
        check_keys([key for key in section if key not in ("name", "trainer")], known, "loss.")


def check_sources(settings: Settings) -> None:
    """Refuse a data file that is not there, before anything loads."""
    for name, entry in settings.datasets.items():
        for split in ("train", "test"):
            source = getattr(entry, split)
            if source:
                check_source(source, f"datasets.{name}.{split}")


def settings_of(raw: dict[str, Any]) -> Settings:
    """Type and check the resolved config for the task it asks for; what needs no torch comes first."""
    check_task(raw)
    settings = settings_from(raw)
    if "datasets" in TASKS[raw["task"]].sections:
        check_sources(settings)
    if raw["task"] == "cache":
        from teacher.quantities import quantity_of

        quantity_of(settings.cache)  # refuses what contradicts itself before anything is written
    if raw["task"] != "train":
        return settings
    check_loss(raw["loss"])
    method = method_class(raw["loss"].get("trainer", ""))
    settings = with_loss(settings, method.Config)
    check_acting(raw["loss"])
    check_needs(settings, method.needs.under(raw["loss"]), raw["loss"]["name"], method.head)
    return settings


def run_task(raw: dict[str, Any]) -> None:
    """Run one task into its folder; DONE is written last."""
    check_no_secret(raw, [], os.environ)
    settings = settings_of(raw)
    task = TASKS[settings.run.task]
    if raw.get("dry_run") and settings.run.task != "push":
        say_what_would_be_pushed(settings)
        return
    check_push(settings)
    with kept_alone(settings.run.run_dir) if task.has_folder else nullcontext():
        _run_in_folder(settings, task)


def _run_in_folder(settings: Settings, task: Task) -> None:
    if task.has_folder and not open_run_dir(settings):
        print(f"already done: {settings.run.run_dir} (to run it again, remove that folder)")
        hand_on(settings, settings.run.run_dir)
        return
    try:
        importlib.import_module(f"tasks.{settings.run.task}").run(settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_left(settings)) from None
    except Exception as error:
        if task.has_folder:
            note_error(settings.run.run_dir, error)
        raise
    if not task.is_done_once:
        if settings.run.task == "report":
            hand_on(settings, Path(settings.run.sweep or "").expanduser())
        return
    if os.environ.get("RANK", "0") == "0":
        mark_done(settings.run.run_dir)
        print(f"done: {settings.run.run_dir}", flush=True)
    hand_on(settings, settings.run.run_dir)


def check_push(settings: Settings) -> None:
    """Refuse, before anything runs, a push that cannot work."""
    if not settings.hub.push:
        return
    task = settings.run.task
    require(
        TASKS[task].is_done_once or task in ("report", "push"), f"task={task} makes nothing that hub.push could push"
    )
    from assets.hub import hub_reachable

    require(
        bool(settings.raw.get("dry_run")) or hub_reachable(),
        f"hub.push={settings.hub.push}: the hub cannot be reached from here. Leave it out, and push later: task=push "
        "hub.folder=FOLDER",
    )


def hand_on(settings: Settings, folder: Path) -> None:
    """Push what a finished run made to the hub, where hub.push says so."""
    if not settings.hub.push or os.environ.get("RANK", "0") != "0":
        return
    from report import publishing

    publishing.hand_on(folder, settings.hub, dry=False)


def say_what_would_be_pushed(settings: Settings) -> None:
    """Print what hub.push would upload of a finished run; ValueError for a dry run that has nothing to say."""
    require(
        bool(settings.hub.push),
        "dry_run=true prints the plan of a pipeline (pipeline=NAME) or what hub.push=OWNER/NAME would upload; what one "
        "run takes is said by task=estimate",
    )
    require(
        is_done(settings.run.run_dir),
        f"dry_run=true hub.push={settings.hub.push}: {settings.run.run_dir} is not finished: nothing is there yet",
    )
    from report import publishing

    publishing.hand_on(settings.run.run_dir, settings.hub, dry=True)


def what_is_left(settings: Settings) -> str:
    """Say what the same command does after an interruption."""
    if settings.run.task != "train":
        return "the same command goes on from what is kept"
    kept = [folder.name for folder in settings.run.run_dir.glob("checkpoint-*") if is_done(folder)]
    newest = max(kept, key=lambda name: int("0" + "".join(filter(str.isdigit, name))), default=None)
    if newest:
        return f"the same command goes on from {newest}"
    why = "save_every=0 keeps none" if not settings.run.save_every else f"save_every={settings.run.save_every}"
    return (
        f"there is no checkpoint yet ({why}): the same command begins anew; with e.g. save_every=50, which the same "
        "folder takes, it goes on"
    )


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def composed(config: DictConfig) -> None:
    """Take what Hydra composed; after this line no DictConfig exists."""
    guarded(lambda: run(config))


def run(config: DictConfig) -> None:
    """Hand the plain config to a pipeline or to one task."""
    raw = OmegaConf.to_container(config, resolve=True)
    assert isinstance(raw, dict)
    plain: dict[str, Any] = {str(k): v for k, v in raw.items()}
    plain["datasets"] = plain.get("datasets") or {}
    environment.check(os.environ, plain)
    check_no_secret(plain, sys.argv[1:], os.environ)
    varied = job_folder()
    if varied:
        plain["run_count"] = f"{plain['run_count']}/{varied}" if plain["run_count"] else varied
    if plain.get("pipeline"):
        require(
            not plain["hub"]["push"],
            "hub.push goes with one run; of a pipeline push what you choose once it is done: task=push "
            f"hub.folder={plain['cache_dir']}/{plain['pipeline']['name']}/STAGE hub.push={plain['hub']['push']}",
        )
        from pipeline.runner import run_pipeline

        fork = not environment.has_gpu(os.environ)  # CUDA does not survive a fork
        code = run_pipeline(plain, list(HydraConfig.get().overrides.task), show_costs, fork)
        if code:
            sys.exit(code)
        return
    plain.pop("pipeline", None)
    idle = unread([plain], HydraConfig.get().overrides.task) if plain["task"] in TASKS else []
    if idle and os.environ.get("RANK", "0") == "0":
        print(f"warning: task={plain['task']} does not read {', '.join(idle)}", flush=True)
    run_task(plain)


def show_costs(stages: list[Any], estimate: dict[str, Any], run_dir: Path | None) -> None:
    """Print what the stages of a plan would take, or write costs.md: what those of a finished pipeline took beside
    it.
    """
    from tasks.estimate import costs, print_plan

    if run_dir is None:
        print_plan(stages, estimate)
        return
    path = run_dir / "costs.md"
    write_text(path, costs(stages, estimate) + "\n")
    print(f"predicted and actual costs: {path}")


def explain(error: Exception) -> str:
    """Word a user's mistake in one message."""
    text = str(error).strip()
    cause = error.__cause__
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1} is not YAML: {error.problem}"
    if isinstance(error, OverrideParseException) and "=" not in str(error.override).strip("="):
        return f"{error.override!r}: write KEY=VALUE without blanks around the =; launch.py --help has examples"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: {text.splitlines()[0]}. A value with blanks, commas, brackets, = or quotes is quoted "
            f"for the program and for the shell: {_quoted(str(error.override))}"
        )
    choice = re.search(r"Could not (?:find|load) '(\w+)/([^']+)'", text)
    if choice and choice[1] in GROUPS:
        known = choices(choice[1])
        if choice[1] == "datasets" and Path(choice[2]).suffix:
            return f"{choice[2]} is no data set; for a file: datasets=[local] datasets.local.train={choice[2]}"
        hint = nearest(choice[2], known)
        listed = "" if "Known:" in hint else f" There are: {', '.join(sorted(known))}."
        return f"{choice[1]}={choice[2]} is not known.{hint}{listed}"
    unknown = re.search(r"Key '([\w.]+)' is not in struct", f"{text}\n{cause}")
    if unknown:
        full = re.search(r"full_key: ([\w.]+)", f"{text}\n{cause}")
        key = full.group(1) if full else unknown.group(1)
        section, dot, name = key.rpartition(".")
        known = known_keys(key)
        hint = _not_chosen(key) if name in known else nearest(name, known, section + dot)
        return f"unknown key {key!r}.{hint}"
    return text if not isinstance(error, OSError) else f"{error.strerror or text}: {error.filename or ''}".rstrip(": ")


def _not_chosen(key: str) -> str:
    """Say what a key needs that other choices of its group have."""
    group, _, rest = key.partition(".")
    if group == "datasets":
        name = rest.partition(".")[0] or "local"
        return f" Data sets are chosen first: datasets=[{name}] or datasets=[{name},OTHER], then their keys."
    return f" Another choice of {group}= has it, this one has not: launch.py help={group}/NAME lists its keys."


def _quoted(override: str) -> str:
    """Write an override so that neither the shell nor Hydra reads anything into its value."""
    key, _, value = override.partition("=")
    inner = value.strip("'\"").replace("\\", "\\\\").replace("'", "\\'")
    return shlex.quote(f"{key}='{inner}'")


def known_keys(key: str) -> list[str]:
    """List the keys beside `key`: of the run, of a section, or of the group that it belongs to."""
    section, _, below = key.rpartition(".")[0].partition(".")
    if not section:
        sections = [file.stem for file in (CONFIG / "section").glob("*.yaml")]
        return [*_keys_of(CONFIG / "config.yaml", ""), *sections, "loss", "model", "datasets", "pipeline"]
    files = [CONFIG / "section" / f"{section}.yaml", *sorted((CONFIG / section).rglob("*.yaml"))]
    return sorted({name for file in files if file.is_file() for name in _keys_of(file, below)})


def _keys_of(file: Path, below: str) -> list[str]:
    node = OmegaConf.load(file)
    node = OmegaConf.select(node, below) if below else node
    return [str(name) for name in node if name != "defaults"] if OmegaConf.is_dict(node) else []


def from_command_line() -> None:
    """Compose and run what was typed."""
    dashed = next((word for word in sys.argv[1:] if DASHED.match(word)), None)
    require(dashed is None, f"{dashed}: keys have no dashes here: {(dashed or '').lstrip('-')}")
    sys.argv[1:] = as_sweep(sys.argv[1:])
    composed()


def guarded(work: Callable[[], None]) -> None:
    """Do the work, and show a user's mistake as one message instead of a traceback (debug=true shows both)."""
    try:
        work()
    except KeyboardInterrupt as stopped:
        print(f"\ninterrupted; {str(stopped) or 'nothing had begun'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, HydraException, OmegaConfBaseException, YAMLError) as error:
        if "debug=true" in sys.argv or "++debug=true" in sys.argv:
            raise
        print(f"error: {clean(hidden(explain(error), secrets_of(os.environ)))}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # formulas and data have letters that a terminal may lack
    if asked_for(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that is left, or head
        guarded(lambda: print(help_text(sys.argv[1:])))
        sys.exit()
    sys.path.append(os.getcwd())  # a verifier or a method of one's own lies where the command is typed
    guarded(from_command_line)
