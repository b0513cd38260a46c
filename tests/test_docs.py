"""What README.md shows is what works: its commands compose, its examples of a loss, a dataset and a model run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs import losses_table
from launch import settings_of
from tests.support.helpers import ROOT, composed, launch, rows_of, write_pairs

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    """Return the words of every launch.py command of the bash and indented blocks, with the shell's variables filled
    in.
    """
    text = "\n".join(body for language, body in BLOCKS if language == "bash").replace("\\\n", " ")
    text += "\n" + "\n".join(
        line.strip() for line in README.splitlines() if line.startswith("    ") and "launch.py " in line and "=" in line
    )
    variables: dict[str, str] = {}
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.M):
        variables[name] = re.sub(r"\$(\w+)", lambda m: variables[m[1]], value)
    lines = [line for line in text.splitlines() if "launch.py" in line and not re.match(r"\w+=", line)]
    return [shlex.split(re.sub(r"\$(\w+)", lambda m: variables[m[1]], line.split("&&")[-1])) for line in lines]


COMMANDS = commands()
SINGLE = [c for c in COMMANDS if not any(w.startswith("pipeline=") or w == "loss=my_exponential" for w in c)]
PIPELINES = [c for c in COMMANDS if any(w.startswith("pipeline=") for w in c)]


def overrides(command: list[str]) -> list[str]:
    """Return what follows launch.py."""
    return command[next(i for i, word in enumerate(command) if word.endswith("launch.py")) + 1 :]


def block(path: str) -> str:
    """Return the block whose first line is a comment with this path."""
    return next(body for _, body in BLOCKS if body.startswith(f"# {path}\n"))


@pytest.mark.parametrize("command", SINGLE, ids=lambda c: next(w for w in c if w.startswith("exp_name=")))
def test_every_command_of_the_readme_composes(command: list[str], tmp_path: Path, monkeypatch) -> None:
    write_pairs(tmp_path / "pairs.jsonl", 4)  # the README's own first step writes it
    monkeypatch.chdir(tmp_path)
    settings = settings_of(composed(*overrides(command)))
    assert settings.datasets
    if "--config_file" in command:
        config = yaml.safe_load((ROOT / command[command.index("--config_file") + 1]).read_text(encoding="utf-8"))
        assert settings.model.batch_size % (config["num_processes"] * settings.model.gradient_accumulation_steps) == 0


def test_the_readme_shows_the_nine_stages_and_the_pipelines() -> None:
    names = [w.partition("=")[2] for c in SINGLE for w in c if w.startswith("exp_name=")]
    stages = [
        "teacher_sft",
        "teacher_dpo",
        "student_sft",
        "cache_logprobs",
        "dckd",
        "generate",
        "cache_advantages",
        "adpa_plus",
        "evaluate",
    ]
    assert [name for name in names if name in stages] == stages
    assert len(PIPELINES) >= 2


@pytest.mark.slow  # test_pipeline.py plans in the default run
@pytest.mark.parametrize("command", PIPELINES, ids=lambda c: next(w for w in c if w.startswith("pipeline=")))
def test_the_pipelines_of_the_readme_have_a_plan(command: list[str], tmp_path: Path) -> None:
    done = launch(*[w for w in overrides(command) if w != "dry_run=true"], "dry_run=true", f"cache_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ stages, 0 done", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_loss_dataset_and_model_that_the_readme_adds_work(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs*", "tests", "__pycache__", "*.log"))
    for path in (
        "trainers/my_exponential.py",
        "config/loss/my_exponential.yaml",
        "config/datasets/mine.yaml",
        "config/model/mine.yaml",
    ):
        (copy / path).write_text(block(path), encoding="utf-8")
    (copy / "config/model/mine.yaml").write_text(
        block("config/model/mine.yaml").replace("some/hub-name", "null"), encoding="utf-8"
    )
    (copy / "data").mkdir()
    write_pairs(copy / "data/mine_train.jsonl", 16)
    asked = ["loss=my_exponential", "datasets=[mine]", f"cache_dir={tmp_path}", "n_steps=2", "log_every=1", "lr=1e-3"]
    # The README's model is a hub name; the same file with the tiny architecture in its place needs no network.
    tiny = yaml.safe_load((copy / "config/model/tiny.yaml").read_text(encoding="utf-8"))
    build = "{" + ", ".join(f"{k}: {v}" for k, v in tiny["build"].items()).replace("True", "true") + "}"
    model = [
        "model=mine",
        f"++model.build={build}",
        f"++model.tokenizer_name_or_path={tiny['tokenizer_name_or_path']}",
        "model.batch_size=8",
    ]
    command = [sys.executable, "launch.py", *asked, *model, "exp_name=added"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "added/metrics.jsonl")
    assert rows[0]["loss/train"] == pytest.approx(1.0, abs=1e-5)  # the margin is 0 where policy and reference are one
    assert "rewards_train/margins" in rows[0] and (tmp_path / "added/FINAL/model.safetensors").is_file()


def test_the_table_of_losses_is_the_code() -> None:
    page = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    written = page.split(losses_table.BEGIN)[1].split(losses_table.END)[0].strip()
    assert written == losses_table.table(), "run: python -m docs.losses_table"


def test_linked_files_exist() -> None:
    sources = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
    for source in sources:
        for target in re.findall(r"\]\((?!http)([^)#]+)", source.read_text(encoding="utf-8")):
            assert (source.parent / target).exists(), f"{source.name} points to {target}"
