"""The report: whole, self-contained, honest about intervals, and safe against what models write."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from evaluation.comparisons import best_model
from report.charts import panel_of, read_curves, ticks
from report.gather import Evaluation, samples_of
from report.page import write_report
from report.scores import results_section
from settings.artifacts import write_jsonl

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'single'\x00\ud800"


def entry(score: float, low: float, high: float) -> dict:
    return {
        "score": score,
        "ci95": [low, high],
        "n": 1000,
        "seeds": [1, 2],
        "per_seed": {"1": score, "2": score + 0.004},
        "greedy": {"score": 0.871, "ci95": [0.85, 0.891]},
    }


def written(folder: Path, nasty: str = NASTY) -> str:
    metrics = folder / "metrics.jsonl"
    rows = [
        {"step": s, "examples": s, "loss/train": 3.0 / s, "rewards_train/accuracies": 0.5, "lr": 1e-3}
        for s in range(1, 60)
    ]
    metrics.write_text(
        "".join(json.dumps(r) + "\n" for r in [*rows, {"step": 59, "loss/eval": 0.06}]) + '{"step": 60, "lo',
        encoding="utf-8",
    )
    top = [[nasty, 1.25, 0.4], ["</script>", -0.5, 0.1]]
    path = write_report(
        folder,
        f"run {nasty}",
        {"seed_1/dckd": metrics, "seed_2/dckd": metrics, f"adpa {nasty}": metrics, "gone": folder / "none.jsonl"},
        {"models": {f"student {nasty}": entry(0.123, 0.1, 0.15), "teacher_dpo": entry(0.612, 0.58, 0.64)}},
        [
            {"prompt": f"say {nasty}", "model": "student", "response": nasty, "score": 0.0},
            {"prompt": f"say {nasty}", "model": "teacher_dpo", "response": "fine", "score": 1.0},
        ],
        [
            {
                "prompt": nasty,
                "tokens": [{"text": nasty, "advantage": 1.25, "top": top}, {"text": "b", "advantage": None, "top": []}],
            }
        ],
    )
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_what_models_write_is_escaped_everywhere(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert "<script>alert" not in page and "<img" not in page and "\x00" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    # One element of data, one of code, and nothing that ends them early.
    assert len(re.findall(r"<script", page)) == len(re.findall(r"</script>", page)) == 2
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    assert data[0][1][0] == "</script>" and data[0][0][1:] == [1.25, 0.4]


def test_the_report_asks_for_nothing_outside_itself(tmp_path: Path) -> None:
    page = written(tmp_path, nasty="plain")
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"<script>.*?</script>", "", page, flags=re.S), re.I)
    assert not re.search(r"(src|srcset|data|action)\s*=\s*[\"']", page) and "@import" not in page and "url(" not in page
    sections = {"#results", "#curves", "#responses", "#pushed", "#advantages"}
    assert set(re.findall(r'href="([^"]*)"', page)) == {*sections, "#who", "#changed", "#teacher", "#training"}
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_the_table_holds_every_number_and_marks_what_separates(tmp_path: Path) -> None:
    page = written(tmp_path)
    table = re.search(r'<table class="results">.*?</table>', page, re.S).group(0)  # type: ignore[union-attr]
    for value in (
        "0.123",
        "[0.100, 0.150]",
        "0.612",
        "[0.580, 0.640]",
        "0.871",
        "[0.850, 0.891]",
        "1000",
        "0.127",
        "0.616",
    ):
        assert value in table
    assert table.count("separated") == 1 and "✓ right" in page and "✗ wrong" in page


def test_nothing_is_best_where_intervals_touch() -> None:
    assert best_model({"a": entry(0.5, 0.4, 0.6), "b": entry(0.7, 0.6, 0.8)}) is None
    assert best_model({"a": entry(0.5, 0.4, 0.6), "b": entry(0.7, 0.61, 0.8)}) == "b"
    assert best_model({"a": entry(0.5, 0.4, 0.6)}) is None
    assert best_model({"a": entry(0.5, 0.4, 0.6), "b": {"score": 0.9}}) is None


def test_with_several_seeds_the_interval_over_seeds_decides(tmp_path: Path) -> None:
    low, high = entry(0.5, 0.48, 0.52), entry(0.7, 0.68, 0.72)
    assert best_model({"a": low, "b": high}) == "b"
    low["ci95_over_seeds"], high["ci95_over_seeds"] = [0.3, 0.7], [0.5, 0.9]
    assert best_model({"a": low, "b": high}) is None
    pair = {"first": "b<i>", "second": "a", "difference": 0.2, "ci95": [0.17, 0.23], "ci95_over_seeds": [-0.1, 0.5]}
    page = write_report(tmp_path, "x", {}, {"models": {"a": low, "b": high}, "comparisons": [pair]}, [], []).read_text(
        encoding="utf-8"
    )
    assert "[0.500, 0.900]" in page and "b&lt;i&gt; − a" in page and "[−0.100, +0.500]" in page and "holds 0" in page


def test_curves_of_a_stage_share_a_panel_over_seeds_and_torn_rows_are_said(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert "2 seeds" in page and "1 unreadable row(s) left out" in page and "no file none.jsonl" in page
    assert panel_of("loss/eval") == ("loss", "eval")
    assert panel_of("rewards_train/accuracies") == ("rewards/accuracies", "train")
    assert panel_of("grad_norm") == ("grad_norm", "train")
    metrics = tmp_path / "nan.jsonl"
    metrics.write_text('{"step": 1, "loss/train": NaN}\n{"step": 2, "loss/train": 1.0}\n', encoding="utf-8")
    assert read_curves(metrics).points == {"loss/train": [(2.0, 1.0)]}


def test_what_is_held_out_shares_an_axis_with_what_it_is_of(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss/train": 0.2, "nll_train/chosen": 0.5}, {"step": 1, "nll_eval/chosen": 0.6}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = write_report(tmp_path, "x", {"adpa": metrics}, {}, [], []).read_text(encoding="utf-8")
    assert "<b>loss</b><span>train 0.2</span>" in page
    assert "<b>nll/chosen</b><span>train 0.5 · held out 0.6</span>" in page


def test_an_empty_run_still_gives_a_report(tmp_path: Path) -> None:
    page = write_report(tmp_path / "new", "empty", {}, {}, [], []).read_text(encoding="utf-8")
    assert page.count("No ") >= 4 and "</html>" in page
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-3.0, 470.0) == [0.0, 200.0, 400.0]
    assert ticks(2.0, 2.0) == [2.0]
    assert len(ticks(1e-7, 3e-7)) in (4, 5)


@pytest.mark.slow
def test_the_report_opens_in_a_browser_and_its_script_runs(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    written(tmp_path)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    profile, address = f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'report.html'}"
    command = [chromium, *flags, profile, "--virtual-time-budget=2000"]
    dom = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True)
    # Set by the script alone, which so passed the page's own policy: arrow keys, not Tab, go on within a response.
    assert 'tabindex="-1"' in dom.stdout and 'id="read"' in dom.stdout
    assert "Content Security Policy" not in dom.stderr and "Uncaught" not in dom.stderr
    picture = tmp_path / "report.png"
    shot = [*command, "--window-size=1280,2400", f"--screenshot={picture}", address]
    subprocess.run(shot, capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 20_000


def test_a_response_may_hold_any_line_separator(tmp_path: Path) -> None:
    row = {"prompt": "p", "temperature": 1.0, "responses": {"m": "a\u2028b\u0085c"}, "scores": {}}
    write_jsonl(tmp_path / "samples.jsonl", [row])
    found = samples_of(Evaluation(tmp_path, 1, {}, {}))
    assert [sample["response"] for sample in found] == ["a\u2028b\u0085c"]


def test_the_panels_of_a_report_are_figures(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write_jsonl(metrics, [{"step": step, "loss/train": 1.0 / step} for step in (1, 2, 3)])
    page = write_report(tmp_path, "t", {"run": metrics}, {"models": {}}, [], []).read_text(encoding="utf-8")
    assert page.count("<figure class") == page.count("</figure>") > 0


def test_a_judge_alone_leaves_no_empty_table_of_scores() -> None:
    judged = results_section({"models": {"a": {"win_rate": 0.6}, "b": {"win_rate": 0.4}}})
    assert "Nobody scored single responses" in judged and "<table" not in judged
    scored = results_section({"models": {"a": {"score": 0.6, "n": 3}, "b": {"win_rate": 0.4}}})
    assert "Nobody scored" not in scored and "<table" in scored
