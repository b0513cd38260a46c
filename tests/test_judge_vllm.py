"""A real judge: vLLM's own server with SmolLM2, asked for scores of responses (tests/support/vllm_runs.py
says which interpreter has it).

135 million parameters judge nothing; what is proven is the protocol: every response is a verdict or a counted skip, and
a second run asks for nothing that was answered.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import launch
import models
from settings.schema import ModelConfig, typed
from tests.support.helpers import WORDS, composed, rows_of
from tests.support.vllm_runs import MODEL, NEEDS_VLLM, Server

pytestmark = NEEDS_VLLM

TEMPLATE = (
    "You are a judge. Rate this answer with a number from 1 to 10.\nanswer: {prompt} {response}\n"
    "Format of your response:\nScore: <number>"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    config = typed(composed(*MODEL)["model"], ModelConfig)
    server = Server(str(models.model_source(config)), tmp_path / "server.log")
    yield server
    server.kill()


def test_a_served_model_judges_responses(tmp_path: Path, server: Server) -> None:
    (tmp_path / "score.txt").write_text(TEMPLATE)
    rows = [{"prompt": one, "response": other} for one in WORDS for other in WORDS[:4]]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [
        "task=label",
        "model=tiny",
        f"cache_dir={tmp_path}",
        "exp_name=judged",
        f"label.responses={tmp_path}/responses.jsonl",
        "label.judge=true",
        "label.on_error=skip",
        f"judge.base_url={server.url}",
        f"judge.score_template={tmp_path}/score.txt",
        "judge.max_tokens=12",
        "judge.temperature=0.7",
    ]
    launch.run_task(composed(*run))
    folder = tmp_path / "judged" / "LABEL"
    summary = json.loads((folder / "summary.json").read_text())
    judged = rows_of(folder / "judged.jsonl")
    print(summary, [row["text"] for row in judged][:3])
    assert summary["scored"] + summary["responses without a verdict"] == 64 and summary["scored"] >= 2
    assert len(judged) == summary["scored"] and all(1 <= row["value"] <= 10 for row in judged)
    lines = (folder / "judged.jsonl").read_bytes()
    (folder / "scores.jsonl").unlink()  # as if the run had been killed before it wrote a score
    (tmp_path / "judged" / "DONE").unlink()
    launch.run_task(composed(*run))
    assert (folder / "judged.jsonl").read_bytes().startswith(lines)
    assert json.loads((folder / "summary.json").read_text())["scored"] >= summary["scored"]
