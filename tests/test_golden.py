"""Golden numbers of independent implementations hold for our functions, and the runner notices a wrong number."""

import json
import subprocess
import sys
from pathlib import Path

from tests.golden.__main__ import run_folder
from tests.helpers import ROOT

CASES = ROOT / "tests" / "golden" / "cases"


def test_every_golden_number_of_a_built_method_holds():
    tally = run_folder(CASES)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.passed == 55
    assert all(reason.startswith(("quirk", "method not built yet")) for reason in tally.skipped), tally.skipped


def test_a_wrong_number_fails_and_sets_the_exit_code(tmp_path: Path):
    case = json.loads((CASES / "D_adpa_margin_seed161.json").read_text())
    variant = next(v for v in case["variants"] if v["name"] == "adpa_unclamped")
    variant["outputs"]["grad_student_logits"]["data"][60] += 1e-6
    (tmp_path / "D_adpa_margin_seed161.json").write_text(json.dumps(case))
    run = subprocess.run([sys.executable, "-m", "tests.golden", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert "grad_student_logits" in run.stdout and "1 failed" in run.stdout.splitlines()[-1]
