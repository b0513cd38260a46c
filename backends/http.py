"""JSON over HTTP with a time limit and retries; the standard library is enough for it.

The key is read from the environment variable OPENAI_API_KEY alone, never shown, and follows no redirect.
"""

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from typing import Any

KEY = "OPENAI_API_KEY"
MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth another try
LONGEST_PAUSE = 60.0  # seconds


class _MayPass(Exception):
    """A failure worth another try; after `pause` seconds if the server named them."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow no redirect: the key would travel with it."""


class Server:
    """A base URL, asked with a time limit in seconds and so many retries, about 1, 2, 4, ... seconds apart."""

    def __init__(self, base_url: str, timeout: float, retries: int) -> None:
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        self.stopped = threading.Event()  # set where one request failed for good: the others stop waiting
        self.opener = urllib.request.build_opener(_Stay)

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object that answers a POST; ValueError if it is refused or every try failed."""
        reason, pause = "", 0.0
        for attempt in range(self.retries + 1):
            if self.stopped.wait(pause):
                raise ValueError("another request failed")
            try:
                return self._once(path, payload)
            except _MayPass as error:
                reason = str(error)
                pause = min(2.0**attempt * random.uniform(0.5, 1.0) if error.pause is None else error.pause, LONGEST_PAUSE)
        raise ValueError(
            f"{self.base_url}{path}: {reason} ({self.retries + 1} tries). Is the server of generation.base_url up? "
            "What is written is kept: the same command goes on from there"
        )

    def _once(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(self.base_url + path, data=json.dumps(payload).encode(), headers=headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise self._meaning(path, error) from error
        except TimeoutError as error:
            raise _MayPass(f"no answer within generation.timeout={self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _MayPass(str(getattr(error, "reason", None) or error or type(error).__name__)) from error
        except ValueError as error:
            raise ValueError(f"{self.base_url}{path} answers with something that is no JSON: is it an OpenAI-compatible server?") from error
        if not isinstance(answer, dict):
            raise ValueError(f"{self.base_url}{path} answers with no JSON object: {str(answer)[:200]}")
        return answer

    def _meaning(self, path: str, error: urllib.error.HTTPError) -> Exception:
        """Return what an HTTP status means: another try, or a ValueError in the server's own words."""
        with error:
            said = error.read(2000).decode("utf-8", "replace").strip()
        if error.code in MAY_PASS:
            after = error.headers.get("Retry-After", "")
            return _MayPass(f"HTTP {error.code}: {said[:300]}", float(after) if after.isdecimal() else None)
        hint = f". Set the environment variable {KEY}" if error.code in (401, 403) else ""
        return ValueError(f"{self.base_url}{path} refuses the request, HTTP {error.code}: {said}{hint}")
