"""lm-evaluation-harness for real: a local task on a small model, offline, against a plain loop over the same choices.

The evaluation runs in the interpreter that LM_EVAL_PYTHON names (default: this one), so an environment of its own will
do: LM_EVAL_PYTHON=/path/to/.venv/bin/python .venv/bin/python -m pytest -m slow tests/test_lm_eval.py
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import models
from engine import export
from settings.schema import ModelConfig, typed
from tasks import evaluate
from tests.support.helpers import composed, launch
from tests.test_evaluation_report import settings_for
from worlds import shop

PYTHON = os.environ.get("LM_EVAL_PYTHON", sys.executable)
SEARCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
HAS_LM_EVAL = subprocess.run([PYTHON, "-c", SEARCH], stderr=subprocess.DEVNULL, check=False).returncode == 0
needs_lm_eval = pytest.mark.skipif(
    not HAS_LM_EVAL, reason=f"{PYTHON} has no lm_eval: ./install.sh --lm-eval, or set LM_EVAL_PYTHON"
)
NUM_ROWS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a small model, rows to choose on, and a task of one's own that reads them."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = shop.generate(1)["pairs_test.jsonl"][:NUM_ROWS]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = typed(composed("model=quickstart_student")["model"], ModelConfig)
    export.save_model(models.load_model(config, trainable=False), models.load_tokenizer(config), folder / "model")
    (folder / "tasks").mkdir()
    task = {
        "task": "shop_pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{chosen[0].content}}",
        "doc_to_choice": "{{[chosen[1].content, rejected[1].content]}}",
        "doc_to_target": 0,
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks/shop_pairs.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def launched(folder: Path, task: str, name: str) -> subprocess.CompletedProcess[str]:
    """Run task=evaluate with nothing but one benchmark."""
    return launch(
        "task=evaluate",
        "model=quickstart_student",
        "datasets=[local]",
        f"datasets.local.test={folder / 'test.jsonl'}",
        f"++evaluation.models.small={folder / 'model'}",
        "evaluation.temperatures=[]",
        f"evaluation.lm_eval=[{task}]",
        f"evaluation.lm_eval_path={folder / 'tasks'}",
        f"cache_dir={folder}",
        f"exp_name={name}",
        python=PYTHON,
        env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")},
    )


@torch.no_grad()
def share_right(folder: Path) -> float:
    """Return the share of rows whose first choice has the higher log-probability after the prompt, one by one."""
    config = typed(
        composed("model=quickstart_student", f"model.name_or_path={folder / 'model'}", "model.build=null")["model"],
        ModelConfig,
    )
    tokenizer, model = models.load_tokenizer(config), models.load_model(config, trainable=False)
    run: Any = model
    right = []
    for line in (folder / "test.jsonl").read_text().splitlines():
        row, sums = json.loads(line), []
        prompt = row["chosen"][0]["content"]
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        for choice in (row["chosen"][1]["content"], row["rejected"][1]["content"]):
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False).input_ids
            logps = run(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logps[t - 1, ids[t]]) for t in range(start, len(ids))))
        right.append(sums[0] > sums[1])
    return float(np.mean(right))


@pytest.mark.slow
@needs_lm_eval
def test_a_local_task_runs_offline_and_its_metrics_reach_every_artifact(folder: Path) -> None:
    done = launched(folder, "shop_pairs", "run")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "run/results.json").read_text())["models"]["small"]["lm_eval"]["shop_pairs"]
    value, share = found["metrics"]["acc"]["value"], share_right(folder)
    assert found["n"] == NUM_ROWS and value == pytest.approx(share) and 0 < share < 1
    # The standard error of a mean, with n - 1.
    assert found["metrics"]["acc"]["stderr"] == pytest.approx((share * (1 - share) / (NUM_ROWS - 1)) ** 0.5)
    assert f"| small | shop_pairs | acc | {value:.3f} |" in (folder / "run/summary.md").read_text()
    assert "shop_pairs" in (folder / "run/report.html").read_text()


@pytest.mark.slow
@needs_lm_eval
def test_a_task_that_is_not_there_is_named_before_a_model_loads(folder: Path) -> None:
    done = launched(folder, "shop_pair", "wrong")
    assert done.returncode == 2 and "no task 'shop_pair'. Did you mean 'shop_pairs'?" in done.stderr


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed here")
def test_without_the_library_the_error_says_how_to_install_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"not installed: \./install\.sh --lm-eval"):
        evaluate.run(
            settings_for(folder, "x", models={"small": str(folder / "model")}, temperatures=[], lm_eval=["shop_pairs"])
        )
