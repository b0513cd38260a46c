"""What a dry run costs: one plan, no model code; lengths from the rows' text near those that are trained on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estimate import lengths
from estimate.llama import llama_of
from estimate.meta_model import counted
from settings.needs import Needs
from settings.schema import Settings, settings_from
from tasks.estimate import evaluation_batch
from tests.support.helpers import ALONE, ROOT, composed, write_pairs

# Runs launch.py, then says which libraries it loaded and how often it planned, composed and typed a config.
OBSERVED = """
import cProfile, json, pstats, runpy, sys
profile = cProfile.Profile()
try:
    profile.runcall(runpy.run_path, "launch.py", run_name="__main__")
finally:
    found = {}
    for (file, _, name), (_, calls, *_) in pstats.Stats(profile).stats.items():
        if file.endswith(("pipeline/plan.py", "pipeline/composing.py")):
            found[name] = found.get(name, 0) + calls
    modules = [m for m in ("torch", "transformers", "transformers.modeling_utils", "datasets") if m in sys.modules]
    print(json.dumps({"calls": found, "modules": modules}), file=sys.stderr)
"""


def observed(*line: str) -> tuple[dict[str, Any], str]:
    """Run a command line in a process of its own; return what it did and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", OBSERVED, *line],
        cwd=ROOT,
        env={**os.environ, **ALONE},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1]), done.stdout


@pytest.mark.parametrize(
    "student",
    [
        ["pipeline.student=tiny"],
        pytest.param(["pipeline.student=tiny", "++model.use_peft=true"], marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_plans_once_and_loads_no_model_code(student: list[str], tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 20)
    own = ["datasets=[local]", f"datasets.local.train={data}", f"datasets.local.test={data}", f"cache_dir={tmp_path}/o"]
    found, printed = observed("pipeline=adpa_plus", "pipeline.teacher=tiny", *student, *own, "dry_run=true")
    assert found["modules"] == []
    stages = printed.count("  run\n")
    assert stages == 9 and found["calls"]["build_plan"] == 1 and found["calls"]["stage"] == stages
    assert found["calls"]["composed"] == stages
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| teacher_dpo")]
    assert rows and rows[0][4] != "-", "the tokens of data that is here are said"
    assert "about, from the rows' text" in printed


def settings(*overrides: str) -> Settings:
    """Compose and type a config."""
    return settings_from(composed(*overrides))


def test_a_shape_without_a_tokenizer_is_estimated_from_the_rows_text(tmp_path: Path) -> None:
    """Seen: the estimate of a 70B shape was refused on machines that have the data, and worked where it was missing."""
    data = write_pairs(tmp_path / "pairs.jsonl", 20)
    own = ["datasets=[local]", f"datasets.local.train={data}", f"datasets.local.test={data}"]
    shape = settings("model=llama_8b_shape", *own)
    assert lengths.from_text(shape) and not lengths.from_text(settings("model=tiny", *own))
    examples, _, number = lengths.examples_of(shape, "test")
    assert len(examples) == number == 20
    assert evaluation_batch(shape, Needs("pairs")) is not None


@pytest.mark.parametrize("split", ["train", "test"])
def test_lengths_from_text_are_near_those_of_the_tokens(split: str, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 60)
    own = ["datasets=[local]", f"datasets.local.train={data}", f"datasets.local.test={data}"]
    config = settings("model=tiny", *own)
    as_text = replace(config, estimate=replace(config.estimate, lengths="text"))
    real, _, number = lengths.examples_of(config, split)
    said, _, same = lengths.examples_of(as_text, split)
    assert number == same and len(said) == len(real)
    total = {name: sum(len(getattr(e, name).ids) for e in real) for name in ("chosen", "rejected")}
    for name, tokens in total.items():  # measured: 1.00
        assert sum(len(getattr(e, name).ids) for e in said) == pytest.approx(tokens, rel=0.05)


def test_without_a_tokenizer_on_this_machine_a_token_is_four_characters(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    row = {"prompt": "x" * 400, "response": "y" * 800}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    config = settings("model=llama", "datasets=[local]", f"datasets.local.train={data}", "++estimate.lengths=text")
    (example,), _, _ = lengths.examples_of(config, "train")
    assert len(example.prompt) == pytest.approx(100, abs=15) and example.response is not None
    assert sum(example.response.response) == pytest.approx(200, abs=5)


def described(folder: Path, **keys: Any) -> str:
    """Write the configuration of a small model."""
    shape = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**shape, **keys}), encoding="utf-8")
    return f"model.name_or_path={folder}"


@pytest.mark.parametrize(
    "lora", [[], ["model.use_peft=true"], ["model.use_peft=true", "model.peft.target_modules=[q_proj,v_proj]"]]
)
@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 24},
        {"model_type": "qwen2", "num_key_value_heads": 2},
    ],
    ids=lambda keys: keys["model_type"],
)
def test_arithmetic_counts_what_the_library_builds(keys: dict[str, Any], lora: list[str], tmp_path: Path) -> None:
    config = settings("model=llama", described(tmp_path / "m", **keys), *lora).model
    assert llama_of(config) == counted(config)


@pytest.mark.slow
def test_a_plan_says_which_model_it_does_not_count(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    own = ["datasets=[local]", f"datasets.local.train={data}", "pipeline.teacher=tiny", "pipeline.student=pythia"]
    model = described(tmp_path / "m", model_type="gpt_neox").replace("model.", "++pipeline.student_set.model.")
    found, printed = observed("pipeline=dckd", *own, model, f"cache_dir={tmp_path}/o", "dry_run=true")
    assert found["modules"] == []
    assert "a gpt_neox is not counted in a plan: task=estimate counts it" in printed


def test_lengths_of_rows_with_ids_are_those_of_the_ids(tmp_path: Path) -> None:
    row = {"prompt": "ab", "prompt_ids": [1, 2, 3], "response": "c", "response_ids": [4, 5], "finish_reason": "stop"}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    config = settings("model=tiny", "datasets=[local]", f"datasets.local.train={data}", "++estimate.lengths=text")
    (example,), _, _ = lengths.examples_of(config, "train")
    assert len(example.prompt) == 3 and example.response is not None and len(example.response.ids) == 5
