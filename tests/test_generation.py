"""Generation without vLLM: choice of the backend, stop sets, the log-probability check, order, a server's failures.

The server here is a stand-in that fails in ways that a real one rarely shows; test_generation_vllm.py asks a real one.
"""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import launch
import models
from dataloader import Tokens, collate
from engine import export
from functional import token_logps
from generation.checks import Gap, check_gap, logp_gap, stop_notes
from generation.server import Server
from settings.schema import GenerationConfig, ModelConfig, settings_from, typed
from tasks.generate import backend_name
from templates import turn_end
from tests.support.helpers import composed, rows_of
from tests.support.helpers import launch as run_launch


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return typed(composed("model=tiny")["model"], ModelConfig)


@pytest.fixture(scope="module")
def tokenizer(config):
    return models.load_tokenizer(config)


# ---- configuration


def test_a_model_that_is_built_in_memory_goes_to_hugging_face_and_it_says_so(capsys):
    assert backend_name(settings_from(composed("model=tiny"))) == "hf"
    assert "generation.backend=auto: hf (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "openai"}, "needs generation.base_url"),
        ({"backend": "openai", "base_url": "localhost:8000"}, "needs generation.base_url"),
        ({"backend": "openai", "base_url": "http://me:secret@host/v1"}, "without a key or password in it"),
        (
            {"backend": "openai", "base_url": "http://h/v1", "text_responses": "tokenize", "top_k": 5},
            "generation.top_k=5",
        ),
        ({"backend": "tgi"}, "generation.backend='tgi' is not known"),
        ({"tensor_parallel": 0}, "generation.tensor_parallel=0"),
        ({"tensor_parallel": 2, "backend": "hf"}, "is for generation.backend=vllm, not hf"),
        ({"base_url": "http://h/v1"}, "are for generation.backend=openai, not auto"),
        (
            {"backend": "openai", "base_url": "http://h/v1", "text_responses": "tokenize", "calculator": True},
            "works on token ids",
        ),
        ({"max_logp_gap": 0.0}, "generation.max_logp_gap=0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(change, message):
    with pytest.raises(ValueError, match=message):
        typed({**composed()["generation"], **change}, GenerationConfig)


def test_the_configuration_generation_is_a_step_of_its_own(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    done = run_launch(
        "--config-name=generation",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={tmp_path / 'prompts.jsonl'}",
        f"cache_dir={tmp_path}",
        "generation.max_new_tokens=4",
        "generation.n=3",
    )
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "generations/generations.jsonl")) == 3
    assert json.loads((tmp_path / "generations/summary.json").read_text())["responses"] == 3


# ---- what ends a turn


def test_the_stop_set_without_weights_is_the_loaded_models(config, tokenizer, tmp_path):
    model = models.load_model(config, trainable=False)
    assert models.stop_ids_of(config, tokenizer) == models.stop_ids(tokenizer, model)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 65]
    export.save_model(model, tokenizer, tmp_path / "FINAL")
    saved = replace(config, build=None, load_from=str(tmp_path / "FINAL"))
    assert models.stop_ids_of(saved, tokenizer) == models.stop_ids(tokenizer, model) and 65 in models.stop_ids_of(
        saved, tokenizer
    )
    (tmp_path / "FINAL/generation_config.json").unlink()
    assert models.stop_ids_of(saved, tokenizer) == models.stop_ids(tokenizer)


def test_stop_sets_of_student_and_teacher_are_compared(config, tokenizer, tmp_path):
    own = models.stop_ids(tokenizer)
    model = models.load_model(config, trainable=False)
    export.save_model(model, tokenizer, tmp_path / "same")
    assert stop_notes(config, tokenizer, own, str(tmp_path / "same")) == stop_notes(config, tokenizer, own, None)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 65]
    export.save_model(model, tokenizer, tmp_path / "more")
    assert "student and teacher end turns differently" in stop_notes(config, tokenizer, own, str(tmp_path / "more"))[-1]
    with pytest.raises(ValueError, match="end a turn with different tokens"):
        stop_notes(config, tokenizer, [66], str(tmp_path / "same"))


# ---- the generator's log-probabilities


def test_the_gap_is_measured_per_token_and_bounded(config, tokenizer):
    model = models.load_model(config, trainable=False)
    rows = [Tokens([5, 6, 7, 8, 9], [False, False, True, True, True]), Tokens([5, 6, 9], [False, False, True])]
    out = models.response_logits(model, collate(rows, 0), len(tokenizer))
    flat = token_logps(out.logits, out.targets).tolist()
    exact = [flat[:3], flat[3:]]
    assert logp_gap(model, rows, exact, 0, len(tokenizer), 1).max < 1e-5
    gap = logp_gap(model, rows, [[exact[0][0] + 0.4, *exact[0][1:]], exact[1]], 0, len(tokenizer), 2)
    assert (gap.rows, gap.tokens) == (2, 4) and gap.mean == pytest.approx(0.1, abs=1e-5)
    assert gap.max == pytest.approx(0.4, abs=1e-5)
    assert "1.00e-01 nats per token" in check_gap(gap, 0.2)
    for bad in (gap, Gap(1, 1, float("nan"), float("nan"))):
        with pytest.raises(ValueError, match=r"more than generation.max_logp_gap=0.05: is it the same model"):
            check_gap(bad, 0.05)


# ---- a server's failures


class StandIn(ThreadingHTTPServer):
    """An HTTP server that answers /completions by a function of (request body, number of the request)."""

    def __init__(self, response: Callable[[dict, int], tuple[int, dict, dict]]) -> None:
        self.response, self.bodies, self.headers, self.lock = response, [], [], threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.send(200, {}, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.bodies)
        self.send(*self.server.response(body, number))

    def send(self, status: int, headers: dict, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(text)


def good(body: dict, number: int = 0, **changes) -> tuple[int, dict, dict]:
    """Answer as vLLM's server does: 'ab' and a stop id."""
    choice = {
        "text": "ab",
        "finish_reason": "stop",
        "prompt_token_ids": body["prompt"],
        "token_ids": [97, 98, *body.get("stop_token_ids", [0])[:1]],
        "logprobs": {"token_logprobs": [-1.0, -1.0, -1.0]},
        **changes,
    }
    return 200, {}, {"choices": [choice]}


@pytest.fixture
def serve() -> Iterator[Callable[..., StandIn]]:
    started: list[StandIn] = []

    def start(response: Callable[[dict, int], tuple[int, dict, dict]]) -> StandIn:
        started.append(StandIn(response))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()


def asking(base: Path, url: str, *extra: str) -> list[str]:
    (base / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "x" * (i + 1)}) + "\n" for i in range(9)))
    return [
        "task=generate",
        "model=tiny",
        f"cache_dir={base}",
        "exp_name=asked",
        "datasets=[local]",
        f"datasets.local.train={base / 'prompts.jsonl'}",
        "generation.backend=openai",
        f"generation.base_url={url}",
        "generation.check_rows=0",
        "generation.retries=2",
        *extra,
    ]


def test_failures_that_pass_are_tried_again_and_rows_stand_in_order(tmp_path, serve, tokenizer):
    """Each prompt's first request fails, in turn with 500, 429, 503, and with a response that the server broke off."""
    seen: set[str] = set()

    def flaky(body: dict, number: int):
        key = json.dumps(body["prompt"])
        if key in seen:
            return good(body)
        seen.add(key)
        status = (500, 429, 503, 0)[number % 4]
        return (status, {"Retry-After": "0"}, {"error": "busy"}) if status else good(body, finish_reason="abort")

    server = serve(flaky)
    launch.run_task(composed(*asking(tmp_path, server.url, "generation.concurrency=3")))
    rows = rows_of(tmp_path / "asked/generations.jsonl")
    assert [row["index"] for row in rows] == list(range(8, -1, -1))  # longest prompt first
    assert all(row["response"] == tokenizer.decode([97, 98]) and row["finish_reason"] == "stop" for row in rows)
    seeds = {json.dumps(body["prompt"]): body["seed"] for body in server.bodies}
    assert len(set(seeds.values())) == 9 and all(
        body["prompt"] == [int(i) for i in body["prompt"]] for body in server.bodies
    )
    assert len(server.bodies) == 18


def test_the_calculator_writes_between_two_requests(tmp_path, serve, tokenizer):
    """The server says `<<6*7=`, is asked again with the value behind it, and ends the response."""
    first, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<<6*7=", "."))

    def half(body: dict, number: int):
        went_on = tokenizer.decode(body["prompt"]).endswith("<<6*7=42>>")
        end = [i for i in body["stop_token_ids"] if i in tokenizer.all_special_ids][:1]
        return good(body, token_ids=[*rest, *end] if went_on else first, logprobs=None)

    server = serve(half)
    launch.run_task(
        composed(*asking(tmp_path, server.url, "generation.calculator=true", "generation.max_new_tokens=20"))
    )
    rows = rows_of(tmp_path / "asked/generations.jsonl")
    assert {(row["response"], row["finish_reason"]) for row in rows} == {("<<6*7=42>>.", "stop")}
    assert len(server.bodies) == 18 and {body["max_tokens"] for body in server.bodies} == {20, 10}
    assert len({body["seed"] for body in server.bodies}) == 18
    assert not any("response_logps" in row for row in rows)


def test_finished_rows_stay_when_a_request_fails_for_good(tmp_path, serve):
    def broken(body: dict, number: int):
        return good(body) if number <= 4 else (400, {}, {"error": "no more for you"})

    with pytest.raises(ValueError, match="HTTP 400: .*no more for you"):
        launch.run_task(composed(*asking(tmp_path, serve(broken).url, "generation.concurrency=1")))
    path = tmp_path / "asked/generations.jsonl"
    kept = path.read_bytes().splitlines()
    assert len(kept) == 4
    server = serve(good)
    launch.run_task(composed(*asking(tmp_path, server.url, "generation.concurrency=1")))
    assert path.read_bytes().splitlines()[:4] == kept and len(rows_of(path)) == 9 and len(server.bodies) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "gives no token ids back .* generation.text_responses=tokenize"),
        ({"prompt_token_ids": [1, 1, 2]}, "the server changed the prompt's ids"),
        ({"token_ids": [97, 98]}, r"ended a response at \[98\], which is none of the stop ids"),
    ],
)
def test_ids_that_are_not_what_was_asked_for_are_refused(tmp_path, serve, change, message):
    with pytest.raises(ValueError, match=message):
        launch.run_task(composed(*asking(tmp_path, serve(lambda body, _: good(body, **change)).url)))


def test_an_unreachable_server_is_one_clear_error(tmp_path):
    done = run_launch(*asking(tmp_path, "http://127.0.0.1:9/v1", "generation.retries=1"))
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert (
        "http://127.0.0.1:9/v1/models: " in done.stderr
        and "2 times in a row. Is the server of generation.base_url up?" in done.stderr
    )


def test_a_server_that_is_too_slow_is_given_up_within_the_time_limit(serve):
    wait = threading.Event()
    server = Server(serve(lambda body, _: (wait.wait(10), good(body))[1]).url, timeout=0.2, retries=0)
    with pytest.raises(ValueError, match="no answer within generation.timeout=0.2 s"):
        server.call("/completions", {"prompt": [1]})
    wait.set()


def test_the_key_comes_from_the_environment_and_follows_no_redirect(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the-secret")
    other = serve(good)
    server = serve(lambda body, _: (302, {"Location": f"{other.url}/completions"}, {}))
    with pytest.raises(ValueError, match="HTTP 302") as caught:
        Server(server.url, timeout=5, retries=0).call("/completions", {"prompt": [1]})
    assert server.headers[0]["Authorization"] == "Bearer the-secret" and not other.bodies
    assert "the-secret" not in str(caught.value)


def test_text_is_tokenized_on_demand_and_marked(tmp_path, serve, tokenizer, capsys):
    """Text that spells the end of a turn ends none."""
    spelled = f"a{tokenizer.convert_ids_to_tokens(turn_end(tokenizer).id)}b"
    server = serve(lambda body, _: good(body, token_ids=None, text=spelled))
    launch.run_task(composed(*asking(tmp_path, server.url, "generation.text_responses=tokenize")))
    assert "warning: 9 responses have ids made from the server's text" in capsys.readouterr().out
    rows = rows_of(tmp_path / "asked/generations.jsonl")
    assert all(row["ids_from_text"] and row["response_ids"][-1] in row["sampling"]["stop_ids"] for row in rows)
    assert {row["response"] for row in rows} == {spelled}
    assert all(row["response_ids"].count(turn_end(tokenizer).id) == 1 for row in rows)
    extras = {"top_k", "stop_token_ids", "ignore_eos", "return_token_ids", "skip_special_tokens", "add_special_tokens"}
    assert not extras & server.bodies[0].keys()  # a strict server refuses what it does not know


def test_every_wanted_prompt_is_answered_once_with_more_threads_than_prompts(tmp_path, serve):
    server = serve(good)
    launch.run_task(composed(*asking(tmp_path, server.url, "generation.concurrency=64", "generation.n=5")))
    rows = rows_of(tmp_path / "asked/generations.jsonl")
    assert sorted((row["index"], row["sample"]) for row in rows) == [(i, s) for i in range(9) for s in range(5)]
    assert torch.unique(torch.tensor([body["seed"] for body in server.bodies])).numel() == 45
