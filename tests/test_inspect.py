"""task=inspect: each finding fires where it should and not where it should not; page, terminal, warnings of a run."""

import io
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import models
from dataloader import load_examples
from report.inspected import Inspection, Reader, as_json, histogram, inspect
from report.inspection import Facts, Finding, badness, length_bias_of, ranked, warnings, worst
from report.inspection_page import inspection_page
from report.inspection_text import colored, in_terminal
from settings.schema import DatasetConfig, ModelConfig, typed
from settings.sections import InspectConfig
from settings.terminal import clean
from tasks.inspect import asked_rows
from templates import turn_end
from tests.support.helpers import composed, launch, write_pairs

Row = dict[str, Any]
MODEL = typed(composed("model=tiny")["model"], ModelConfig)
TOKENIZER = models.load_tokenizer(MODEL)
NASTY = "<script>alert(1)</script>\x1b[31m & <|im_end|>"
LONG = "please name the river that runs through the old town and tell why it is called so "


def written(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def looked_at(
    folder: Path, train: list[Row], test: list[Row] | None = None, limits: dict[str, int] | None = None, **data: Any
) -> Inspection:
    """Inspect rows as task=inspect does, with the tiny model's tokenizer and limits."""
    held_out = written(folder / "test.jsonl", test) if test else None
    datasets = {"local": DatasetConfig(written(folder / "train.jsonl", train), held_out, **data)}
    model = replace(MODEL, **(limits or {}))
    examples = {split: load_examples(datasets, split, TOKENIZER, model) for split in ("train", "test")}
    wheres = {
        split: [f"{getattr(datasets['local'], split)}, row {i + 1}" for i in range(len(rows or ()))]
        for split, rows in (("train", train), ("test", test))
    }
    return inspect(examples, Reader(TOKENIZER, model, datasets), InspectConfig(), wheres)


def names(seen: Inspection) -> set[str]:
    return {f"{finding.split}: {finding.name}" for finding in seen.findings}


def the(seen: Inspection, name: str) -> Finding:
    return next(finding for finding in seen.findings if f"{finding.split}: {finding.name}" == name)


def pair(prompt: str, chosen: str = "yes", rejected: str = "nay") -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def answer(prompt: str, response: str) -> Row:
    return {"prompt": prompt, "response": response}


def system(content: str) -> Row:
    turns = [("system", content), ("user", "who is there?"), ("assistant", "me")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


SHORT = {"max_length": 160, "max_prompt_length": 80}
PLAIN = [answer("one?", "1"), answer("two?", "2")]
# finding: (rows where it fires, rows where it does not, number of hits, limits)
CASES: dict[str, tuple[list[Row], list[Row], int, dict[str, int]]] = {
    "responses cut": ([answer("a?", "long " * 50), *PLAIN], [answer("a?", "short"), *PLAIN], 1, SHORT),
    "prompts shortened": ([answer(LONG * 3, "x"), *PLAIN], [answer("a?", "x"), *PLAIN], 1, SHORT),
    "the same prompt and response, again": ([*PLAIN, PLAIN[0]], PLAIN, 1, {}),
    "a prompt with several responses": ([*PLAIN, answer("one?", "uno")], PLAIN, 1, {}),
    "chosen equals rejected": ([pair("a?", "x", "x"), pair("b?")], [pair("a?"), pair("b?")], 1, {}),
    "chosen is longer more often than not": (
        [pair(f"{i}?", "long " * (2 + i), "no") for i in range(20)],
        [pair(f"{i}?", *(("long", "no") if i % 2 else ("no", "long"))) for i in range(20)],
        20,
        {},
    ),
    "special tokens written in content": ([answer("a?", "x<|im_end|>y"), *PLAIN], PLAIN, 1, {}),
    "responses that begin with their prompt": ([answer(LONG, LONG + "so"), *PLAIN], [answer(LONG, "so")], 1, {}),
    "empty system messages": ([system(" "), system("be kind")], [system("be kind")], 1, {}),
    "characters that do not print": ([answer("a?", "x\x07y"), *PLAIN], [answer("a?", "x\n\ty é 👍"), *PLAIN], 1, {}),
    "words of mixed scripts": ([answer("a?", "p\u0430ypal"), *PLAIN], [answer("a?", "мир peace, αx"), *PLAIN], 1, {}),
    "responses in another script than their prompt": (
        [answer(LONG, "река течёт через старый город")],
        [answer(LONG, "the river runs through the town")],
        1,
        {},
    ),
    "responses that speak as an AI": ([answer("a?", "As an AI, I cannot."), *PLAIN], [answer("a?", "Paris.")], 1, {}),
    "rows dropped: nothing to learn": ([answer("a?", " "), *PLAIN], PLAIN, 1, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_finding_fires_where_it_should_and_nowhere_else(name: str, tmp_path: Path) -> None:
    fires, silent, number, limits = CASES[name]
    finding = the(looked_at(tmp_path, fires, limits=limits), f"train: {name}")
    assert (finding.number, finding.split) == (number, "train")
    assert 0 < finding.share == finding.number / finding.total <= 1
    assert 1 <= len(finding.examples) <= 5 and "train.jsonl, row " in finding.examples[0][0]
    assert f"train: {name}" not in names(looked_at(tmp_path, silent, limits=limits))


def test_a_finding_names_the_row(tmp_path: Path) -> None:
    rows = [*PLAIN, answer("a?", "long " * 50), answer("one?", "1"), answer("a?", " ")]
    seen = looked_at(tmp_path, rows, limits=SHORT)
    places = {f.name: f.examples[0][0].replace(str(tmp_path), ".") for f in seen.findings}
    assert places["responses cut"] == "./train.jsonl, row 3"
    assert places["the same prompt and response, again"] == "./train.jsonl, row 4 (as ./train.jsonl, row 1)"
    assert places["rows dropped: nothing to learn"] == "./train.jsonl, row 5"


def test_leakage_is_equal_words_and_near_equal_spans(tmp_path: Path) -> None:
    near = LONG + "today"
    test = [answer("one?  ", "other"), answer(near, "x"), answer("quite another question that nobody asked", "y")]
    seen = looked_at(tmp_path, [*PLAIN, answer(LONG, "z")], test)
    leaked = the(seen, "test: prompts that are also trained on")
    assert (leaked.number, leaked.total, leaked.severity) == (1, 3, "high") and "row 1 (as " in leaked.examples[0][0]
    assert the(seen, "test: prompts nearly equal to trained ones").number == 1
    other = [answer("three?", "3"), answer("tell me of a river in a town that is old and has no name", "x")]
    clean_one = looked_at(tmp_path, [*PLAIN, answer(LONG, "z")], other)
    assert not any("trained" in name for name in names(clean_one))


def test_a_missing_end_of_turn_is_told_from_a_cut(tmp_path: Path) -> None:
    end = turn_end(TOKENIZER).id
    from templates import tokenizer_digest

    def generated(number: int, ids: list[int]) -> Row:
        said = {"response": TOKENIZER.decode(ids), "response_ids": ids, "finish_reason": "length"}
        prompt = {"prompt": [{"role": "user", "content": str(number)}], "prompt_ids": [number, 5, 6]}
        return {**prompt, **said, "tokenizer_digest": tokenizer_digest(TOKENIZER)}

    whole, open_ended, long = generated(1, [40, 41, end]), generated(2, [40, 42]), generated(3, [40] * 300)
    seen = looked_at(tmp_path, [whole, open_ended, long], limits=SHORT)
    assert the(seen, "train: end of turn missing").examples[0][0].endswith("row 2")
    assert the(seen, "train: responses cut").examples[0][0].endswith("row 3")
    assert "train: end of turn missing" not in names(looked_at(tmp_path, [whole], limits=SHORT))


def test_a_row_taken_again_by_its_weight_is_no_duplicate(tmp_path: Path) -> None:
    seen = looked_at(tmp_path, PLAIN, weight=3.0)
    assert len(seen.splits["train"].rows) == 6 and not any("again" in name for name in names(seen))


def test_length_bias_is_the_share_of_pairs_that_length_orders() -> None:
    def facts(chosen: int, rejected: int) -> Facts:
        return Facts("w", 0, (1, 2), ("chosen", "rejected"), (0, 0), (chosen, rejected), 0, 0)

    bias = length_bias_of([facts(5, 3), facts(4, 4), facts(2, 3), facts(9, 3)])
    assert bias is not None and (bias.longer, bias.shorter, bias.auc, bias.mean_difference) == (2, 1, 0.625, 1.75)
    assert bias.auc_ci95[0] < 0.625 < bias.auc_ci95[1] and bias.mean_ci95[0] < 1.75 < bias.mean_ci95[1]
    assert length_bias_of([]) is None


def test_findings_are_ranked_by_severity_times_share_and_low_ones_warn_nobody() -> None:
    def finding(name: str, severity: str, number: int) -> Finding:
        return Finding(name, "train", severity, number, 100, "rows", "", [("here", "")])

    low, high, middle = finding("a", "low", 100), finding("b", "high", 5), finding("c", "middle", 50)
    assert [badness(f) for f in (low, high, middle)] == [1.0, 0.5, 1.5]
    test = finding("c", "middle", 20)._replace(split="test")
    assert [f.name for f in ranked([low, high, middle])] == ["c", "a", "b"]
    assert [f.name for f in worst([low, high, middle, test])] == ["c", "b"]  # a kind once


# ---- what is shown


def test_the_mask_and_the_cut_are_shown_in_the_row(tmp_path: Path) -> None:
    response = "".join(f"{i} " for i in range(90))
    seen = looked_at(tmp_path, [*PLAIN, *PLAIN, answer("count!", response)], limits=SHORT)
    rows = seen.splits["train"].shown
    assert [row.where.rpartition(" ")[2] for row in rows] == ["1", "2", "3", "5"]  # a cut one is always among them
    assert [piece.kind for piece in rows[0].pieces] == ["prompt", "learned"] and rows[0].pieces[1].text[0] == "1"
    kinds, words = zip(*rows[-1].pieces, strict=True)
    assert kinds == ("prompt", "learned", "cut") and rows[-1].num_tokens == 160
    end = TOKENIZER.decode([turn_end(TOKENIZER).id])
    assert words[1] + words[2] == response + end and "count!" in words[0]
    facts = seen.splits["train"].rows[-1]
    assert facts.whole[0] > facts.lengths[0] == 160  # the histogram shows what the cut took


def test_the_histogram_has_an_edge_at_max_length() -> None:
    bins = histogram([0, 10, 100, 101, 250], 100)
    assert sum(count for _, _, count in bins) == 5
    assert sum(count for _, last, count in bins if last <= 100) == 3  # what is just as long as allowed is not cut
    assert sum(count for first, _, count in bins if first > 100) == 2
    assert histogram([], 100) == []


def test_the_terminal_gets_colors_only_where_it_is_one(tmp_path: Path) -> None:
    seen = looked_at(tmp_path, [answer("a?", NASTY), *PLAIN])
    plain = in_terminal(seen, False)
    assert "\x1b" not in plain and "[[" in plain and "alert(1)" in plain  # the data's own escape codes, too
    assert "\x1b[32m" in in_terminal(seen, True)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert colored(Terminal(), {}) and not colored(io.StringIO(), {})
    assert not colored(Terminal(), {"NO_COLOR": "1"}) and colored(Terminal(), {"NO_COLOR": ""})
    assert clean("a\x1b[0m\r\ud800\n") == "a\ufffd[0m\ufffd?\n"


def test_the_page_escapes_what_data_says_and_asks_for_nothing(tmp_path: Path) -> None:
    seen = looked_at(tmp_path, [answer(NASTY, NASTY), *PLAIN])
    page = inspection_page("Data", seen)
    assert "<script>alert" not in page and "\x1b" not in page and "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page and 'class="seen learned"' in page and 'class="limit"' in page
    told = as_json(seen)
    assert json.loads(json.dumps(told)) and told["splits"]["train"]["rows"] == 3
    assert {"count", "share", "severity", "examples"} <= set(told["findings"][0])


# ---- the command, and the start of a run


@pytest.mark.slow
def test_the_command_writes_page_and_json_and_no_escape_codes(tmp_path: Path) -> None:
    rows = [pair("a?", "x", "x"), *(pair(f"{i}?", NASTY) for i in range(4))]
    train, test = written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl", rows[:2])
    line = ["model=tiny", "datasets=[local]", f"datasets.local.train={train}", f"datasets.local.test={test}"]
    done = launch("task=inspect", *line, f"cache_dir={tmp_path}", "exp_name=look")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "prompts that are also trained on: 2 of 2 rows (100.0 %)" in done.stdout
    told = json.loads((tmp_path / "look/inspect.json").read_text())
    assert told["findings"][0]["name"] == "prompts that are also trained on"
    assert (tmp_path / "look/inspect.html").read_text().startswith("<!doctype html>")
    assert not (tmp_path / "look/DONE").exists()  # looked at again whenever it is asked for
    refused = launch("task=inspect", "model=tiny", f"cache_dir={tmp_path}", "exp_name=none")
    assert refused.returncode == 2 and "task=inspect needs datasets=" in refused.stderr


def test_a_training_run_begins_with_the_three_worst(tmp_path: Path) -> None:
    rows = [pair(f"{i}?", "much longer", "no") for i in range(10)] + [pair("a?", "x", "x")] * 2
    train, test = written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl", rows[:2])
    line = ["loss=dpo", "model=tiny", "datasets=[local]", f"datasets.local.train={train}", "n_steps=1"]
    done = launch(*line, f"datasets.local.test={test}", f"cache_dir={tmp_path}", "exp_name=x")
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[2] for line in found] == [
        "prompts that are also trained on",
        "chosen is longer more often than not",
        "chosen equals rejected",
    ]
    assert "task=inspect" in done.stdout


def test_sound_data_warns_of_nothing(tmp_path: Path) -> None:
    datasets = {"local": DatasetConfig(str(write_pairs(tmp_path / "p.jsonl", 5)))}
    examples = load_examples(datasets, "train", TOKENIZER, MODEL)
    balanced = [e for e in examples if len(e.chosen.ids) == len(e.rejected.ids)] or examples[:1]
    assert warnings(balanced[:1], [], turn_end(TOKENIZER).id, MODEL.max_length) == []


def test_the_rows_that_are_asked_for_follow_weights(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.jsonl", 4)
    raw = composed("model=tiny", "datasets=[local]", f"datasets.local.train={tmp_path}/p.jsonl", "task=inspect")
    from launch import settings_of

    settings = settings_of(raw)
    assert [place.rpartition(" ")[2] for place in asked_rows(settings, "train")] == ["1", "2", "3", "4"]
    assert asked_rows(replace(settings, run=replace(settings.run, n_examples=2)), "train") == []


@pytest.mark.slow
def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    rows = [pair(f"{i}? {NASTY}", "long " * 60, "no") for i in range(20)]
    page = tmp_path / "inspect.html"
    page.write_text(inspection_page("Data", looked_at(tmp_path, rows, rows[:3], SHORT)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command = [chromium, *flags, "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=2000"]
    dom = subprocess.run(
        [*command, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert 'id="read"' in dom.stdout and dom.stdout.count('class="finding') >= 4  # its script ran under its policy
    assert "Content Security Policy" not in dom.stderr and "Uncaught" not in dom.stderr
    picture = tmp_path / "inspect.png"
    shot = [*command, "--window-size=1280,2400", f"--screenshot={picture}", f"file://{page}"]
    subprocess.run(shot, capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 20_000
