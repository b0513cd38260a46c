"""AlpacaEval's own tool on the files that task=evaluate writes, against a judge on loopback, without any hub.

The tool runs in the interpreter that ALPACA_EVAL_PYTHON names (default: that of ./install.sh --alpaca-eval):
ALPACA_EVAL_PYTHON=/path/to/python .venv/bin/python -m pytest -m slow tests/test_alpaca_eval.py
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

import launch
from tests.support.chat_judge import ChatJudge
from tests.support.helpers import ROOT, composed

PYTHON = os.environ.get("ALPACA_EVAL_PYTHON", str(ROOT / ".alpaca_eval/bin/python"))
SEARCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('alpaca_eval') is None)"
THERE = Path(PYTHON).is_file() and subprocess.run([PYTHON, "-c", SEARCH], check=False).returncode == 0
needs_tool = pytest.mark.skipif(
    not THERE, reason=f"{PYTHON} has no alpaca_eval: ./install.sh --alpaca-eval, or set ALPACA_EVAL_PYTHON"
)
SURE = 0.9  # the judge's chance for the answer that it prefers
PROMPTS = [*(f"say {i}" for i in range(38)), "say 0", "say 1"]  # two of them stand twice


def mostly_the_longer(first: str, second: str) -> float:
    """Prefer the longer answer in three of four pairs, whichever stands first; of equally long ones the smaller."""
    (shorter, longer) = sorted((first, second), key=lambda text: (len(text), text))
    odd = hashlib.sha256(f"{shorter}|{longer}".encode()).digest()[0] < 64
    return SURE if (first == longer) != odd else 1 - SURE


def evaluated(folder: Path, judge: ChatJudge) -> Path:
    """Run task=evaluate on two tiny models, b a little longer-winded than a, with the judge; return the run."""
    (folder / "test.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for name, said in (("a", "ha"), ("b", "ha ha")):
        rows = [{"prompt": f"say {i}", "response": f"{said} " * (1 + i % 3)} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = [f"datasets.local.train={folder}/{name}.jsonl", f"cache_dir={folder}", f"exp_name={name}"]
        launch.run_task(composed("model=tiny", "datasets=[local]", *data, "n_steps=15", "lr=3e-3", "loss=sft"))
    models = [f"+evaluation.models.{name}={folder}/{name}/FINAL" for name in "ab"]
    asked = ["evaluation.opponent=a", "evaluation.judge=true", f"judge.base_url={judge.url}"]
    sampled = ["evaluation.temperatures=[1.0]", "evaluation.max_new_tokens=16"]
    run = ["task=evaluate", "model=tiny", "datasets=[local]", f"datasets.local.test={folder}/test.jsonl"]
    run += [f"cache_dir={folder}", "exp_name=judged"]
    launch.run_task(composed(*run, *models, *asked, *sampled))
    return folder / "judged"


def tool(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the tool on a run; the hub is out of reach."""
    command = [PYTHON, str(ROOT / "scripts/run_alpaca_eval.py"), str(run), *more]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=variables, check=False)


@pytest.mark.slow
@needs_tool
def test_the_tool_reads_our_files_and_finds_our_win_rate(tmp_path: Path) -> None:
    """The same judge is asked in both ways: the tool's rates follow from our points, its rounded one is ours."""
    judge = ChatJudge(mostly_the_longer)
    run = evaluated(tmp_path, judge)
    ours = json.loads((run / "results.json").read_text())["models"]["b"]["judged"]
    before = len(judge.asked)
    done = tool(run, "--base-url", judge.url)
    judge.close()
    assert done.returncode == 0, done.stderr[-2000:]
    asked = judge.asked[before:]
    assert asked and all("model_identifier" in question for question in asked), "the tool asks with its own prompt"
    found = json.loads((run / "alpaca_eval/tool.json").read_text())
    row = found["models"]["b"]
    assert found["annotator"] == "weighted_alpaca_eval_gpt4_turbo asking loopback-judge"
    assert row["n_total"] == len(PROMPTS) and ours["orders_disagreed"] == 0
    assert row["discrete_win_rate"] == pytest.approx(100 * ours["win_rate"])
    assert row["win_rate"] == pytest.approx(100 * (1 - SURE + (2 * SURE - 1) * ours["win_rate"]))
    # Ours is over tokens and with its own penalty; both take the advantage of length away.
    assert row["length_controlled_winrate"] < row["win_rate"] - 1
    assert ours["length_controlled_win_rate"] < ours["win_rate"] - 0.01
    assert f"b: win rate {row['win_rate']:.2f} of {len(PROMPTS)}" in done.stdout


@pytest.mark.slow
@needs_tool
def test_what_cannot_be_judged_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"opponent": null, "models": {"a": {}, "b": {}}}')
    done = tool(tmp_path, "--base-url", "http://127.0.0.1:9/v1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("the opponent is None: give --opponent, one of a, b")
