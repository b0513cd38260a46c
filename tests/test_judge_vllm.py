"""A real judge: vLLM's own server with SmolLM2, asked for scores of responses (VLLM_PYTHON as in
test_generation_vllm.py).

135 million parameters judge nothing; what is proven is the protocol: every response is a verdict or a counted skip, and
a second run asks for nothing that was answered.
"""

import json
from pathlib import Path

import launch
from tests.support.helpers import WORDS, composed, rows_of
from tests.test_generation_vllm import base, config, pytestmark, server  # noqa: F401

TEMPLATE = (
    "You are a judge. Rate this answer with a number from 1 to 10.\nanswer: {prompt} {response}\n"
    "Format of your response:\nScore: <number>"
)


def test_a_served_model_judges_responses(tmp_path: Path, server) -> None:  # noqa: F811
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
