"""A judge on loopback, for tools that are not ours: it reads our question and AlpacaEval's, and answers by one rule."""

import json
import math
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[str, str], float]  # two answers -> the chance, in (0, 1), that the first one is better
OURS = re.compile(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nSay in", re.S)
SCORED = re.compile(r"\[Assistant\]\n(.*?)\n\nSay in", re.S)
ALPACA_EVAL = re.compile(r'"model_identifier": "m",\s*"output": """(.*?)"""\s*\},.*?"output": """(.*?)"""\s*\}', re.S)


def answer_to(question: str, rule: Rule) -> tuple[str, float]:
    """Return what is said and the chance of the first answer; ValueError for a question of nobody's form."""
    if ours := OURS.search(question):
        chance = rule(ours[1], ours[2])
        return f"Because.\nVerdict: {'A' if chance > 0.5 else 'B'}", chance
    if alone := SCORED.search(question):
        chance = rule(alone[1], "")
        return f"Because.\nScore: {round(1 + 9 * chance)}", chance
    if theirs := ALPACA_EVAL.search(question):
        chance = rule(theirs[1], theirs[2])
        return "m" if chance > 0.5 else "M", chance
    raise ValueError(f"a question that no template makes: {question[:300]}")


class ChatJudge:
    """The server: `url` ends in /v1, `asked` counts the questions; it never disagrees with itself."""

    def __init__(self, rule: Rule) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def send(self, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self.send({"object": "list", "data": [{"id": "loopback-judge", "object": "model"}]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = "\n".join(message["content"] for message in asked["messages"])
                outer.asked.append(question)
                said, chance = answer_to(question, rule)
                self.send(completion(asked["model"], said, chance))

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self) -> None:
        """Stop answering."""
        self.http.shutdown()
        self.http.server_close()


def completion(model: str, said: str, chance: float) -> dict[str, Any]:
    """Return a chat completion as OpenAI's API has it; the first token's alternatives are m and M."""
    tops = [{"token": t, "bytes": None, "logprob": math.log(p)} for t, p in (("m", chance), ("M", 1 - chance))]
    first = max(tops, key=lambda top: top["logprob"])
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": said},
                "logprobs": {"content": [{**first, "top_logprobs": tops}]},
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
