"""Win rates beside benchmarks and other tools' figures, and the questions that a report answers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conversations import Conversation
from evaluation.costs import cost_cells, hours_text
from evaluation.harness import metrics_of
from evaluation.soundness import data_cells, findings
from evaluation.standing import changes_of, sentences, standing_cells
from report.differences import changed_share, marked
from report.outside import with_outside
from report.page import pushed_tokens, write_report
from settings.artifacts import write_json, write_jsonl


def benchmark(value: float, stderr: float | None, **more: Any) -> dict[str, Any]:
    return {"quiz": {"n": 100, "metrics": {"acc": {"value": value, "stderr": stderr, **more}}}}


def judged(rate: float, low: float, high: float) -> dict[str, Any]:
    found = {"win_rate": rate, "win_rate_ci95": [low, high], "by": "judge", "orders_disagreed": 3}
    return {**found, "wins": 7, "ties": 3, "losses": 0, "skipped": 1}


RESULTS: dict[str, Any] = {
    "opponent": "base",
    "models": {
        "base": {"score": 0.5, "ci95": [0.4, 0.6], "lm_eval": benchmark(0.6, 0.02), "folder": "nowhere"},
        "new": {"judged": judged(0.7, 0.6, 0.8), "lm_eval": benchmark(0.5, 0.03), "folder": "nowhere", "eot_rate": 0.5},
        "same": {"judged": judged(0.5, 0.4, 0.6), "lm_eval": benchmark(0.62, 0.02), "folder": "nowhere"},
    },
}


def test_a_judges_win_with_a_benchmarks_fall_is_seen_at_once() -> None:
    """0.1 apart with errors of 0.02 and 0.03: 0.036 together, so 2.8 of them."""
    head, base, new, same = standing_cells(RESULTS)
    assert head == ["model", "score", "judged win rate over base", "quiz acc"]
    assert base == ["base", "0.500 [0.400, 0.600]", "-", "0.600 ± 0.020"]
    assert new == ["new", "-", "0.700 [0.600, 0.800]", "0.500 ± 0.030 ▼"]
    assert same[-1] == "0.620 ± 0.020"
    assert sentences(RESULTS) == [
        "new wins over base (judge, 0.700 [0.600, 0.800]) and falls in quiz acc: 0.500 against 0.600 (difference "
        "-0.100, standard error 0.036).",
        "No benchmark tells same from base.",
    ]


def test_of_a_metric_with_less_as_better_a_higher_value_is_a_fall() -> None:
    less = {"higher_is_better": False}
    assert metrics_of({"ppl,none": 4.0, "ppl_stderr,none": 0.1}, {"ppl": False})["ppl"] == {
        "value": 4.0,
        "stderr": 0.1,
        **less,
    }
    models = {"base": {"lm_eval": benchmark(3.0, 0.1, **less)}, "new": {"lm_eval": benchmark(4.0, 0.1, **less)}}
    (change,) = changes_of({"models": models}, "new")
    assert change.kind == "falls" and changes_of({"models": models}, "base") == []
    models["new"]["lm_eval"] = benchmark(4.0, None)
    assert [change.kind for change in changes_of({"models": models}, "new")] == ["level"]
    assert standing_cells({"models": {"a": {"score": 0.5}, "b": {"score": 0.6}}, "opponent": None}) == []


def test_other_tools_figures_stand_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "alpaca_eval").mkdir()
    tool = {"win_rate": 66.0, "standard_error": 5.0, "length_controlled_winrate": 55.0, "n_total": 60}
    write_json(tmp_path / "alpaca_eval/tool.json", {"opponent": "base", "annotator": "x", "models": {"new": tool}})
    (tmp_path / "model_judgment/j").mkdir(parents=True)
    games = {
        "uid": "1",
        "judge": "j",
        "model": "new",
        "baseline": "base",
        "games": [{"score": "A>B"}, {"score": "A>B"}],
    }
    write_jsonl(tmp_path / "model_judgment/j/new.jsonl", [games])
    (tmp_path / "lm_eval").mkdir()
    outside = {
        "results": {"other": {"acc,none": 0.25, "acc_stderr,none": 0.1}},
        "n-samples": {"other": {"effective": 8}},
    }
    write_json(tmp_path / "lm_eval/new.json", outside)
    found = with_outside(tmp_path, RESULTS)
    head, base, new, _ = standing_cells(found)
    tools = ["AlpacaEval over base", "AlpacaEval, length-controlled over base", "Arena-Hard over base, by j"]
    assert head[3:6] == tools and head[-1] == "other acc"
    assert new[3:6] == ["0.660 [0.562, 0.758]", "0.550", "0.500 [0.500, 0.500]"] and new[-1] == "0.250 ± 0.100"
    assert base[3:6] == ["-"] * 3 and "outside" not in RESULTS["models"]["new"]
    write_jsonl(tmp_path / "model_judgment/j/new.jsonl", [{**games, "model": "misspelt"}])
    with pytest.raises(ValueError, match="judgments of 'misspelt', and evaluated base, new, same"):
        with_outside(tmp_path, RESULTS)


def run_of(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "config.yaml", config)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_a_models_cost_is_that_of_the_runs_that_it_came_from(tmp_path: Path) -> None:
    used = {"device": "cuda", "devices": 4, "seconds": 1800, "tokens": 1000}
    sft = run_of(tmp_path / "sft", {"task": "train"}, resources=used)
    generate = run_of(tmp_path / "gen", {"task": "generate", "model": {"load_from": str(sft)}}, summary={"tokens": 50})
    (generate / "generations.jsonl").write_text("")
    label = run_of(tmp_path / "lab", {"task": "label", "label": {"responses": str(generate / "generations.jsonl")}})
    (label / "LABEL").mkdir()
    write_json(label / "LABEL/summary.json", {"scored": 7})
    (label / "LABEL/labeled.jsonl").write_text("")
    data = {"local": {"train": str(label / "LABEL/labeled.jsonl")}}
    config = {"task": "train", "model": {"load_from": str(sft)}, "datasets": data}
    run = run_of(tmp_path / "dpo", config, resources={**used, "device": "cpu", "devices": 1, "seconds": 60})
    (run / "FINAL").mkdir()
    _, row = cost_cells({"dpo": {"folder": str(run / "FINAL")}, "hub": {"folder": "owner/name"}})
    assert row[0] == "dpo" and sorted(row[1].split(" + ")) == ["1.0 processor minutes", "2.00 GPU hours"]
    assert row[2:] == ["2,000", "50", "7", "4, 1 untimed"]
    assert hours_text({}) == "-" and cost_cells({"hub": {"folder": "owner/name"}}) == []


def test_held_out_prompts_in_training_rows_are_found(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "response": "x"} for i in range(3)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    run = run_of(tmp_path / "run", {"task": "train", "datasets": {"local": {"train": str(tmp_path / "train.jsonl")}}})
    held_out = [Conversation([{"role": "user", "content": c}], None, None, None, {}) for c in ("say  1", "new", "new")]
    cells = data_cells({"new": {"folder": str(run)}}, held_out)
    assert cells[1][1:] == ["new", "3", "1", "held out prompts were trained on"]
    said = findings(RESULTS, held_out, cells)
    assert said[:2] == [
        "3 held-out prompts, 1 of which repeat another one.",
        "1 of them stand in rows that a model was trained on: no held-out scores there.",
    ]
    assert "new: 50% of the responses were cut by evaluation.max_new_tokens." in said
    assert "same: the judge contradicted itself on 3 of 11 prompts." in said
    write_jsonl(tmp_path / "train.jsonl", [{"strange": 1}])
    assert "cannot tell the format" in data_cells({"new": {"folder": str(run)}}, held_out)[1][4]


def test_what_the_other_model_does_not_say_is_underlined() -> None:
    assert marked("a <b> d", "a c d") == "a <ins>&lt;b&gt;</ins> d" and marked("same", "same") == "same"
    rows = [{"prompt": "p", "model": name, "response": text} for name, text in (("base", "a b"), ("new", "a cc d"))]
    assert changed_share(rows, "new", "base") == pytest.approx(3 / 4)
    assert changed_share(rows[1:], "new", "base") is None
    assert marked("x " * 900, "y") == "x " * 900  # too long to compare: shown as it is


def test_a_report_is_headed_by_the_questions_of_its_reader(tmp_path: Path) -> None:
    samples = [{"prompt": "p", "model": name, "response": text} for name, text in (("base", "a b"), ("new", "a c"))]
    tokens = [{"text": "x", "advantage": 1.5, "top": []}, {"text": "y", "advantage": -2.0, "top": []}]
    advantages = [{"prompt": "p", "tokens": [*tokens, tokens[0]]}]
    assert pushed_tokens(advantages) == [("x", 2, 3.0), ("y", 1, -2.0)]
    more = {"cost": '<section id="spent"><h2>Spent</h2></section>'}
    said = {"who": sentences(RESULTS), "cost": ["new: 2.00 GPU hours."]}
    page = write_report(tmp_path, "t", {}, RESULTS, samples, advantages, more, said).read_text(encoding="utf-8")
    contents = re.search(r'<nav class="contents".*?</nav>', page, re.S).group(0)  # type: ignore[union-attr]
    assert re.findall(r'href="#(\w+)"', contents) == ["who", "cost", "changed", "teacher", "training"]
    assert all(page.count(f'id="{name}"') == 1 for name in ("who", "cost", "changed", "teacher", "training", "results"))
    for words in ("new: 2.00 GPU hours.", "falls in quiz acc", "50% of what new says", "Most up: &#x27;x&#x27; (+3.00"):
        assert words in contents
    assert "<h3>Spent</h3>" in page and "<ins>c</ins>" in page and "What base" not in contents
    assert json.dumps(RESULTS)  # nothing of it was changed into what JSON does not hold
