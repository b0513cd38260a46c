"""OpenAI-compatible backend: any server with /completions that takes token ids as prompt, and gives token ids back.

vLLM's server does (`return_token_ids`). Where a server gives only text it is refused, or, with
generation.text_replies=tokenise, its text is tokenised: those rows are marked. The standard library is enough for it.
The key is read from the environment variable OPENAI_API_KEY alone and never shown.
"""

import http.client
import json
import os
import queue
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from calculator_generation import Piece, pause_ids, piece_of, reply_with_calculator
from dataloader import turn_end
from generation.replies import Answer, derived_seed, forbidden_ids
from schema import Settings

KEY = "OPENAI_API_KEY"
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # worth another try
LONGEST_PAUSE = 60.0  # seconds


class _Later(Exception):
    """A failure that may pass; `pause` seconds if the server named them."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the key would travel with it."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Say that there is nothing to follow."""


class Server:
    """A base URL with time limit, retries with back-off, and the key of the environment."""

    def __init__(self, base_url: str, timeout: float, retries: int) -> None:
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        self.stopped = threading.Event()
        self.opener = urllib.request.build_opener(_Stay)

    def call(self, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON answer to a GET, or to a POST with a payload; ValueError when every try failed."""
        reason, pause = "", 0.0
        for attempt in range(self.retries + 1):
            if self.stopped.wait(pause):
                raise ValueError("another request failed")
            try:
                return self._once(path, payload)
            except _Later as error:
                reason = str(error)
                wait = min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                pause = min(error.pause, LONGEST_PAUSE) if error.pause is not None else wait
        raise ValueError(
            f"{self.base_url}{path}: {reason}, {self.retries + 1} times in a row. Is the server of generation.base_url up? "
            "What is finished is kept: the same command goes on from there"
        )

    def _once(self, path: str, payload: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.base_url + path, data=body, headers=headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            self._explain(path, error)
        except TimeoutError as error:
            raise _Later(f"no answer within generation.timeout={self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _Later(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from error
        except ValueError as error:
            raise _Later(f"the answer is no JSON ({error})") from error
        raise AssertionError("not reached")

    def _explain(self, path: str, error: urllib.error.HTTPError) -> None:
        """Raise what an HTTP status means: _Later if it may pass, else ValueError with the server's own words."""
        with error:
            said = error.read(2000).decode("utf-8", "replace").strip()
        if error.code in AGAIN:
            after = error.headers.get("Retry-After", "")
            raise _Later(f"HTTP {error.code}: {said[:300]}", float(after) if after.isdecimal() else None)
        hint = f" Set the environment variable {KEY}." if error.code in (401, 403) else ""
        raise ValueError(f"{self.base_url}{path} refuses the request, HTTP {error.code}: {said}.{hint}")


def served_model(server: Server, name: str | None) -> str:
    """Return the name to ask for: the given one if it is served, or the only one there is."""
    listed = [str(entry.get("id")) for entry in server.call("/models").get("data", [])]
    if name is None and len(listed) == 1:
        return listed[0]
    if name is None or (listed and name not in listed):
        raise ValueError(f"generation.model_name={name!r}: {server.base_url} serves {', '.join(listed) or 'nothing'}")
    return name


class OpenAIBackend:
    """An OpenAI-compatible server behind the interface of generation.replies; each request has a seed of its own."""

    def __init__(self, settings: Settings, tokenizer: Any, stop: list[int]) -> None:
        generation = settings.generation
        assert generation.base_url is not None
        self.generation, self.tokenizer, self.stop = generation, tokenizer, stop
        self.pauses = pause_ids(tokenizer, stop) if generation.calculator else []
        self.server = Server(generation.base_url, generation.timeout, generation.retries)
        self.model = served_model(self.server, generation.model_name)
        forbidden = forbidden_ids(tokenizer, stop, len(tokenizer), len(tokenizer)).nonzero().flatten().tolist()
        self.bias = {str(i): -100 for i in forbidden}

    def payload(self, prompt: list[int], room: int, seed: int) -> dict[str, Any]:
        """Return the body of one request: the standard's fields, and vLLM's own where ids shall come back."""
        generation = self.generation
        body: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "max_tokens": room, "n": 1, "seed": seed,
            "temperature": generation.temperature, "top_p": generation.top_p, "logit_bias": self.bias,
        }  # fmt: skip
        if generation.text_replies == "tokenise":
            return body | {"stop": [self.tokenizer.convert_ids_to_tokens(i) for i in self.stop[:4]]}  # 4 at most
        return body | {
            "top_k": max(0, generation.top_k), "stop_token_ids": [*self.stop, *self.pauses], "ignore_eos": True, "logprobs": 0,
            "return_token_ids": True, "skip_special_tokens": False, "add_special_tokens": False,
        }  # fmt: skip

    def ask(self, index: int, prompt: list[int], seed: int) -> Answer:
        """Answer one prompt, with a request after each pause for the calculator where there is one."""
        room = self.generation.max_new_tokens
        if self.generation.text_replies == "tokenise":
            return self._from_text(index, self.choice(prompt, room, seed))
        spoken: list[tuple[Piece, list[float] | None]] = []

        def speak(prompts: list[list[int]], rooms: list[int], turn: int) -> list[Piece]:
            spoken.append(self.piece(prompts[0], self.choice(prompts[0], rooms[0], turn)))
            return [spoken[-1][0]]

        if not self.pauses:
            speak([prompt], [room], seed)
            (ids, reason), logps = spoken[0]
            return Answer(index, ids, reason, logps)
        ((ids, reason),) = reply_with_calculator(speak, self.tokenizer, [prompt], room, seed)
        # What the calculator wrote was not sampled: a reply with a pause has no log-probabilities of its own.
        return Answer(index, ids, reason, spoken[0][1] if len(spoken) == 1 and len(spoken[0][0].ids) == len(ids) else None)

    def choice(self, prompt: list[int], room: int, seed: int) -> dict[str, Any]:
        """Ask for one reply; one that the server broke off (finish_reason abort, when it ends) is asked for again."""
        reason = None
        for _ in range(self.generation.retries + 1):
            response = self.server.call("/completions", self.payload(prompt, room, seed))
            choices = response.get("choices")
            if not choices:
                raise ValueError(f"{self.server.base_url}/completions answers without choices: {str(response)[:300]}")
            reason = choices[0].get("finish_reason")
            if reason in ("stop", "length"):
                return choices[0]
            self.server.stopped.wait(1.0)
        raise ValueError(f"{self.server.base_url} ends a reply with finish_reason={reason!r} each time")

    def piece(self, prompt: list[int], choice: dict[str, Any]) -> tuple[Piece, list[float] | None]:
        """Check what came back (our prompt's ids unchanged, an end that is ours); with its log-probabilities, if any."""
        ids = choice.get("token_ids")
        if ids is None:
            raise ValueError(
                f"{self.server.base_url} gives no token ids back (return_token_ids of vLLM's server, from 0.10.2). "
                "generation.text_replies=tokenise makes ids from its text and marks the rows"
            )
        if choice.get("prompt_token_ids", prompt) != prompt:
            shown = choice["prompt_token_ids"][: len(prompt) + 2]
            raise ValueError(f"the server changed the prompt's ids from {prompt[:8]}... to {shown[:8]}...")
        piece = piece_of(ids, self.stop, self.pauses)
        if choice["finish_reason"] == "stop" and piece.reason == "length":
            raise ValueError(f"the server ended a reply at {ids[-1:]}, which is none of the stop ids {self.stop}")
        logps = (choice.get("logprobs") or {}).get("token_logprobs")
        return piece, logps[: len(piece.ids)] if logps else None

    def _from_text(self, index: int, choice: dict[str, Any]) -> Answer:
        ids = self.tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        end = turn_end(self.tokenizer).id
        if choice["finish_reason"] == "stop" and end is not None:
            return Answer(index, [*ids, end], "stop", None, True)
        return Answer(index, ids, "length", None, True)

    def answers(self, prompts: Sequence[list[int]], wanted: Collection[int], seed: int) -> Iterator[Answer]:
        """Yield replies as they come, `generation.concurrency` requests at once; what is in is yielded before an error."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        for i in sorted(wanted, key=lambda i: (-len(prompts[i]), i)):
            todo.put(i)

        def work() -> None:
            while not self.server.stopped.is_set():
                try:
                    i = todo.get_nowait()
                    done.put(self.ask(i, prompts[i], derived_seed(seed, i)))
                except queue.Empty:
                    return
                except Exception as error:  # shown by the main thread
                    done.put(error)
                    return

        for _ in range(min(self.generation.concurrency, len(wanted))):
            threading.Thread(target=work, daemon=True).start()  # daemon: an interrupted run does not wait for a reply
        for _ in range(len(wanted)):
            result = done.get()
            if isinstance(result, Exception):
                self.server.stopped.set()
                yield from _arrived(done)
                raise result
            yield result

    def close(self) -> None:
        """Let no thread ask again."""
        self.server.stopped.set()


def _arrived(done: "queue.SimpleQueue[Answer | Exception]") -> Iterator[Answer]:
    while not done.empty():
        result = done.get()
        if not isinstance(result, Exception):
            yield result
