"""What a model, a judge or a server sends can cost neither time nor memory: checkers, calculator, requests."""

import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from conversations import Conversation
from generation.calculator import calculate, completion
from generation.server import Refused, Server
from rewards.judge import Unparsed, parsed
from rewards.verifiers import majority_response, scored
from worlds import gsm8k, shop

SECONDS = 0.2  # of this module's own verifiers
ROW = Conversation([{"role": "user", "content": "x"}], None, None, None, {"answer": "1"})


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


SPACE = " " * 100_000
NASTY = ["####" + SPACE, "####" + SPACE + "x", "#" * 100_000, "#### -" + SPACE + "$" + SPACE, "####" + "9" * 100_000]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_the_gsm8k_checker_takes_no_time_whatever_a_model_writes(text: str) -> None:
    with within(0.5):
        assert gsm8k.check("", text, {"answer": "1"}) == 0.0 and gsm8k.vote(text) is None
        assert gsm8k.check_last("", text + "1", {"answer": "2"}) == 0.0


def test_numbers_of_forty_characters_are_still_read() -> None:
    assert gsm8k.final_number("####" + " " * 19 + "$" + " " * 10 + "12,000") == 12000
    assert gsm8k.final_number("#### " + "1" * 35) == int("1" * 35)
    assert gsm8k.final_number("#### " + "1" * 36) is None


@pytest.mark.parametrize("kind", ["score", "verdict"])
def test_a_line_of_a_judge_is_read_in_no_time(kind: str) -> None:
    for text in (f"{kind}" + "!" * 50_000, "*" * 50_000 + f"{kind}" + ":" * 50_000, f"{kind}:" + SPACE + "x"):
        with within(0.5), pytest.raises(Unparsed):
            parsed(kind, text)


def test_the_calculator_is_bounded_in_digits_operators_depth_and_time() -> None:
    texts = ["9" * 120, "9*" * 59 + "9", "(" * 60 + "1" + ")" * 59, "-" * 119 + "1", "1" + "%" * 119, "1/" * 59 + "3"]
    with within(0.5):
        assert [calculate(text) for text in texts] == [None] * 5 + ["0.3333"]
        assert calculate("9" * 1_000_000) is None
        assert completion("<<" * 100_000 + "1+1=") == "2>>" and completion("<<1+1=" * 100_000) == "2>>"


@pytest.mark.parametrize("digits", [10, 5_000, 100_000])
def test_long_numbers_are_wrong_answers_and_no_errors(digits: int) -> None:
    prompt, good = shop.prompt_text(shop.EXAMPLE), shop.demonstration(shop.EXAMPLE, random.Random(1))
    with within(1):
        assert shop.parse_reply(good) is not None
        assert shop.check(prompt, re.sub(r"\d+", "7" * digits, good)) == 0.0


def sleeps(prompt: str, response: str) -> float:
    time.sleep(10)
    return 1.0


def backtracks(prompt: str, response: str) -> float:
    return float(re.fullmatch(r"(a|a)*b", response) is not None)


def swallows(prompt: str, response: str) -> float:
    try:
        time.sleep(10)
    except Exception:
        return 1.0
    return 0.0


def vote(response: str) -> str:
    time.sleep(10)
    return response


@pytest.mark.parametrize("verifier", [sleeps, backtracks, swallows])
def test_a_checker_that_takes_too_long_is_stopped_and_named_with_the_response(verifier) -> None:
    words = (
        rf"test_bounds:{verifier.__name__} took more than 0.2 s for one response of 40 characters, 'aaaa.*SECONDS = 2"
    )
    with within(3), pytest.raises(ValueError, match=words):
        scored(verifier, ROW, "a" * 40)
    with within(3), pytest.raises(ValueError, match="test_bounds:vote took more than 0.2 s"):
        majority_response(["a", "b"], vote)


@contextmanager
def dripping(head: bytes, part: bytes) -> Iterator[str]:
    """Serve an answer that never ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(10_000)
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
            while True:
                connection.sendall(part)
                time.sleep(0.05 if len(part) < 100 else 0)
        except OSError:
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.close()


def test_a_server_that_drips_or_floods_is_left() -> None:
    with dripping(b"Content-Length: 1000000", b" ") as url, within(5):
        with pytest.raises(ValueError, match="no answer within generation.timeout=0.5 s"):
            Server(url, 0.5, 0).call("/models")
    with dripping(b"Connection: close", b" " * 100_000) as url, within(10):
        server = Server(url, 30, 0)
        server.max_bytes = 1_000_000
        with pytest.raises(Refused, match="answers with more than 1,000,000 bytes"):
            server.call("/models")
