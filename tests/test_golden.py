"""Golden numbers of independent implementations hold for our functions, and the runner notices a wrong number."""

import json
from pathlib import Path

from tests.golden.__main__ import run_folder
from tests.golden.coverage import LOSS_CASES
from tests.support.helpers import ROOT, begin

CASES = ROOT / "tests" / "golden" / "cases"


def test_every_golden_number_of_a_built_method_holds():
    tally = run_folder(CASES)
    assert not tally.failures, "\n".join(tally.failures)
    assert len(tally.passed) == 388
    assert all(
        reason.startswith(("quirk", "method not built yet", "not a method", "not one of ours"))
        for reason in tally.skipped
    ), tally.skipped


def test_every_loss_has_golden_numbers_that_passed():
    passed = set(run_folder(CASES).passed)
    for name in sorted(path.stem for path in (ROOT / "config" / "loss").glob("*.yaml")):
        assert LOSS_CASES.get(name), f"{name} has no golden numbers: name them in tests/golden/coverage.py"
        assert set(LOSS_CASES[name]) <= passed, f"{name}: {set(LOSS_CASES[name]) - passed} did not pass"


def test_a_wrong_number_fails_and_sets_the_exit_code(tmp_path: Path):
    cases, log = tmp_path / "cases", tmp_path / "log.txt"
    cases.mkdir()
    case = json.loads((CASES / "D_adpa_margin_seed161.json").read_text())
    variant = next(v for v in case["variants"] if v["name"] == "adpa_unclamped")
    variant["outputs"]["grad_student_logits"]["data"][60] += 1e-6
    (cases / "D_adpa_margin_seed161.json").write_text(json.dumps(case))
    assert begin(str(cases), program="tests/golden/__main__.py", log=log, error=tmp_path / "error.txt").wait(120) == 1
    printed = log.read_text()
    assert "grad_student_logits" in printed and "1 failed" in printed.splitlines()[-1]
