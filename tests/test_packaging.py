"""What a user finds in the repository: configuration groups with a comment on every key, locks, license, installer."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from settings.schema import settings_from

ROOT = Path(__file__).parents[1]
GROUPS = {
    "loss": [
        "sft",
        "dpo",
        "dckd",
        "adpa",
        "cdpo",
        "robust-dpo",
        "ipo",
        "hinge",
        "slic",
        "simpo",
        "orpo",
        "cpo",
        "exo",
        "nca",
        "sppo-hard",
        "apo-zero",
        "apo-down",
        "aot",
        "discopop",
        "bco",
        "tdpo",
        "ra-dpo",
        "kto",
        "kto-zero",
        "csft",
        "bradley-terry",
    ],
    "model": [
        "base_model",
        "llama",
        "mistral",
        "qwen",
        "gemma",
        "pythia",
        "danube",
        "smollm2",
        "smollm2_pruned",
        "tiny",
        "quickstart_teacher",
        "shop_teacher",
        "quickstart_student",
        "arithmetic",
    ],
    "datasets": ["deita", "dpo_mix", "ultrabin", "hh", "shp", "gsm8k", "local"],
    "pipeline": ["quickstart", "smollm2", "dckd", "adpa", "adpa_plus", "dpo_st", "dpo_st_arithmetic"],
}
ACCELERATE = {
    "cpu_2": 2,
    "gpu_1": 1,
    "fsdp_2gpu": 2,
    "fsdp_4gpu": 4,
    "fsdp_8gpu": 8,
    "fsdp_2x2gpu": 4,
    "fsdp_2x4gpu": 8,
    "fsdp_2x8gpu": 16,
    "deepspeed_zero3_2gpu": 2,
    "deepspeed_zero3_4gpu": 4,
}
# Pipelines say what a stage does in a line above it; their settings are keys explained elsewhere.
COMMENTED = sorted(
    path
    for folder in (
        "config",
        "config/loss",
        "config/model",
        "config/datasets",
        "config/hydra/launcher",
        "accelerate_config",
    )
    for path in (ROOT / folder).glob("*.yaml")
)
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
MODELS = [name for name in GROUPS["model"] if name != "base_model"]


def pinned(path: Path) -> dict[str, str]:
    """Return {package: version} of a lock file; any line that is not `name==version` fails."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and "#" not in line[:5]]
    matches = [re.fullmatch(r"([a-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line) for line in lines]
    assert all(matches), f"{path.name}: not pinned: {[line for line, ok in zip(lines, matches, strict=True) if not ok]}"
    return {match[1]: match[2] for match in matches if match}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_the_named_choice_of_a_group_exists(group: str, name: str) -> None:
    assert (ROOT / "config" / group / f"{name}.yaml").is_file()


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#"), f"{path}: the first line says what the file is"
    for line in lines:
        key = re.match(r"\s*([\w.]+):(\s|$)", line)
        # A key that opens a section is explained by the keys below it; a loss's name is the file's.
        if key and key[1] not in ("defaults", "name") and line.strip() != f"{key[1]}:":
            assert re.search(r"\s#\s\S", line), f"{path.name}: no comment: {line.strip()}"


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_with_every_dataset_and_types(model: str) -> None:
    choices = [f"model={model}", f"datasets=[{','.join(GROUPS['datasets'])}]"]
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        raw = OmegaConf.to_container(compose("config", choices), resolve=True)
    assert isinstance(raw, dict)
    raw.pop("pipeline", None)
    settings = settings_from({str(key): value for key, value in raw.items()})
    assert sorted(settings.datasets) == sorted(GROUPS["datasets"])
    assert bool(settings.model.name_or_path) != bool(settings.model.build)


def test_base_model_holds_every_key_of_the_model_section() -> None:
    from dataclasses import fields

    from settings.schema import ModelConfig

    keys = yaml.safe_load((ROOT / "config/model/base_model.yaml").read_text(encoding="utf-8"))
    assert sorted(keys) == sorted(field.name for field in fields(ModelConfig))


@pytest.mark.parametrize(("name", "processes"), ACCELERATE.items())
def test_an_accelerate_configuration_loads_and_starts_so_many_processes(name: str, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(ROOT / "accelerate_config" / f"{name}.yaml"))
    assert loaded.num_processes == processes
    assert loaded.mixed_precision == "no"
    if name.startswith("fsdp"):
        assert loaded.distributed_type == "FSDP"
        assert loaded.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_everything_and_names_no_host(path: Path) -> None:
    assert pinned(path)
    assert "://" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["base", "dev", "lm_eval", "alpaca_eval", "gguf", "trackers", "deepspeed", "vllm", "vllm_gpu"]
)
def test_a_lock_holds_what_its_in_file_asks_for(name: str) -> None:
    lock = pinned(ROOT / "requirements" / f"{name}.lock")
    for line in (ROOT / "requirements" / f"{name}.in").read_text(encoding="utf-8").splitlines():
        asked = re.match(r"[a-z][\w-]*", line)
        if asked:
            assert asked[0] in lock, f"{asked[0]} is not in {name}.lock: run requirements/compile.sh"
            assert "#" in line, f"{name}.in does not say why it asks for {asked[0]}"


def test_deepspeeds_lock_leaves_out_what_every_environment_has() -> None:
    extra = pinned(ROOT / "requirements" / "deepspeed.lock")
    assert not extra.keys() & pinned(ROOT / "requirements" / "base.lock").keys()
    for name in ("vllm", "vllm_gpu"):  # installed over these, too
        lock = pinned(ROOT / "requirements" / f"{name}.lock")
        assert {package: lock[package] for package in extra.keys() & lock.keys()}.items() <= extra.items()


def test_locks_installed_over_one_another_agree() -> None:
    base, dev = (pinned(ROOT / "requirements" / f"{name}.lock") for name in ("base", "dev"))
    assert {name: dev[name] for name in dev.keys() & base.keys()} == {n: base[n] for n in dev.keys() & base.keys()}
    assert all(pinned(path).get("torch", "2.13.0") == "2.13.0" for path in LOCKS)


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def run_installer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh with nothing but the given variables and the system's programs."""
    command = ["bash", str(ROOT / "install.sh"), *arguments]
    return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True)


def test_the_installer_refuses_an_unknown_flag_with_its_usage() -> None:
    done = run_installer("--everything")
    assert done.returncode == 2
    assert "unknown flag: --everything" in done.stderr and "usage:" in done.stderr


def test_the_installers_usage_names_its_flags() -> None:
    done = run_installer("--help")
    assert done.returncode == 0
    flags = (
        "--dev",
        "--smollm2",
        "--vllm",
        "--lm-eval",
        "--alpaca-eval",
        "--gguf",
        "--trackers",
        "--deepspeed",
        "--cuda",
    )
    for flag in flags:
        assert f"\n  {flag} " in done.stdout


def test_the_installer_changes_no_environment_of_another_checkout(tmp_path: Path) -> None:
    shutil.copy(ROOT / "install.sh", tmp_path / "install.sh")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "other").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "other")
    command = ["bash", str(tmp_path / "install.sh")]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 1 and ".venv is a link to" in done.stderr
    assert not any((tmp_path / "other").iterdir())


def test_the_installer_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = run_installer(PYTHON=str(old))
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr and "Python 3.9.1" in done.stderr
