"""vLLM for real as the one who answers while a policy trains: its responses are learned from, its weights follow.

tests/support/vllm_runs.py says which interpreter has vLLM.
"""

import json
from pathlib import Path

import pytest

from tests.support.helpers import ROOT, rows_of
from tests.support.helpers import launch as run_launch
from tests.support.vllm_runs import NEEDS_VLLM, PYTHON, SLOWEST

pytestmark = NEEDS_VLLM
LOSSES = {
    "grpo": ["loss=grpo", "loss.n=4", "loss.verifier=tests.support.rewards:share_of_e"],
    "ppo": ["loss=ppo", "loss.verifier=tests.support.rewards:share_of_e"],
    "gkd": ["loss=gkd", "loss.on_policy=1"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with eight prompts and a teacher; heads of 32 entries, as vLLM wants them on a CPU."""
    folder = tmp_path_factory.mktemp("engine")
    rows = [{"prompt": f"say {word}", "chosen": "bee", "rejected": "no"} for word in "abcdefgh"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained(folder, "teacher", "loss=sft", "n_steps=20", "lr=3e-3")
    return folder


def trained(folder: Path, name: str, *overrides: str) -> list[dict]:
    """Run task=train as a user would; return its rows."""
    common = ["model=tiny", "model.build.num_attention_heads=2", "model.max_length=64", "model.max_prompt_length=32"]
    data = ["datasets=[local]", f"datasets.local.train={folder}/pairs.jsonl", "model.batch_size=4", "log_every=1"]
    asked = [*common, *data, f"cache_dir={folder}", f"exp_name={name}", "lr=1e-2", *overrides]
    done = run_launch(*asked, timeout=SLOWEST, python=PYTHON, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(folder / name / "metrics.jsonl")


@pytest.mark.parametrize("name", LOSSES)
def test_the_engine_says_what_the_policy_would_and_its_weights_follow(name, base):
    """Each hand-over compares log-probabilities of responses, and stops the run where they are not the policy's."""
    teacher = [f"loss.teacher={base}/teacher/FINAL"] if name == "gkd" else []
    engine = ["rollout.backend=vllm", "rollout.max_logp_gap=1e-4", "loss.max_new_tokens=10", "n_steps=6"]
    rows = [row for row in trained(base, name, *LOSSES[name], *teacher, *engine) if "loss/train" in row]
    assert len(rows) == 6 and all(row["response_tokens/train"] > 0 for row in rows)
    if name == "grpo":  # the responses are those of the weights as they stand: the first ratio is 1
        assert all(row["loss/train"] == pytest.approx(0, abs=1e-4) for row in rows[:1])


def test_older_weights_answer_between_two_hand_overs_and_the_ratio_is_to_them(base):
    engine = ["rollout.backend=vllm", "loss.max_new_tokens=10", "n_steps=4", "rollout.refresh_every=2", "loss.beta=0"]
    rows = [row for row in trained(base, "older", *LOSSES["grpo"], *engine) if "loss/train" in row]
    clipped = [row["clipped/train"] for row in rows]
    assert clipped[0] == clipped[2] == 0 and clipped[1] + clipped[3] > 0
