"""The judge: how its responses are read, what it is not asked twice, win rates in both orders, and a server that fails.

The server here is a stand-in that answers by a rule; tests/test_judge_vllm.py asks a real one.
"""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import launch
from evaluation.win_rate import alpaca_eval_rows, judged_points, length_controlled, win_rate
from rewards.judge import Judge, Unparsed, filled, parsed
from settings.schema import JudgeConfig, typed
from tests.support.helpers import composed, rows_of

Response = Callable[[str], tuple[int, str]]  # question -> HTTP status and what the judge says


class Server:
    """A chat server that answers by `response` and counts the questions."""

    def __init__(self, response: Response) -> None:
        self.response, self.asked = response, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def send(self, status: int, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self.send(200, {"data": [{"id": "judge"}]})

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
                outer.asked.append(question)
                status, text = outer.response(question)
                self.send(status, {"choices": [{"message": {"content": text}}]} if status == 200 else {"error": text})

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve() -> Iterator[Callable[[Response], Server]]:
    servers: list[Server] = []

    def make(response: Response) -> Server:
        servers.append(Server(response))
        return servers[-1]

    yield make
    for server in servers:
        server.http.shutdown()


def judge_of(server: Server, folder: Path, on_error: str = "fail", **change: Any) -> Judge:
    config = {**composed()["judge"], "base_url": server.url, "retries": 0, **change}
    return Judge(typed(config, JudgeConfig), folder / "judged.jsonl", on_error)


def longer_wins(question: str) -> tuple[int, str]:
    """Prefer the longer answer, in either order; score by length."""
    if "[Answer A]" not in question:
        return 200, f"Fine.\nScore: {min(10, len(question.split('[Assistant]')[1].split()[0]))}"
    first, second = question.split("[Answer A]\n")[1].split("\n\nSay in")[0].split("\n\n[Answer B]\n")
    return 200, "Because.\n" + (
        "Verdict: tie" if len(first) == len(second) else f"**Verdict: {'A' if len(first) > len(second) else 'B'}**"
    )


# ---- reading


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("score", "good\nScore: 7", 7.0),
        ("score", "**Score: 10/10**\n\n", 10.0),
        ("verdict", "x\nVerdict: A", 1.0),
        ("verdict", "Verdict: **b**", 0.0),
        ("verdict", "verdict: TIE.", 0.5),
    ],
)
def test_the_last_line_is_read(kind: str, text: str, value: float) -> None:
    assert parsed(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("score", ""),
        ("score", "Score: 11"),
        ("score", "Score: 0"),
        ("score", "Score: 7\nthank you"),
        ("verdict", "Verdict: A or B"),
        ("verdict", "Score: 3"),
        ("verdict", "I say A"),
    ],
)
def test_nonsense_is_no_verdict(kind: str, text: str) -> None:
    with pytest.raises(Unparsed):
        parsed(kind, text)


def test_a_place_in_a_response_is_text() -> None:
    assert filled("{prompt} | {response}", prompt="say {response}", response="{prompt}") == "say {response} | {prompt}"


# ---- asking


def test_nothing_is_asked_twice_and_a_torn_row_is_asked_again(
    tmp_path: Path, serve: Callable[[Response], Server]
) -> None:
    server = serve(longer_wins)
    first = judge_of(server, tmp_path)
    questions = [first.score_question("hello", text) for text in ("aaa", "aaaa", "aaa")]
    assert first.asked(questions) == [3.0, 4.0, 3.0] and len(server.asked) == 2
    store = tmp_path / "judged.jsonl"
    store.write_bytes(store.read_bytes()[:-9])
    assert judge_of(server, tmp_path).asked(questions) == [3.0, 4.0, 3.0] and len(server.asked) == 3
    assert (
        judge_of(server, tmp_path, temperature=0.5).asked(questions[:1]) == [3.0] and len(server.asked) == 4
    )  # another judge


def test_nonsense_is_an_error_or_counted_and_what_is_judged_stays(
    tmp_path: Path, serve: Callable[[Response], Server]
) -> None:
    server = serve(lambda question: (200, "no idea") if "qqq" in question else longer_wins(question))
    judge = judge_of(server, tmp_path, concurrency=1)
    questions = [judge.score_question("hello", text) for text in ("aaa", "qqq", "aaaa")]
    with pytest.raises(ValueError, match="ends with 'no idea', which is no score.*on_error=skip"):
        judge.asked(questions)
    assert len(rows_of(tmp_path / "judged.jsonl")) == 1
    lenient = judge_of(server, tmp_path, "skip", concurrency=1)
    assert lenient.asked(questions) == [3.0, None, 4.0] and sum(lenient.skipped.values()) == 1


def test_an_unreachable_judge_is_one_error(tmp_path: Path, serve: Callable[[Response], Server]) -> None:
    server = serve(lambda question: (400, "no such thing"))
    judge = judge_of(server, tmp_path)
    with pytest.raises(ValueError, match="refuses the request, HTTP 400: .*no such thing"):
        judge.asked([judge.score_question("a", "b")])
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ValueError, match="Is the server of judge.base_url up"):
        judge_of(server, tmp_path)


# ---- win rates


def test_both_orders_are_asked_and_a_disagreement_is_a_tie(tmp_path: Path, serve: Callable[[Response], Server]) -> None:
    biased = serve(lambda question: (200, "Verdict: A"))  # always the first
    points, disagreed = judged_points(judge_of(biased, tmp_path), ["p"] * 3, ["x", "y", "same"], ["u", "v", "same"])
    assert points == [0.5, 0.5, 0.5] and disagreed == 2 and len(biased.asked) == 4
    fair = serve(longer_wins)
    points, disagreed = judged_points(
        judge_of(fair, tmp_path, temperature=0.1), ["p"] * 3, ["xxx", "y", "zz"], ["u", "vvv", "ww"]
    )
    assert points == [1.0, 0.0, 0.5] and disagreed == 0


def test_a_preference_for_length_vanishes_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.integers(20, 60, 400), rng.integers(10, 50, 400)
    points = ((own > other) + 0.5 * (own == other)).tolist()  # the longer one wins, and ours is mostly longer
    found = win_rate(points, own.tolist(), other.tolist(), "base", "judge")
    assert found["win_rate"] > 0.7 and abs(found["length_controlled_win_rate"] - 0.5) < 0.1
    low, high = found["length_controlled_ci95"]
    assert low < found["length_controlled_win_rate"] < high
    independent = (rng.random(400) < 0.7).astype(float).tolist()  # a preference that length does not explain stays
    rate = length_controlled(independent, own.tolist(), other.tolist())["length_controlled_win_rate"]
    assert rate == pytest.approx(np.mean(independent), abs=0.1)


def test_missing_verdicts_are_left_out_and_counted() -> None:
    found = win_rate([1.0, None, 0.5, 0.0], [1, 2, 3, 4], [1, 2, 3, 4], "base", "judge")
    assert (found["wins"], found["ties"], found["losses"], found["skipped"], found["win_rate"]) == (1, 1, 1, 1, 0.5)
    with pytest.raises(ValueError, match="no verdict against base could be read"):
        win_rate([None], [1], [1], "base", "judge")


def test_alpaca_eval_reads_the_rows() -> None:
    (row,) = alpaca_eval_rows(["p"], ["r"], "mine")
    assert row == {"instruction": "p", "output": "r", "generator": "mine", "dataset": "held_out"}


def test_an_evaluation_is_judged(tmp_path: Path, serve: Callable[[Response], Server]) -> None:
    """Two tiny models, the judge's verdicts in results.json and the table, AlpacaEval's files; a second run asks
    nothing.
    """
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(4)))
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "response": "ha " * i}) + "\n" for i in range(1, 5))
    )
    for name, steps in (("a", 1), ("b", 30)):
        launch.run_task(
            composed(
                "model=tiny",
                "datasets=[local]",
                f"datasets.local.train={tmp_path}/train.jsonl",
                f"cache_dir={tmp_path}",
                f"exp_name={name}",
                f"n_steps={steps}",
                "lr=3e-3",
            )
        )
    server = serve(longer_wins)
    models = [f"+evaluation.models.{name}={tmp_path}/{name}/FINAL" for name in "ab"]
    run = [
        "task=evaluate",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.test={tmp_path}/test.jsonl",
        f"cache_dir={tmp_path}",
        *models,
        "evaluation.temperatures=[1.0]",
        "evaluation.max_new_tokens=12",
        "evaluation.opponent=a",
        "evaluation.judge=true",
        f"judge.base_url={server.url}",
    ]
    launch.run_task(composed(*run, "exp_name=eval"))
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    found = results["models"]["b"]["judged"]
    assert (
        found["by"] == "judge"
        and found["wins"] + found["ties"] + found["losses"] == 4
        and "judged" not in results["models"]["a"]
    )
    assert "judged win rate over a" in (tmp_path / "eval" / "results.md").read_text()
    outputs = json.loads((tmp_path / "eval" / "alpaca_eval" / "b.json").read_text())
    assert [row["instruction"] for row in outputs] == [f"say {i}" for i in range(4)] and outputs[0]["generator"] == "b"
    asked = len(server.asked)
    (tmp_path / "eval" / "DONE").unlink()
    launch.run_task(composed(*run, "exp_name=eval"))
    assert len(server.asked) == asked
