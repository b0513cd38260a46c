"""The artifacts of task=evaluate: summary.md, latency.json, and a report.html that a real browser renders."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from engine import export
from evaluation.asked import held_out
from evaluation.harness import metrics_of
from evaluation.latency import WARMUP, Timing, batches_of, hf_timed, timing_metrics
from report.evaluation_page import advantages_in
from report.gather import Evaluation, advantages_of
from report.page import write_report
from report.questions import ASKED
from report.tables import benchmarks_section, latency_section, metric_sections
from settings.artifacts import mark_done
from settings.schema import Settings, settings_from
from tasks import evaluate, report
from teacher.cache import Meta, Writer, finish
from tests.support.evaluations import shop_evaluation
from tests.support.helpers import composed
from worlds import shop


def settings_for(folder: Path, name: str, **evaluation: Any) -> Settings:
    """Return the settings of an evaluation of the shop's held-out pairs."""
    own = {"max_new_tokens": 12, "batch_size": 8, **evaluation}
    return shop_evaluation(folder, f"exp_name={name}", "model.eval_batch_size=8", **own)


def advantage_cache(folder: Path, tokenizer: Any, quantity: str = "advantage", first: float = 1.25) -> Path:
    """Write a cache of one sequence: three prompt tokens, two of a response, two entries each."""
    advantage = quantity == "advantage"
    meta = Meta(
        quantity=quantity,
        k=2,
        vocab_size=len(tokenizer),
        teacher_digest="t",
        reference_digest="r" if advantage else None,
        tokenizer_digest="",
        template_digest="",
        data_digest="",
        precision="",
    )
    said = tokenizer("order kiwis").input_ids[:2]
    entries = {"ids": [[said[0], 5], [6, 7]], "values": [[first, -0.5], [0.25, 0.5]], "tail": [0.0, 0.0]}
    writer = Writer(folder, meta)
    logps = {"teacher_logps": [[-0.5, -2.0], [-1.0, -1.5]]} if advantage else {}
    arrays = {name: np.array(values) for name, values in (entries | logps).items()}
    writer.add([8, 9, 10, *said], [False] * 3 + [True] * 2, arrays)
    writer.close()
    finish(folder, meta, writer.keys)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold an evaluation of two models with everything on, and what it read."""
    folder = tmp_path_factory.mktemp("artifacts")
    rows = shop.generate(1)["pairs_test.jsonl"][:10]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = settings_for(folder, "x").model
    tokenizer = models.load_tokenizer(config)
    for seed, name in enumerate(("a", "b")):
        export.save_model(
            models.load_model(replace(config, build_seed=seed), trainable=False), tokenizer, folder / name
        )
    cache = advantage_cache(folder / "CACHE", tokenizer)
    evaluate.run(
        settings_for(
            folder,
            "e",
            models={"a": str(folder / "a"), "b": str(folder / "b")},
            verifier="worlds.shop:check",
            reward_accuracy=True,
            latency=True,
            latency_batch_sizes=[1, 4],
            latency_new_tokens=5,
            latency_repetitions=3,
            advantages=str(cache),
        )
    )
    return folder


def test_the_results_hold_text_statistics_and_all_pairs(folder: Path) -> None:
    results = json.loads((folder / "e/results.json").read_text())
    for row in results["models"].values():
        for one in (row, row["greedy"]):
            assert 0 <= one["refusal_rate"] <= 1 and 0 <= one["loop_rate"] <= 1
            assert 1 <= one["p50_response_tokens"] <= one["p95_response_tokens"] <= 12
    for key in ("comparisons", "greedy_comparisons"):
        (pair,) = results[key]
        assert {pair["first"], pair["second"]} == {"a", "b"} and pair["p_holm"] == pair["p"] and pair["n"] == 10
    table = (folder / "e/results.md").read_text()
    summary = (folder / "e/summary.md").read_text()
    assert table in summary and "▲" not in table  # two untrained models: nothing to tell apart
    assert "## Differences on the same prompts\n" in summary and "## Latency\n" in summary


def test_the_report_of_an_evaluation_is_written_again_with_what_other_tools_put_there(folder: Path) -> None:
    """task=report sweep=RUN: its own pages, not those of a sweep of one run; results.json stays as it was."""
    run = folder / "e"
    before = {name: (run / name).read_bytes() for name in ("results.json", "results.md", "report.html")}
    row = {"acc,none": 0.25, "acc_stderr,none": 0.1}
    (run / "lm_eval").mkdir()
    (run / "lm_eval/b.json").write_text(json.dumps({"results": {"quiz": row}, "n-samples": {"quiz": {"effective": 9}}}))
    (run / "config.yaml").write_text(json.dumps(composed("task=evaluate", f"evaluation.advantages={folder / 'CACHE'}")))
    mark_done(run)
    report.run(settings_from(composed("task=report", f"sweep={run}")))
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "0.250 ± 0.100" in html and html.count('class="question"') == 6
    assert "| b | quiz | acc | 0.250 |" in (run / "summary.md").read_text()
    assert all((run / name).read_bytes() == before[name] for name in ("results.json", "results.md"))
    for name in ("lm_eval/b.json", "config.yaml", "DONE"):
        (run / name).unlink()
    assert re.findall(r'<div class="question" id="(\w+)"', before["report.html"].decode()) == list(ASKED)


def test_latency_says_what_was_timed(folder: Path) -> None:
    timed = json.loads((folder / "e/latency.json").read_text())
    assert set(timed) == {"a", "b"} and [row["batch_size"] for row in timed["a"]] == [1, 4]
    settings = settings_for(folder, "x")
    lengths = [len(row.prompt) for row in held_out(settings, models.load_tokenizer(settings.model)).prompts]
    for row in timed["a"]:
        assert (row["backend"], row["dtype"], row["new_tokens"], row["repetitions"], row["warmup"]) == (
            "hf",
            "float32",
            5,
            3,
            WARMUP,
        )
        assert row["device"] and row["peak_memory_bytes"] > 1e5
        assert min(lengths) <= row["prompt_tokens"]["min"] <= row["prompt_tokens"]["max"] <= max(lengths)
        assert 0 < row["first_token_ms"]["p50"] <= row["first_token_ms"]["p95"]
        # The speed over all batches is the harmonic mean of theirs, which is never above the mean.
        overall = 1e3 * row["batch_size"] / row["token_ms"]["mean"]
        assert 0 < overall <= row["decode_tokens_per_second"]["mean"] * (1 + 1e-9)


def test_a_timed_batch_reads_real_prompts_once_and_then_a_token_a_step(folder: Path) -> None:
    settings = settings_for(folder, "x")
    tokenizer = models.load_tokenizer(settings.model)
    model: Any = models.load_model(settings.model, trainable=False)
    prompts = [example.prompt for example in held_out(settings, tokenizer).prompts[:3]]
    seen: list[list[list[int]]] = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].tolist()), with_kwargs=True
    )
    timing = hf_timed(model, tokenizer, 4)(prompts)
    assert [row[-len(ids) :] for row, ids in zip(seen[0], prompts, strict=True)] == prompts
    assert [len(step[0]) for step in seen[1:]] == [1, 1, 1]  # the cache holds the rest
    assert len(timing.steps) == 3 and timing.decoded == 9 and timing.first_token > 0


def test_timings_are_summed_up_by_hand() -> None:
    found = timing_metrics([Timing(0.1, [0.01, 0.03], 8), Timing(0.3, [0.02, 0.02], 8)])
    assert found["first_token_ms"]["p50"] == pytest.approx(200.0) and found["token_ms"]["p50"] == pytest.approx(20.0)
    assert found["decode_tokens_per_second"]["mean"] == pytest.approx(200.0)
    assert batches_of([[1], [2], [3]], 2, 2) == [[[1], [2]], [[3], [1]]]


def test_an_advantage_cache_alone_gives_the_view_and_others_are_refused(folder: Path) -> None:
    (row,) = advantages_in(str(folder / "CACHE"), str(folder / "a"))
    assert [token["advantage"] for token in row["tokens"]] == [1.25, None] and row["tokens"][1]["top"][0][1] == 0.25
    other = advantage_cache(folder / "LOGPROBS", models.load_tokenizer(settings_for(folder, "x").model), "logprob")
    small = {"small": str(folder / "a")}
    with pytest.raises(ValueError, match="caches logprobs: give one of task=cache cache.reference"):
        evaluate.run(settings_for(folder, "x", models=small, advantages=str(other)))
    with pytest.raises(ValueError, match="does not exist"):
        evaluate.run(settings_for(folder, "x", models=small, advantages=str(folder / "none")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_eval_path": "tasks"}, "evaluation.lm_eval names no task"),
        ({"refusal_phrases": ["i can't", " "]}, "holds an empty phrase"),
        ({"latency_backends": ["tgi"]}, "latency_backends='tgi' is not known"),
        ({"latency": True, "latency_batch_sizes": []}, "one of them is empty"),
        ({"latency_repetitions": 1}, "at least 2, for percentiles"),
        ({"latency_new_tokens": 1}, "at least 2"),
    ],
)
def test_settings_that_say_nothing_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_for(folder, "x", **change)


def test_the_library_s_metrics_are_read_with_their_standard_errors() -> None:
    row = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": "N/A",
        "samples": 4,
    }
    assert metrics_of(row) == {
        "acc": {"value": 0.5, "stderr": 0.1},
        "exact_match,strict": {"value": 0.25, "stderr": None},
    }


def rendered(page: Path, profile: Path) -> tuple[str, str]:
    """Open a page in a headless Chromium; (the DOM after its script ran, what the browser logged)."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    command = [
        chromium,
        *flags,
        "--enable-logging=stderr",
        "--log-level=0",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, done.stderr


def cells_of(dom: str, section: str) -> list[str]:
    """Return the words of a section's table cells."""
    part = re.search(rf'<section id="{section}">.*?</section>', dom, re.S)
    assert part, f"the page has no section {section}"
    return [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", part[0], re.S)]


def test_a_browser_renders_tables_samples_and_advantages_without_an_error(folder: Path, tmp_path: Path) -> None:
    dom, log = rendered(folder / "e/report.html", tmp_path / "profile")
    results = json.loads((folder / "e/results.json").read_text())
    scores, statistics = cells_of(dom, "results"), cells_of(dom, "text")
    for name, row in results["models"].items():
        assert name in scores and f"[{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]" in scores
        assert f"{row['p95_response_tokens']:.1f}" in statistics
        assert any(cell.startswith(f"{row['logprob_accuracy']:.3f} [") for cell in cells_of(dom, "pairs"))
    assert f"{results['comparisons'][0]['p_holm']:.4f}" in scores and "not separate" in scores
    assert "hf" in cells_of(dom, "latency")
    samples = [json.loads(line) for line in (folder / "e/samples.jsonl").read_text().splitlines()]
    responses = cells_of(dom, "responses")
    assert samples[0]["prompt"] in responses
    assert any(cell.endswith(samples[0]["responses"]["b"].strip()) for cell in responses)
    # Set by the script alone: the tokens of the advantage view are reached with the arrow keys.
    assert 'data-a="+1.25"' in dom and 'tabindex="-1"' in dom
    for trouble in ("CONSOLE", "Uncaught", "Content Security Policy"):
        assert trouble not in log


def test_the_browser_s_log_would_show_a_script_error(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><title>x</title><script>nothing.there()</script>", encoding="utf-8")
    _, log = rendered(page, tmp_path / "profile")
    assert "Uncaught" in log


def test_what_names_say_is_escaped_in_every_further_table(tmp_path: Path) -> None:
    nasty = "<img src=x onerror=alert(1)>"
    entry: dict[str, Any] = {
        "temperature": 1.0,
        "mean_response_tokens": 1.0,
        "p50_response_tokens": 1.0,
        "p95_response_tokens": 1.0,
        "refusal_rate": 0.0,
        "reward_accuracy": 0.5,
        "reward_margin": 0.1,
        "num_pairs": 2,
        "lm_eval": {nasty: {"n": 3, "metrics": {nasty: {"value": 0.5, "stderr": None}}}},
    }
    spread = {"p50": 1.0, "p95": 2.0}
    timed: dict[str, Sequence[dict[str, Any]]] = {
        nasty: [
            {
                "backend": nasty,
                "batch_size": 1,
                "first_token_ms": spread,
                "token_ms": spread,
                "decode_tokens_per_second": spread,
                "peak_memory_bytes": None,
                "device": nasty,
                "dtype": nasty,
                "new_tokens": 2,
                "repetitions": 2,
                "warmup": 1,
            }
        ]
    }
    models_ = {nasty: entry}
    more = metric_sections(models_) + benchmarks_section(models_) + latency_section(timed)
    page = write_report(tmp_path, "x", {}, {"models": models_}, [], [], {"who": more}).read_text(encoding="utf-8")
    assert "<img" not in page and page.count("&lt;img") >= 8
    assert {"pairs", "text", "benchmarks", "latency"} <= set(re.findall(r'href="#(\w+)"', page))


def test_each_of_several_advantage_caches_is_shown_with_its_weight(folder: Path, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(settings_for(folder, "x").model)
    said = tokenizer("order kiwis").input_ids[:2]
    row = {"prompt_ids": [8, 9, 10], "response_ids": said, "prompt": [{"role": "user", "content": "kiwis?"}]}
    generations = tmp_path / "generations.jsonl"
    generations.write_text(json.dumps({**row, "response": "order kiwis", "finish_reason": "stop"}) + "\n")
    other = advantage_cache(tmp_path / "OTHER", tokenizer, first=-2.0)
    loss: dict[str, Any] = {"generations": str(generations), "advantages": str(folder / "CACHE")}
    run = tmp_path / "run"
    shutil.copytree(folder / "a", run / "FINAL")
    evaluation = Evaluation(tmp_path, 1, {"models": {"a": {"folder": str(run / "FINAL")}}}, {})
    (run / "config.yaml").write_text(json.dumps({"loss": loss}))
    (alone,) = advantages_of(evaluation)
    assert alone["whose"] == "" and alone["tokens"][0]["advantage"] == 1.25
    loss |= {"advantages": {"math": str(folder / "CACHE"), "code": str(other)}, "advantage_weights": [3, 1]}
    (run / "config.yaml").write_text(json.dumps({"loss": loss}))
    both = advantages_of(evaluation)
    assert [row["whose"] for row in both] == ["cache math, weight 0.75", "cache code, weight 0.25"]
    assert [row["tokens"][0]["advantage"] for row in both] == [1.25, -2.0]
    html = write_report(tmp_path, "t", {}, {"models": {}}, [], both).read_text(encoding="utf-8")
    assert html.count('class="whose"') == 2 and "cache code, weight 0.25" in html
