"""The command line: what a user mistypes or gets wrong ends in one clear error, exit code 2, and no traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import launch as launcher
import models
from pipeline import run_folder
from settings.schema import ModelConfig, RunConfig, typed
from tests.support.helpers import ROOT, composed, launch, rows_of, write_pairs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", 12)


def base(tmp_path: Path, data: Path, *more: str) -> list[str]:
    return ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}/runs", *more]


def refused(raw: dict) -> str:
    with pytest.raises(ValueError) as caught:
        launcher.run_task(raw)
    return str(caught.value)


def test_a_typo_is_one_line_with_the_nearest_key_and_no_traceback(tmp_path, data):
    run = launch(*base(tmp_path, data, "++lrr=1e-3"))
    assert run.returncode == 2 and "Did you mean 'lr'?" in run.stderr and "Traceback" not in run.stderr
    run = launch(*base(tmp_path, data, "model.bathc_size=3"))
    assert run.returncode == 2 and "batch_size" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("help", "'help': write KEY=VALUE without blanks around the =; launch.py --help has examples"),
        ("--loss=dpo", "--loss=dpo: keys have no dashes here: loss=dpo"),
        ("loss=dop", "loss=dop is not known. Did you mean 'dpo'?"),
        ("loss=DPO", "loss=DPO is not known. Did you mean 'dpo'?"),
        ("datasets=pairs.jsonl", "for a file: datasets=[local] datasets.local.train=pairs.jsonl"),
        ("loss.beta=1", "unknown key 'loss.beta'. Another choice of loss= has it, this one has not"),
        ("datasets.local.train=x", "unknown key 'datasets'. Data sets are chosen first: datasets=[local] or"),
        ("model.batch_size=abc", "model.batch_size: Value 'abc' of type 'str' could not be converted to Integer\n"),
    ],
)
def test_a_word_that_is_no_key_says_how_it_is_typed(word, said):
    run = launch(word)
    assert run.returncode == 2 and said in run.stderr and "Traceback" not in run.stderr


def test_a_group_that_is_not_yaml_is_one_line_with_its_place(tmp_path, data):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [base_model]\nbuild: {size: ?}\n")
    run = launch(f"--config-dir={tmp_path}", *base(tmp_path, data, "model=mine"))
    assert run.returncode == 2 and "mine.yaml, line 2, column 15 is not YAML: " in run.stderr
    assert "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 1


def test_a_terminal_that_lacks_letters_gets_their_numbers(tmp_path, data):
    run = launch(*base(tmp_path, data, "loss=dpo", "n_steps=1", "exp_name=a"), env={"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and "L = mean over pairs of \\u2212" in run.stdout, run.stderr


def test_a_strategy_that_is_not_running_is_refused(tmp_path, data):
    message = refused(composed(*base(tmp_path, data, "strategy=fsdp", "exp_name=s")))
    assert "strategy=fsdp: 1 process(es)" in message and "torchrun" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("++model.max_prompt_length=4096", "max_prompt_length"),
        ("++model.batch_size=0", "model.batch_size=0"),
        ("++loss.betta=1", "beta"),
        ("++lr=fast", "lr"),
        ("++loss.beta=-1", "loss.beta=-1"),
        ("++datasets.local.formt=hh", "format"),
        ("++train_datasets=[ultrabin]", r"datasets=\[NAME\]"),
        ("++model.peft.lora_rank=3", "lora_r"),
        ("++model.attn_implementation=flash_attention_2", "GPU"),
        ("++model.load_from=/nowhere/FINAL", "/nowhere/FINAL"),
        ("++wandb.enable=true", "enabled"),
        ("++model.gradient_accumulation_steps=3", "divisible"),
        ("++seed=-1", "seed=-1 must be at least 0"),
        ("++seed=99999999999999", "seed=99999999999999 must be .* below 2"),
        ("++generation.seed=99999999999999", "generation.seed=99999999999999 must be"),
        ("++betas=[0.9,1.5]", r"betas=\[0.9, 1.5\] must each be in"),
        ("++weight_decay=-1", "weight_decay=-1.0 must not be negative"),
    ],
)
def test_impossible_values_name_the_key(tmp_path, data, override, words):
    assert re.search(words, refused(composed(*base(tmp_path, data, "loss=dpo", override))))


def test_losses_with_inputs_say_what_is_missing(tmp_path, data):
    assert "loss.teacher_cache" in refused(composed(*base(tmp_path, data, "loss=dckd")))


def test_pairs_losses_refuse_rows_without_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert "chosen" in refused(composed(*base(tmp_path, tmp_path / "a.jsonl", "loss=dpo")))


def test_an_unwritable_folder_is_one_error(tmp_path, data):
    (tmp_path / "file").write_text("")
    run = launch(*base(tmp_path, data, f"cache_dir={tmp_path}/file/x"))
    assert run.returncode == 2 and "Traceback" not in run.stderr and "file" in run.stderr


def cpu_seconds(*args: str, tmp_path: Path) -> tuple[float, int]:
    """Run launch.py where torch cannot be imported; return the CPU seconds it took and its exit code."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *args],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode


MARGIN = 2.5  # the same work takes up to so much more CPU time beside six others on two cores


@pytest.mark.parametrize(
    ("line", "bar", "code"),
    [
        ("--help", 1.5, 0),
        ("help=loss/adpa", 1.5, 0),
        ("help=loss/adap", 1.5, 2),
        ("lrr=1e-3", 1.5, 2),
        ("++lrr=1e-3", 1.5, 2),
        ("loss=dpo ++loss.betta=1", 1.5, 2),
        ("judge.retires=3", 1.5, 2),
        ("loss.trainer=trainers.dpo.DPOO", 1.5, 2),
        ("task=trian", 1.5, 2),
        ("pipeline=quickstart dry_run=true", 5.0, 0),
    ],
)
def test_a_mistake_the_help_and_a_plan_need_no_torch_and_little_time(tmp_path, line, bar, code):
    seconds, returned = cpu_seconds(*line.split(), f"cache_dir={tmp_path}/runs", tmp_path=tmp_path)
    assert returned == code
    assert seconds < MARGIN * bar, f"{line}: {seconds:.1f} s of CPU, the bar is {bar} s"


# ---- the same run


def folder_of_a_run(tmp_path, data, *more: str, done: bool = True) -> list[str]:
    """Write the folder that a run leaves; return its command line."""
    line = base(tmp_path, data, "exp_name=x", *more)
    raw = composed(*line)
    folder = tmp_path / "runs" / "x"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    told = run_folder.told_of_run(launcher.settings_of(raw))
    (folder / "digest.txt").write_text(run_folder.hashed(told), encoding="utf-8")
    (folder / "digest.json").write_text(told, encoding="utf-8")
    (folder / "checkpoint-2" / "DONE").touch()
    if done:
        (folder / "DONE").touch()
    return line


def goes_on(raw: dict) -> bool:
    """Tell whether there is something left to do in the folder of a run; ValueError if it holds another one."""
    return run_folder.open_run_dir(launcher.settings_of(raw))


def test_a_finished_run_is_the_same_whatever_its_task_does_not_read(tmp_path, data):
    line = folder_of_a_run(tmp_path, data)
    unread = ["judge.retries=3", "generation.top_p=0.5", "evaluation.majority=0", "eval_every=7", "n_eval_examples=5"]
    for other in (*unread, "estimate.rows=3", "log_every=1", f"cache_dir={tmp_path}/./runs"):
        assert not goes_on(composed(*line, other)), other
    for other, words in (
        ("lr=1e-2", "lr was"),
        ("model.build_seed=4", "model.build_seed was"),
        ("n_epochs=2", "n_epochs"),
        ("loss=dpo", "loss.name was 'sft' and is 'dpo'"),
        ("model=shop_teacher", "x holds another run: model.name_or_path|model"),
    ):
        with pytest.raises(ValueError, match=words):
            goes_on(composed(*line, other))
    with pytest.raises(ValueError, match="task was 'train' and is 'inspect'"):
        goes_on(composed(*line, "task=inspect"))


def test_what_looks_at_a_run_has_a_folder_of_its_own(tmp_path, data):
    names = {
        task: launcher.settings_of(composed(*base(tmp_path, data), f"task={task}")) for task in ("train", "estimate")
    }
    assert {task: found.run.exp_name for task, found in names.items()} == {"train": "run", "estimate": "estimate"}


def test_a_finished_run_is_another_where_the_content_of_its_data_is(tmp_path, data):
    line = folder_of_a_run(tmp_path, data)
    was = data.read_text(encoding="utf-8")
    data.write_text(was.replace("dog", "cat"), encoding="utf-8")
    assert data.read_text(encoding="utf-8") != was
    with pytest.raises(ValueError, match="the same settings, but what datasets.local.train names had another content"):
        goes_on(composed(*line))
    (tmp_path / "runs" / "x" / "digest.json").unlink()  # of a version that did not write it
    with pytest.raises(ValueError, match="the content of a file that they name, or the version of the code"):
        goes_on(composed(*line))
    data.write_text(was, encoding="utf-8")
    assert not goes_on(composed(*line))


def test_a_key_that_came_with_an_update_blocks_an_unfinished_run_only_if_its_task_reads_it(tmp_path, data):
    line = folder_of_a_run(tmp_path, data, done=False)
    stored = tmp_path / "runs" / "x" / "config.yaml"
    old = yaml.safe_load(stored.read_text(encoding="utf-8"))
    for section, key in (("judge", "retries"), ("cache", "top_k"), ("label", "margin")):
        del old[section][key]
    del old["select"]
    old["a_key_that_is_gone"] = 1
    stored.write_text(yaml.safe_dump(old), encoding="utf-8")
    assert goes_on(composed(*line))
    del old["model"]["max_length"]
    stored.write_text(yaml.safe_dump(old), encoding="utf-8")
    with pytest.raises(ValueError, match="model.max_length was None and is"):
        goes_on(composed(*line))


# ---- a method of one's own


def test_a_method_in_a_package_of_ones_own_trains(tmp_path, data, monkeypatch):
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mymethod.py").write_text(
        "from trainers.sft import SFT\n\nclass Mine(SFT):\n    formula = 'mine'\n\nclass Other:\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # launch.py puts the folder where it is typed there
    line = base(tmp_path, data, "exp_name=own", "n_steps=1")
    launcher.run_task(composed(*line, "loss.trainer=mypackage.mymethod.Mine"))
    assert "mine" in (tmp_path / "runs/own/objective.txt").read_text() and (tmp_path / "runs/own/DONE").is_file()
    assert "no subclass of trainers.basic.BasicTrainer" in refused(
        composed(*line, "loss.trainer=mypackage.mymethod.Other")
    )


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ("DPO", "must name a class by its import path, e.g. trainers.dpo.DPO"),
        ("trainers/dpo.py", "must name a class by its import path"),
        (
            "nopackage.module.Mine",
            "there is no module 'nopackage.module'. It must lie in the repository, in the folder",
        ),
        ("trainers.dpo.DPOO", "trainers.dpo has no class 'DPOO'. It has: DPOConfig, DPO"),
        ("trainers.dpo.DPOConfig", "no subclass of trainers.basic.BasicTrainer"),
    ],
)
def test_a_trainer_that_is_none_is_refused_with_what_to_do(tmp_path, data, trainer, words):
    assert words in refused(composed(*base(tmp_path, data, f"loss.trainer='{trainer}'")))


def test_every_key_of_config_yaml_is_read_by_a_dataclass():
    raw = composed("model=tiny", "exp_name=x")
    settings = launcher.settings_of(raw)
    assert settings.run == typed({k: v for k, v in raw.items() if k in RunConfig.__dataclass_fields__}, RunConfig)
    assert isinstance(settings.model, ModelConfig)


def test_a_run_leaves_model_config_command_versions_and_metrics_and_a_second_one_does_nothing(tmp_path, data):
    overrides = base(
        tmp_path,
        data,
        "loss=dpo",
        "exp_name=x",
        "run_count=run1",
        "n_steps=2",
        "log_every=1",
        "++cache_reference_logprobs=true",
    )
    launcher.run_task(composed(*overrides))
    folder = tmp_path / "runs" / "x" / "run1"
    for name in (
        "FINAL/config.json",
        "FINAL/model.safetensors",
        "FINAL/tokenizer.json",
        "config.yaml",
        "command.txt",
        "versions.json",
        "DONE",
    ):
        assert (folder / name).is_file(), name
    row = rows_of(folder / "metrics.jsonl")[0]
    for key in ("step", "examples", "loss/train", "rewards_train/accuracies", "grad_norm", "lr", "tokens_per_second"):
        assert key in row, key
    assert row["loss/train"] == pytest.approx(0.693147, abs=1e-5)  # policy == reference at step 0
    before = os.stat(folder / "FINAL" / "model.safetensors").st_mtime_ns
    launcher.run_task(composed(*overrides))
    assert os.stat(folder / "FINAL" / "model.safetensors").st_mtime_ns == before
    assert "lr was" in refused(composed(*overrides, "lr=1e-2"))


def test_cached_reference_equals_live_reference_and_lora_starts_at_ln_2(tmp_path, data):
    common = base(tmp_path, data, "n_steps=3", "log_every=1", "lr=1e-3")
    for method in ("dpo", "kto"):  # kto scores mismatched responses, too
        loss = f"loss={method}"
        launcher.run_task(composed(*common, loss, f"exp_name={method}_live"))
        launcher.run_task(composed(*common, loss, f"exp_name={method}_cached", "++cache_reference_logprobs=true"))
        live, cached = (rows_of(tmp_path / f"runs/{method}_{name}/metrics.jsonl") for name in ("live", "cached"))
        for a, b in zip(live, cached, strict=True):
            # one batch scores 12 rows, the other 8: sums of float32 in another padding, measured 1e-7
            assert a["loss/train"] == pytest.approx(b["loss/train"], abs=2e-6)
    launcher.run_task(composed(*common, "loss=dpo", "exp_name=lora", "++model.use_peft=true", "++model.peft.lora_r=4"))
    assert rows_of(tmp_path / "runs/lora/metrics.jsonl")[0]["loss/train"] == pytest.approx(0.693147, abs=1e-5)
    config = json.loads((tmp_path / "runs/lora/FINAL/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]  # merged: no adapter is left


def test_runs_share_the_reference_of_the_same_data_and_refuse_another(tmp_path, data, capsys):
    cached = ["n_steps=1", "log_every=1", "++cache_reference_logprobs=true"]
    shared = tmp_path / "runs" / "reference_logprobs"
    for name, loss in (("a", "dpo"), ("b", "hinge"), ("c", "ipo")):
        launcher.run_task(composed(*base(tmp_path, data, f"loss={loss}", f"exp_name={name}", *cached)))
    assert capsys.readouterr().err.count("reference:") > 0
    folder, *others = shared.iterdir()
    assert not others and {p.name for p in folder.iterdir()} == {"DONE", "meta.json", "shard-00000"}
    launcher.run_task(composed(*base(tmp_path, data, "loss=kto", "exp_name=d", *cached)))
    assert len(list(shared.iterdir())) == 2  # its mismatched sequences are others: another artifact
    load = [f"++load_reference_logprobs={folder}", "n_steps=1"]
    launcher.run_task(composed(*base(tmp_path, data, "loss=dpo", "exp_name=e", *load)))
    other_model = refused(composed(*base(tmp_path, data, "loss=dpo", "exp_name=f", "++model.build_seed=9", *load)))
    assert "another model" in other_model
    other_rows = write_pairs(tmp_path / "other.jsonl", 4, start=500)
    assert "lacks 8 of 8 sequences" in refused(composed(*base(tmp_path, other_rows, "loss=dpo", "exp_name=g", *load)))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("loss=simpo ++cache_reference_logprobs=true", "no reference model"),
        ("loss=tdpo ++cache_reference_logprobs=true", "whole distributions"),
        ("loss=ra-dpo load_reference_logprobs=x", "whole distributions"),
        ("loss=orpo sync_reference=1", "no reference model to move"),
        ("loss=dpo sync_reference=1 ++cache_reference_logprobs=true", "stand still"),
        ("loss=dpo sync_reference=1 model.use_peft=true", "without its adapter"),
        ("loss=dpo loss.log_epsilon_P=0.5", "both sides of 0"),
        ("loss=exo loss.label_smoothing=0", "infinite"),
        ("loss=simpo ++loss.humanline=true", "unknown key 'loss.humanline'"),
        ("loss=ra-dpo loss.risk=papers", "choose one of paper, reference"),
        ("loss=dpo model.attn_implementation=flash_attention_2", "GPUs only"),
        ("loss=dpo ++config.intermediate_checkpoints=true", "without `config.`"),
        ("loss=dpo ++train_datasets=[ultrabin]", "datasets=[NAME]"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(tmp_path, data, overrides, message, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    if "attn" in overrides:  # this one is refused where the model would be loaded
        monkeypatch.undo()
    assert message in refused(composed(*base(tmp_path, data, *overrides.split())))
