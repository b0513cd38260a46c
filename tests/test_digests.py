"""What a stage's digest sees: edit code, data, a model or a key, and it moves; edit anything else, and it stays."""

import ast
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from pipeline import digests
from pipeline.digests import digest_of, loss_marks, marked
from settings import tasks
from settings.paths import CONFIG, ROOT
from settings.schema import DatasetConfig, RunConfig, Settings
from settings.source import closure
from settings.tasks import SHOWN, STAGES, TASKS
from tests.support.helpers import composed

STAGES_DIR = Path("/nowhere/stages")
LOSSES = sorted(path.stem for path in (CONFIG / "loss").glob("*.yaml"))


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return composed("loss=dpo", "model=tiny", "datasets=[local]")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository's modules."""
    root = tmp_path_factory.mktemp("copy") / "repository"
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if file.parent.name not in ("tests", "benchmarks", "docs", "scripts"):
            target = root / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return root


def config(base: dict[str, Any], task: str = "train", **sections: Any) -> dict[str, Any]:
    """Return the config of a task with some keys of sections changed."""
    raw = json.loads(json.dumps(base)) | {"task": task}
    for name, values in sections.items():
        raw[name] = {**raw[name], **values} if isinstance(values, dict) else values
    return raw


def with_loss(base: dict[str, Any], name: str, trainer: str = "", **values: Any) -> dict[str, Any]:
    """Return the config of a loss without composing it again: its own file is enough for a digest."""
    written = yaml.safe_load((CONFIG / "loss" / f"{name}.yaml").read_text(encoding="utf-8"))
    written.pop("defaults", None)
    return {**base, "task": "train", "loss": {**written, **({"trainer": trainer} if trainer else {}), **values}}


def moves(raw: dict[str, Any], edit: Callable[[], object], root: Path = ROOT) -> bool:
    """Tell whether an edit moves the digest."""
    before = digest_of(raw, STAGES_DIR, root)
    edit()
    return digest_of(raw, STAGES_DIR, root) != before


def appended(file: Path, text: str) -> Callable[[], object]:
    """Return an edit: a line more."""
    return lambda: file.write_text(file.read_text(encoding="utf-8") + f"\n{text}\n", encoding="utf-8")


# ---- code


@pytest.mark.parametrize(
    "module", ["trainers/dpo.py", "trainers/paired.py", "functional.py", "engine/optimizer.py", "tasks/train.py"]
)
def test_a_version_anywhere_in_what_a_method_imports_moves_its_digest(base, copy, module):
    raw, file = config(base), copy / module
    source = file.read_text(encoding="utf-8")
    assert moves(raw, appended(file, "VERSION = 7"), copy)
    assert moves(raw, lambda: file.write_text(source, encoding="utf-8"), copy)
    assert not moves(raw, appended(file, "# a comment"), copy)


def test_a_version_of_another_method_moves_nothing(base, copy):
    edit = appended(copy / "trainers/paired.py", "VERSION = 8")
    assert not moves(with_loss(base, "sft"), edit, copy)
    assert not moves(config(base), appended(copy / "trainers/kto.py", "VERSION = 8"), copy)
    assert not moves(config(base, "cache"), appended(copy / "trainers/basic.py", "VERSION: int = 8"), copy)


def test_a_version_of_a_library_module_moves_the_tasks_that_import_it(base, copy):
    for task in ("cache", "generate", "evaluate", "label"):
        before = digest_of(config(base, task, label={"responses": "x"}), STAGES_DIR, copy)
        appended(copy / "models.py", f"VERSION = {len(task)}")()
        assert digest_of(config(base, task, label={"responses": "x"}), STAGES_DIR, copy) != before, task
    assert not moves(config(base, "world"), appended(copy / "models.py", "VERSION = 99"), copy)


def test_the_closure_is_what_python_imports():
    names = {module.name for module in closure("trainers.dpo")}
    assert {"trainers.paired", "functional", "models", "engine.optimizer", "settings.typed"} <= names
    assert not names & {"trainers.kto", "trainers.sft", "launch", "tasks.train", "torch"}


@pytest.mark.parametrize("task, section", [("evaluate", "evaluation"), ("select", "select"), ("label", "label")])
def test_the_code_of_a_verifier_counts(base, copy, tmp_path, monkeypatch, task, section):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mychecks.py").write_text(
        "import myrules\ndef check(prompt, response): return myrules.score(response)\n"
    )
    (tmp_path / "myrules.py").write_text("def score(response): return 1.0\n")
    (tmp_path / "unrelated.py").write_text("")
    own = config(base, task, **{section: {"verifier": "mychecks:check"}})
    assert moves(own, appended(tmp_path / "mychecks.py", "# other"))
    assert moves(own, appended(tmp_path / "myrules.py", "# other"))
    assert not moves(own, appended(tmp_path / "unrelated.py", "# other"))
    shipped = config(base, task, **{section: {"verifier": "worlds.shop:check"}})
    assert moves(shipped, appended(copy / "worlds/shop.py", "# other"), copy)
    assert not moves(config(base, task), appended(copy / "worlds/shop.py", "# more"), copy)
    with pytest.raises(ValueError, match="no module 'nochecks'"):
        digest_of(config(base, task, **{section: {"verifier": "nochecks:check"}}), STAGES_DIR)


def test_the_verifier_of_a_loss_and_the_code_of_a_world_count(base, copy):
    rewarded = with_loss(base, "grpo", verifier="worlds.shop:check")
    assert moves(rewarded, appended(copy / "worlds/shop.py", "# the loss's"), copy)
    assert moves(config(base, "world"), appended(copy / "worlds/shop.py", "# the world's"), copy)


def test_a_method_of_ones_own_counts_with_all_that_it_imports(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(
        "from trainers.sft import SFT\nfrom . import helper\nclass Mine(SFT):\n    formula = helper.FORMULA\n"
    )
    (package / "helper.py").write_text("FORMULA = 'x'\n")
    (package / "other.py").write_text("")
    raw = with_loss(base, "sft", "mypackage.mine.Mine")
    assert moves(raw, appended(package / "mine.py", "# edited"))
    assert moves(raw, appended(package / "helper.py", "# edited"))
    assert not moves(raw, appended(package / "other.py", "# edited"))
    assert digest_of(with_loss(base, "sft", "trainers.sft.SFT"), STAGES_DIR) != digest_of(raw, STAGES_DIR)


# ---- content behind paths


def shaped(hint: str, value: str) -> Any:
    """Return a value as a key of this type holds it."""
    return {"a": value} if "dict[" in hint else [value] if "list[" in hint else value


def string_keys() -> Iterator[tuple[str, str, str]]:
    """Yield (task, section, key) of every key of a stage that holds text and can change its result."""
    classes = get_type_hints(Settings)
    for task in STAGES:
        for section in TASKS[task].sections:
            if section in ("loss", "datasets"):
                continue
            for key, hint in get_type_hints(classes[section]).items():
                if "str" in str(hint) and f"{section}.{key}" not in TASKS[task].free:
                    yield task, section, key


@pytest.mark.parametrize("task", STAGES)
def test_the_content_behind_every_key_that_holds_a_path_counts(base, tmp_path, task):
    classes, seen = get_type_hints(Settings), 0
    for name, section, key in string_keys():
        if name != task or key == "verifier" or section == "world":
            continue
        file = tmp_path / f"{section}_{key}"
        file.write_text("one")
        hint = str(get_type_hints(classes[section])[key])
        more = {"cache": {"quantity": "token_logp"}} if key == "master_dtype" else {}  # which alone reads it
        raw = config(base, task, **{section: {key: shaped(hint, str(file))}, **more})
        assert moves(raw, lambda file=file: file.write_text("two")), f"{section}.{key}"
        copy = str(shutil.copy(file, f"{file}_copy"))
        renamed = config(base, task, **{section: {key: shaped(hint, copy)}, **more})
        assert digest_of(raw, STAGES_DIR) == digest_of(renamed, STAGES_DIR), f"{section}.{key}: the name counts"
        seen += 1
    assert seen or task == "world"


def test_the_content_behind_the_paths_of_data_sets_and_of_the_run_counts(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    for key in ("train", "test"):
        assert moves(config(base, datasets={"local": {key: str(file)}}), appended(file, key))
    assert moves(config(base, load_reference_logprobs=str(file)), appended(file, "{}"))


@pytest.mark.parametrize("name", LOSSES)
def test_the_content_behind_every_path_of_a_loss_counts(base, tmp_path, name):
    file = tmp_path / "file"
    file.write_text("one")
    trainer = with_loss(base, name)["loss"]["trainer"]
    for key, kind in loss_marks(trainer, ROOT).items():
        for value in ([str(file)], str(file)) if kind == "Place" else ():
            assert moves(with_loss(base, name, **{key: value}), appended(file, key)), key
    assert moves(with_loss(base, name, some_new_key=str(file)), appended(file, "new"))  # nobody declared it


def test_a_name_without_a_slash_that_is_a_folder_here_counts(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_text("one")
    for raw in (
        config(base, model={"load_from": "teacher"}),
        config(base, model={"from_checkpoint": "teacher"}),
        config(base, "cache", cache={"reference": "teacher"}),
        config(base, "evaluate", evaluation={"models": {"a": "teacher"}}),
        config(base, "evaluate", evaluation={"reference": {"a": "teacher"}}),
        with_loss(base, "gkd", teacher="teacher"),
        with_loss(base, "dckd", teacher_cache="teacher"),
        with_loss(base, "dckd", teacher_cache=["elsewhere", "teacher"]),
        with_loss(base, "dckd", teacher_cache={"math": "elsewhere", "code": "teacher"}),
        with_loss(base, "dckd", teacher_cache="elsewhere", teacher_tokenizer="teacher"),
        with_loss(base, "reward-weighted-distill", teachers=["teacher"]),
        with_loss(base, "ppo", reward_model="teacher"),
    ):
        assert moves(raw, appended(weights, "more"))
        assert not moves(raw, lambda: (tmp_path / "teacher" / "README.md").write_text("a card"))
    (tmp_path / "train").mkdir()  # a word that is a folder's name by chance
    assert not moves(config(base, "cache", cache={"split": "train"}), lambda: (tmp_path / "train" / "x").write_text(""))


NAMED_AS_PATH = re.compile(r"\b(folder|file|generations\.jsonl|FILE|FOLDER)\b")
NO_PATHS = {"datasets.local.format", "cache.responses", "evaluation.lm_eval"}


def test_every_key_whose_comment_speaks_of_a_file_or_folder_is_declared_as_a_place():
    classes = get_type_hints(Settings)
    found = 0
    for file in sorted((CONFIG / "section").glob("*.yaml")) + [CONFIG / "model" / "base_model.yaml"]:
        section = "model" if file.parent.name == "model" else file.stem
        for key, comment in re.findall(r"^(\w+):[^#]*#(.*)$", file.read_text(encoding="utf-8"), re.M):
            if section not in classes or section == "wandb" or not NAMED_AS_PATH.search(comment):
                continue
            if f"{section}.{key}" not in NO_PATHS:
                assert marked(classes[section]).get(key) == "Place", f"{section}.{key}: {comment}"
                found += 1
    assert found > 10 and marked(DatasetConfig) == {"train": "Place", "test": "Place"}


def test_the_digest_of_a_large_file_is_kept_between_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.truncate(digests.LARGE)
    digests._hashed.cache_clear()
    first = digests.content_digest(file)
    kept = tmp_path / "cache" / "prefdistill" / "file_digests.tsv"
    assert str(file) in kept.read_text()
    digests._hashed.cache_clear()
    assert digests.content_digest(file) == first and kept.read_text().count("\n") == 1
    kept.write_text(kept.read_text()[:-2] + "?\n")  # what is kept is what is read
    digests._hashed.cache_clear()
    assert digests.content_digest(file) != first
    with file.open("r+b") as out:
        out.write(b"x")
    digests._hashed.cache_clear()
    assert digests.content_digest(file) != first and kept.read_text().count("\n") == 2


# ---- keys


def test_a_servers_address_counts_where_it_alone_says_which_model_answers(base):
    for task, section in (("generate", "generation"), ("label", "judge"), ("evaluate", "judge")):
        here, there = ({"base_url": f"http://{host}/v1"} for host in ("here", "there"))

        def digest(values: dict[str, Any], task: str = task, section: str = section) -> str:
            return digest_of(config(base, task, **{section: values}), STAGES_DIR)

        assert digest({**here, "model_name": None}) != digest({**there, "model_name": None})
        assert digest({**here, "model_name": "m"}) == digest({**there, "model_name": "m"})
        assert digest({"retries": 1}) == digest({"retries": 9})


def test_build_seed_counts_where_something_is_drawn_from_it(base, tmp_path):
    def seeds_differ(raw: dict[str, Any]) -> bool:
        one, two = ({**raw, "model": {**raw["model"], "build_seed": seed}} for seed in (1, 2))
        return digest_of(one, STAGES_DIR) != digest_of(two, STAGES_DIR)

    loaded = {"load_from": "/nowhere/stages/sft-1/FINAL"}
    assert seeds_differ(config(base))
    assert not seeds_differ(config(base, model=loaded))
    assert seeds_differ(config(base, model={**loaded, "use_peft": True}))  # the adapters
    assert not seeds_differ(config(base, "cache", model={**loaded, "use_peft": True}))
    assert seeds_differ({**with_loss(base, "bradley-terry"), "model": {**base["model"], **loaded}})  # the new head


# ---- the table


def test_every_key_of_the_run_is_shown_or_read_and_every_section_is_read():
    read = {key for task in TASKS.values() for key in task.run_keys}
    assert {*RunConfig.__dataclass_fields__} - {"task"} <= read | set(SHOWN)
    assert not (set(tasks.TRAINING) & set(SHOWN))
    sections = {name for name in Settings.__dataclass_fields__ if name not in ("run", "raw", "wandb")}
    assert sections == set(tasks.SECTIONS)


def test_every_row_is_a_module_and_every_free_key_is_there():
    modules = {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__"}
    assert set(TASKS) == modules
    classes = get_type_hints(Settings)
    for name, task in TASKS.items():
        for key in task.free:
            section, _, rest = key.partition(".")
            assert section in (*task.sections, *task.by_server) and rest in classes[section].__dataclass_fields__, (
                f"{name}: {key}"
            )


@pytest.mark.parametrize("task", TASKS)
def test_a_task_reads_no_section_that_its_row_does_not_name(task):
    served = {("evaluate", "generation")}  # only what evaluation puts in its place
    tree = ast.parse((ROOT / "tasks" / f"{task}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "settings":
            if node.attr in tasks.SECTIONS and (task, node.attr) not in served:
                assert node.attr in TASKS[task].sections, f"tasks/{task}.py reads settings.{node.attr}"


def test_what_nobody_reads_moves_nothing(base):
    before = digest_of(config(base), STAGES_DIR)
    other = config(base, judge={"retries": 99}, generation={"top_p": 0.5}, exp_name="z", eval_every=3, log_every=1)
    assert digest_of({**other, "a_new_key": 1}, STAGES_DIR) == before
    assert digest_of(config(base, lr=1.0), STAGES_DIR) != before
