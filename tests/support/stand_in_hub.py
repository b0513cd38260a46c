"""A stand-in for the Hugging Face hub on loopback: the few endpoints that uploads, downloads and repositories' facts
need, kept in memory. The library that talks to it is the real one.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "c" * 40


class StandInHub:
    """repos: (type, name) -> {"private", "files", "commits", "license"}. requests: (method, path, token)."""

    def __init__(self, token: str = "") -> None:
        self.repos: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.token = token
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, private: bool = True, license: str | None = None, **files: bytes) -> None:
        """Put a repository there."""
        self.repos[kind, name] = {"private": private, "files": dict(files), "commits": [], "license": license}

    def facts(self, kind: str, name: str) -> dict[str, Any]:
        """Return what the hub says of a repository."""
        repo = self.repos[kind, name]
        siblings = [{"rfilename": path, "size": len(data)} for path, data in repo["files"].items()]
        card = {"license": repo["license"]} if repo["license"] else {}
        return {
            "_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": repo["private"], "siblings": siblings,
            "cardData": card, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False,
        }  # fmt: skip

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Answer a request: (status, JSON or bytes, headers)."""
        if (method, path) == ("POST", "/api/repos/create"):
            return self._create(json.loads(body))
        if (method, path) == ("POST", "/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}, {}
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path)
        if found:
            key = (found[1].removesuffix("s"), found[2])
            if key not in self.repos:
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            return self._asked(key, method, found[3] or "", body)
        found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            files = self.repos[("dataset" if found[1] else "model"), found[2]]["files"]
            data = files.get(unquote(found[4]))
            if data is None:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            return 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return 404, {"error": f"the stand-in knows no {method} {path}"}, {}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        kind = asked.get("type", "model")
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        private = asked.get("private", asked.get("visibility", "private") == "private")
        self.add(kind, name, private)
        return 200, {"url": url, "name": name, "id": "1"}, {}

    def _asked(self, key: tuple[str, str], method: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self.repos[key]
        if method == "GET" and (not rest or rest.startswith("revision/")):
            return 200, self.facts(*key), {}
        if rest.startswith("preupload/"):
            files = json.loads(body)["files"]
            return (
                200,
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]},
                {},
            )
        if rest.startswith("commit/"):
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            repo["files"] |= {one["path"]: base64.b64decode(one["content"]) for one in added}
            repo["commits"].append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
            url = f"{self.url}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}/commit/{COMMIT}"
            return 200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""}, {}
        if method == "GET" and rest.startswith("tree/"):
            tree = [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in repo["files"].items()]
            return 200, tree, {}
        return 404, {"error": f"the stand-in knows no {method} {rest}"}, {}


def _handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            path = unquote(self.path.partition("?")[0])
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.requests.append((self.command, path, token))
            status, found, headers = hub.answer(self.command, path, body)
            if hub.token and token != hub.token:
                status, found, headers = 401, {"error": "Invalid credentials"}, {}
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _chunks(self) -> bytes:
            parts = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return parts

        do_GET = do_POST = do_HEAD = _respond

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Handler
