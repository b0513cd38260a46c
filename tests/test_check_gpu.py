"""scripts/check_gpu.sh: every row is there at the size of a test, and what needs a GPU says so where there is none."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.check_gpu import Step, checks, line
from benchmarks.check_parts import SCALES, Row, model_config
from tests.support.helpers import ROOT, begin


def test_a_row_has_the_tables_six_columns():
    assert line(Row("a", "skipped: b|c")) == "| a |  |  |  |  | skipped: b/c |"
    assert line(Row("a", "b", 0.5, 1234.0, 0.25, 2 * 10**9)) == "| a | 0.500 | 1,234 | 25.0% | 2.00 | b |"


def test_the_size_is_a_1b_models():
    build = model_config(SCALES["1b"].model).build
    assert (build["hidden_size"], build["num_hidden_layers"], build["vocab_size"]) == (2048, 16, 128256)


def test_a_dpo_step_starts_at_ln_2_from_its_own_reference():
    step = Step("dpo", SCALES["tiny"])
    assert step() == pytest.approx(0.6931472, abs=1e-5)
    assert step.flops() > 6 * sum(p.numel() for p in step.model.parameters())


def test_another_size_is_refused(tmp_path):
    log = tmp_path / "log.txt"
    process = begin(program="benchmarks/check_gpu.py", log=log, env={"CHECK_GPU_MODEL": "huge"})
    assert process.wait(timeout=120) == 1 and "CHECK_GPU_MODEL=huge" in log.read_text()


@pytest.mark.slow
def test_the_script_runs_here():
    done = subprocess.run(
        [str(ROOT / "scripts/check_gpu.sh")],
        env={**os.environ, "CHECK_GPU_MODEL": "tiny", "OMP_NUM_THREADS": "1", "VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {row.split("|")[1].strip(): row for row in done.stdout.splitlines() if row.startswith("|")}
    assert rows.keys() >= checks(SCALES["tiny"]).keys()
    for name in ("sft step", "generate by hf", "cache by hf"):
        assert "skipped" not in rows[name]
    if not torch.cuda.is_available():
        on_gpu = ("compile, sft step", "flash attention, forward", "generate by vllm", "cache by vllm")
        for name in (*on_gpu, "advantages by server", "advantages by vllm"):
            assert "skipped: no GPU here" in rows[name]
