"""An OpenAI-compatible server as the generators and the judge ask it: retries with back-off, bounded concurrency.

The standard library is enough for it. The key is read from the environment variable OPENAI_API_KEY alone and never
shown.
"""

import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from settings.secrets import hidden, secrets_of

Task = TypeVar("Task")
Result = TypeVar("Result")

KEY = "OPENAI_API_KEY"
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # worth another try
LONGEST_PAUSE = 60.0  # seconds
MAX_BYTES = 1 << 30  # of an answer; the log-probabilities of a long response are hundreds of MB
PIECE = 1 << 16


class _Later(Exception):
    """A failure that may pass; `pause` seconds if the server named them."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class Refused(ValueError):
    """A status that another try would not change: `code`, and what the server `said`."""

    def __init__(self, message: str, code: int, said: str) -> None:
        super().__init__(message)
        self.code, self.said = code, said


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the key would travel with it."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Say that there is nothing to follow."""


class Server:
    """A base URL with time limit, retries with back-off, and the key of the environment; `section` and `key` name its
    keys in messages.
    """

    def __init__(
        self, base_url: str, timeout: float, retries: int, section: str = "generation", key: str = "base_url"
    ) -> None:
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        self.section, self.key = section, key
        self.max_bytes = MAX_BYTES
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
            f"{self.base_url}{path}: {reason}, {self.retries + 1} times in a row. Is the server of "
            f"{self.section}.{self.key} up? "
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
                found = json.loads(self._read(path, response))
                if isinstance(found, dict):
                    return found
                raise _Later(f"the answer is no JSON object but {found!r:.60}")
        except urllib.error.HTTPError as error:
            self._explain(path, error)
        except Refused:
            raise
        except TimeoutError as error:
            raise _Later(f"no answer within {self.section}.timeout={self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _Later(f"{getattr(error, 'reason', None) or error or type(error).__name__}") from error
        except ValueError as error:
            raise _Later(f"the answer is no JSON ({error})") from error
        raise AssertionError("not reached")

    def _read(self, path: str, response: http.client.HTTPResponse) -> bytes:
        """Read an answer: all of it within the time limit, however slowly it drips, and no more than is sane."""
        parts, size, deadline = [], 0, time.monotonic() + self.timeout
        while part := response.read1(PIECE):
            parts.append(part)
            size += len(part)
            if time.monotonic() > deadline:
                raise TimeoutError
            if size > self.max_bytes:
                message = (
                    f"{self.base_url}{path} answers with more than {self.max_bytes:,} bytes: is it the right server?"
                )
                raise Refused(message, 200, "")
        if response.length:  # the connection ended early
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _explain(self, path: str, error: urllib.error.HTTPError) -> None:
        """Raise what an HTTP status means: _Later if it may pass, else ValueError with the server's own words."""
        with error:
            said = hidden(error.read(2000).decode("utf-8", "replace").strip(), secrets_of(os.environ))
        if error.code in AGAIN:
            after = error.headers.get("Retry-After", "")
            raise _Later(f"HTTP {error.code}: {said[:300]}", float(after) if after.isdecimal() else None)
        hint = f" Set the environment variable {KEY}." if error.code in (401, 403) else ""
        message = f"{self.base_url}{path} refuses the request, HTTP {error.code}: {said}.{hint}"
        raise Refused(message, error.code, said)


def served_model(server: Server, name: str | None) -> str:
    """Return the name to ask for: the given one if it is served, or the only one there is."""
    listed = [str(entry.get("id")) for entry in server.call("/models").get("data") or []]
    if name is None and len(listed) == 1:
        return listed[0]
    if name is None or (listed and name not in listed):
        raise ValueError(
            f"{server.section}.model_name={name!r}: {server.base_url} serves {', '.join(listed) or 'nothing'}"
        )
    return name


def in_parallel(
    server: Server, tasks: Sequence[Task], work: Callable[[Task], Result], concurrency: int
) -> Iterator[Result]:
    """Yield work(task) of every task as it is done, `concurrency` at once; what is done is yielded before an error is
    raised.
    """
    todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()
    for task in tasks:
        todo.put(task)

    def worker() -> None:
        while not server.stopped.is_set():
            try:
                done.put((work(todo.get_nowait()), None))
            except queue.Empty:
                return
            except Exception as error:  # shown by the main thread
                done.put((None, error))
                return

    for _ in range(min(concurrency, len(tasks))):
        threading.Thread(target=worker, daemon=True).start()  # daemon: an interrupted run does not wait for a response
    for _ in tasks:
        result, error = done.get()
        if error is not None:
            server.stopped.set()
            while not done.empty():
                late, none = done.get()
                if none is None:
                    yield late  # type: ignore[misc]
            raise error
        yield result  # type: ignore[misc]


def in_order(tasks: Iterable[Task], work: Callable[[Task], Result], concurrency: int, ahead: int) -> Iterator[Result]:
    """Yield work(task) in the order of the tasks, `concurrency` at once; no more than `ahead` are begun and not taken.

    The first task, in this order, that fails raises its error, when all before it have been yielded.
    """
    todo: queue.SimpleQueue[tuple[Task, Future[Result]] | None] = queue.SimpleQueue()
    waiting: deque[Future[Result]] = deque()

    def worker() -> None:
        while (job := todo.get()) is not None:
            task, promise = job
            try:
                promise.set_result(work(task))
            except Exception as error:  # raised where the result is taken
                promise.set_exception(error)

    for _ in range(concurrency):
        threading.Thread(target=worker, daemon=True).start()  # daemon: an interrupted run does not wait for an answer
    try:
        for task in tasks:
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
            waiting.append(Future())
            todo.put((task, waiting[-1]))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for _ in range(concurrency):
            todo.put(None)
