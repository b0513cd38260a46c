"""A server that answers what was not asked for: one message, and no row of it."""

import json
from pathlib import Path

import numpy as np
import pytest

import launch
from generation.server import Server
from teacher.protocol import top_k_of
from tests.support.helpers import composed
from tests.test_generation import asking, good, serve  # noqa: F401

END = 258  # what ends a turn for model=tiny


def answered(folder: Path, url: str, *extra: str) -> None:
    options = ["generation.max_new_tokens=4", "generation.retries=0", *extra]
    launch.run_task(composed(*asking(folder, url, *options)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [97, 300, END]}, "the id 300, the tokenizer has 259 tokens: its model has a padded vocabulary"),
        ({"token_ids": [97, -1, END]}, "the id -1, the tokenizer has 259 tokens"),
        ({"token_ids": ["97", END]}, "the id '97', the tokenizer has 259 tokens"),
        ({"token_ids": [97.0, END]}, "the id 97.0, the tokenizer has 259 tokens"),
        ({"token_ids": [97] * 5, "finish_reason": "length"}, r"asked for at most 4 ids \(max_tokens\)"),
        ({"token_ids": "ab"}, "answers with 'ab'"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, r"log-probabilities \[-1.0\] for 3 ids: not a number for each"),
        ({"logprobs": {"token_logprobs": [None, -1.0, -1.0]}}, "not a number for each"),
        ({"logprobs": {"token_logprobs": [float("nan"), -1.0, -1.0]}}, "not a number for each"),
    ],
)
def test_ids_and_numbers_that_cannot_be_are_refused(tmp_path: Path, serve, change, message) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        answered(tmp_path, serve(lambda body, _: good(body, **change)).url)
    assert not (tmp_path / "asked" / "generations.jsonl").exists()


@pytest.mark.parametrize("body", [[1, 2], {"choices": None}, {"choices": {"a": 1}}, {"choices": [None]}])
def test_an_answer_in_another_form_is_one_message(tmp_path: Path, serve, body) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="answers without choices|no JSON object"):
        answered(tmp_path, serve(lambda _, __: (200, {}, body)).url)


def test_a_text_that_is_none_is_one_message(tmp_path: Path, serve) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="answers without a text"):
        answered(tmp_path, serve(lambda body, _: good(body, text=None)).url, "generation.text_responses=tokenize")


def test_log_probabilities_and_prompt_ids_may_be_missing(tmp_path: Path, serve) -> None:  # noqa: F811
    answered(tmp_path, serve(lambda body, _: good(body, logprobs=None, prompt_token_ids=None)).url)
    rows = (tmp_path / "asked" / "generations.jsonl").read_text().splitlines()
    assert len(rows) == 9 and not any("response_logps" in json.loads(row) for row in rows)


def test_a_connection_that_closes_half_way_is_tried_again(serve) -> None:  # noqa: F811
    """Content-Length says more than comes, or a chunked answer has no end."""

    def torn(body: dict, number: int):
        return good(body) if number > 1 else (200, {"Content-Length": "99999", "Connection": "close"}, {"choices": []})

    server = Server(serve(torn).url, timeout=5, retries=1)
    assert server.call("/completions", {"prompt": [1]})["choices"][0]["token_ids"] == [97, 98, 0]


# ---- a served teacher's rows


IDS, RESPONSE = [5, 6, 7, 8], [False, False, True, True]


def rows_of_a_teacher(seed: int = 0) -> list[dict | None]:
    """Return prompt_logprobs over ten tokens as vLLM gives it: the three most probable, and the token itself."""
    rows: list[dict | None] = [None]
    for token in IDS[1:]:
        logps = np.log(np.random.default_rng([seed, token]).dirichlet(np.ones(10)))
        order = np.argsort(-logps).tolist()
        kept = {token, *order[:3]}
        rows.append({str(i): {"logprob": float(logps[i]), "rank": order.index(i) + 1} for i in kept})
    return rows


def read(rows: list[dict | None]):
    return top_k_of({"prompt_token_ids": IDS, "prompt_logprobs": rows}, IDS, RESPONSE, 3, 10)


def test_rows_out_of_their_order_or_twice_are_refused() -> None:
    rows = rows_of_a_teacher()
    assert read(rows).ids.shape == (2, 3)
    for order in ((0, 2, 3, 1), (0, 1, 2, 2), (0, 1, 3, 2)):
        with pytest.raises(ValueError, match=r"the row of token \d lacks the token itself \(id \d\)"):
            read([rows[i] for i in order])


def test_probabilities_that_sum_to_more_than_one_are_refused() -> None:
    rows = rows_of_a_teacher()
    for entry in rows[2].values():  # type: ignore[union-attr]
        entry["logprob"] = -0.01
    with pytest.raises(ValueError, match=r"the probabilities before token 2 sum to 2.97: .*log-probabilities"):
        read(rows)
