"""generate, label and evaluate by several processes: the bytes of one, and after a kill only what is missing."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import launch
import models
from engine import export
from evaluation import work
from generation.vllm import _at_first, keep_own_devices, own_devices
from pipeline.plan import shares_devices
from rewards.reward_model import RewardModel
from tests.support.helpers import composed, rows_of, write_pairs
from tests.support.ranks import Ranks

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold 9 pairs and their prompts, responses to score with two alike, a reward model, and two models to evaluate."""
    base = tmp_path_factory.mktemp("shared")
    pairs = rows_of(write_pairs(base / "pairs.jsonl", 9))
    responses = [
        {"prompt": row[side][0]["content"], "response": row[side][1]["content"]}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    lines = [json.dumps(row) + "\n" for row in [*responses, responses[3]]]
    (base / "responses.jsonl").write_text("".join(lines))
    config = launch.settings_of(composed("model=tiny")).model
    tokenizer = models.load_tokenizer(config)
    for seed, name in enumerate(("a", "b", "reward")):
        head = "reward" if name == "reward" else "lm"
        model = models.load_model(replace(config, build_seed=seed), trainable=False, head=head)
        if head == "reward":
            models.set_padding(model, tokenizer)
        export.save_model(model, tokenizer, base / name)
    return base


def generate(base: Path, name: str, *more: str) -> list[str]:
    data = ["model=tiny", "datasets=[local]", f"datasets.local.train={base / 'pairs.jsonl'}"]
    size = ["generation.max_new_tokens=6", "generation.batch_size=4", "generation.n=2"]
    return ["task=generate", *data, *size, f"cache_dir={base}", f"exp_name={name}", *more]


def label(base: Path, name: str, *more: str) -> list[str]:
    own = [f"label.responses={base}/responses.jsonl", f"label.reward_model={base}/reward", "label.batch_size=4"]
    return ["task=label", "model=tiny", *own, f"cache_dir={base}", f"exp_name={name}", *more]


def judged(base: Path, name: str, *more: str) -> list[str]:
    data = ["model=tiny", "datasets=[local]", f"datasets.local.test={base / 'pairs.jsonl'}", "model.eval_batch_size=2"]
    named = [f"evaluation.models.a={base}/a", f"+evaluation.models.b={base}/b", f"+evaluation.reference.b={base}/a"]
    named[0] = f"+{named[0]}"
    asked = ["evaluation.reward_accuracy=true", "evaluation.temperatures=[1.0,0.0]", "evaluation.max_new_tokens=8"]
    size = ["evaluation.batch_size=4", f"cache_dir={base}", f"exp_name={name}"]
    return ["task=evaluate", *data, *named, *asked, *size, *more]


WRITTEN = {
    "generate": ("generations.jsonl", "summary.json"),
    "label": ("LABEL/scores.jsonl", "LABEL/labeled.jsonl", "LABEL/summary.json"),
    "evaluate": ("results.json", "scores.json", "samples.jsonl"),
}
COMMANDS: dict[str, Command] = {"generate": generate, "label": label, "evaluate": judged}


def written(base: Path, task: str, name: str) -> dict[str, str]:
    """Return what a run wrote; its own name, which results.json has, is taken out."""
    return {file: (base / name / file).read_text().replace(f"/{name}", "/NAME") for file in WRITTEN[task]}


def left(base: Path, name: str) -> list[str]:
    """Return the files of single processes."""
    found = [*(base / name).glob("**/*.rank-*"), *(base / name).glob("answers.jsonl")]
    return [path.name for path in found]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, count: int, command: list[str]) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    launch.run_task(composed(*command))
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")


@pytest.mark.parametrize("task", list(COMMANDS))
def test_three_processes_write_what_one_does(base: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, rank 0 last: it waits for the others."""
    launch.run_task(composed(*COMMANDS[task](base, f"{task}_one")))
    for rank in (2, 1, 0):
        as_rank(monkeypatch, rank, 3, COMMANDS[task](base, f"{task}_three"))
        assert (base / f"{task}_three" / "DONE").exists() == (rank == 0)
    assert written(base, task, f"{task}_three") == written(base, task, f"{task}_one")
    assert not left(base, f"{task}_three") and not left(base, f"{task}_one")


@pytest.mark.distributed
@pytest.mark.parametrize("task", list(COMMANDS))
def test_two_processes_at_once_write_what_one_does(base: Path, task: str) -> None:
    launch.run_task(composed(*COMMANDS[task](base, f"{task}_alone")))
    Ranks(*COMMANDS[task](base, f"{task}_two"), folder=base).output(timeout=400)
    assert written(base, task, f"{task}_two") == written(base, task, f"{task}_alone")
    assert not left(base, f"{task}_two")


@pytest.mark.distributed
def test_two_processes_match_the_entropy_of_one(base: Path) -> None:
    """Each searches the temperature of its models, then both answer at all of them."""
    more = ["evaluation.match_entropy=a", "evaluation.match_prompts=3", "evaluation.n_samples=2"]
    launch.run_task(composed(*judged(base, "matched_alone", *more)))
    Ranks(*judged(base, "matched_two", *more), folder=base).output(timeout=400)
    assert written(base, "evaluate", "matched_two") == written(base, "evaluate", "matched_alone")
    results = json.loads((base / "matched_two" / "results.json").read_text())
    assert results["models"]["b"]["match"]["wanted_entropy"] > 0 and not left(base, "matched_two")


@pytest.mark.distributed
def test_a_rank_killed_in_the_middle_loses_nothing_of_what_is_whole(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, one of them killed with signal 9, then three: no row is sampled twice."""
    more = ["generation.batch_size=1", "generation.max_new_tokens=24", "generation.n=4"]
    ranks = Ranks(*generate(base, "killed", *more), folder=base)
    other = base / "killed" / "generations.rank-00001.jsonl"
    deadline = time.monotonic() + 120
    while not (other.is_file() and other.stat().st_size > 2000) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(ranks.processes[1].pid, signal.SIGKILL)
    time.sleep(0.1)
    ranks.kill()  # what a launcher does with the others
    with other.open("a") as torn:
        torn.write('{"prompt": [')
    files = [*(base / "killed").glob("generations*")]
    kept = {line for file in files for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
    assert 0 < len(kept) < 36 and not (base / "killed" / "DONE").exists()
    capsys.readouterr()
    for rank in (2, 1, 0):
        as_rank(monkeypatch, rank, 3, generate(base, "killed", *more))
    launch.run_task(composed(*generate(base, "unkilled", *more)))
    whole = (base / "killed" / "generations.jsonl").read_bytes()
    assert whole == (base / "unkilled" / "generations.jsonl").read_bytes() and kept <= set(whole.splitlines(True))
    assert not left(base, "killed")


def test_scores_of_a_killed_run_are_taken_by_another_number_of_processes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.run_task(composed(*label(base, "label_whole")))
    as_rank(monkeypatch, 1, 2, label(base, "label_killed"))  # of five batches two; rank 0 was killed before its first
    scored: list[int] = []
    score = RewardModel.batch_scores
    monkeypatch.setattr(
        RewardModel, "batch_scores", lambda self, rows: (scored.append(len(rows)), score(self, rows))[1]
    )
    launch.run_task(composed(*label(base, "label_killed")))
    assert scored == [4, 4, 2]  # of 18 different responses in batches of 4
    for file in ("scores.jsonl", "labeled.jsonl"):
        assert (base / "label_killed/LABEL" / file).read_bytes() == (base / "label_whole/LABEL" / file).read_bytes()
    assert not left(base, "label_killed")


def test_answers_of_a_killed_evaluation_are_taken_and_nothing_is_asked_twice(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.run_task(composed(*judged(base, "judged_whole")))
    as_rank(monkeypatch, 1, 2, judged(base, "judged_killed"))
    asked: list[object] = []
    answer, logps = work.answer, work.pair_logps
    monkeypatch.setattr(work, "answer", lambda *rest: (asked.append(rest[1]), answer(*rest))[1])
    monkeypatch.setattr(work, "pair_logps", lambda *rest: (asked.append(rest[2]), logps(*rest))[1])
    launch.run_task(composed(*judged(base, "judged_killed")))
    # 2 models, 2 temperatures, 3 batches of prompts; 5 batches of pairs of each and of the reference: 27, half of them
    assert len(asked) == 14
    assert written(base, "evaluate", "judged_killed") == written(base, "evaluate", "judged_whole")
    assert not left(base, "judged_killed")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["task=generate", "generation.backend=openai", "generation.base_url=http://h:1/v1"], "backend=openai runs in"),
        (["task=label", "label.verifier=tests.support.rewards:share_of_e"], "runs in one process where a verifier"),
    ],
)
def test_who_asks_a_server_or_a_verifier_is_one_process(
    base: Path, command: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"task=generate": generate(base, "refused"), "task=label": label(base, "refused")}[command[0]]
    kept = [part for part in own if not part.startswith("label.reward_model")]
    with pytest.raises(ValueError, match=message):
        as_rank(monkeypatch, 1, 2, [*kept, *command[1:]])


def test_an_engine_gets_the_devices_of_its_process() -> None:
    ranks = {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert own_devices({"LOCAL_RANK": "0"}, 8, 4) == {}  # one process has them all
    assert own_devices(ranks, 4, 2) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert own_devices({**ranks, "CUDA_VISIBLE_DEVICES": "5,7"}, 2, 1) == {"CUDA_VISIBLE_DEVICES": "7"}
    with pytest.raises(ValueError, match="2 processes with an engine of tensor_parallel=4 each need 8 GPUs, and 4 are"):
        own_devices(ranks, 4, 4)


def test_an_engine_after_another_one_has_the_same_gpus(monkeypatch):
    """The first one narrows CUDA_VISIBLE_DEVICES: to count from there again would leave the second none."""
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5,7"}.items():
        monkeypatch.setenv(name, value)
    _at_first.cache_clear()
    for _ in range(2):
        keep_own_devices(1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    _at_first.cache_clear()


def test_a_pipeline_starts_by_its_launcher_what_shares_devices() -> None:
    def shares(*overrides: str) -> bool:
        return shares_devices(composed(*overrides))

    assert shares("task=train") and shares("task=cache") and shares("task=generate") and shares("task=evaluate")
    assert not shares("task=generate", "generation.backend=openai") and not shares("task=cache", "cache.backend=server")
    assert not shares("task=cache", "cache.tensor_parallel=2") and not shares(
        "task=evaluate", "evaluation.latency=true"
    )
    assert shares("task=label", "label.reward_model=x") and not shares("task=label", "label.judge=true")
    assert not shares("task=world") and not shares("task=select")
