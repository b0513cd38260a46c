"""task=evaluate generation.backend=openai: a server on loopback answers for a model whose folder has no weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launch
import models
from evaluation.served import check_served
from generation.server import Server
from generation.text_prompts import TextPrompts
from launch import settings_of
from settings.artifacts import read_json
from settings.tasks import counted
from tests.support.helpers import composed, rows_of
from tests.test_generation import StandIn, serve

__all__ = ["serve"]
TINY = "assets/byte_tokenizer"
SERVED = ("generation.backend=openai", "generation.base_url=http://127.0.0.1:9/v1")


def evaluation(*more: str) -> dict[str, Any]:
    """Compose an evaluation of one model."""
    data = ["datasets=[local]", "datasets.local.test=README.md"]
    return composed("task=evaluate", "model=tiny", *data, f"+evaluation.models.a={TINY}", *more)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("evaluation.served=[a]",), r"evaluation.served=\['a'\] needs their server"),
        (("generation.backend=vllm",), "asks models by Hugging Face's generate"),
        ((*SERVED, f"+evaluation.models.b={TINY}"), r"one model, not for a, b: name it, evaluation.served=\[a\]"),
        ((*SERVED, "evaluation.reward_accuracy=true"), "evaluation.reward_accuracy=true needs the weights"),
        ((*SERVED, "evaluation.lm_eval=[x]"), "evaluation.lm_eval=.'x'. needs the weights"),
        (("evaluation.served=[b]",), "evaluation.served names 'b', which is no model"),
        ((*SERVED, "generation.prompts_as=text"), "set generation.text_responses=tokenize, too"),
    ],
)
def test_what_no_server_can_be_asked_for_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_served(settings_of(evaluation(*overrides)))


def test_the_server_counts_where_it_answers_and_generation_moves_nothing_else() -> None:
    plain = counted(evaluation())
    assert plain == counted(evaluation("generation.top_p=0.5", "generation.n=3", "generation.backend=hf"))
    assert "generation" not in plain and "served" not in plain["evaluation"]
    served = counted(evaluation(*SERVED))
    assert served["generation"] == {
        "backend": "openai",
        "base_url": "http://127.0.0.1:9/v1",
        "model_name": None,
        "text_responses": "refuse",
    }
    assert counted(evaluation(*SERVED, "generation.max_new_tokens=9", "generation.concurrency=2")) == served


def llama_cpp(adds_bos: bool = False, spoils: str = "") -> Callable[[dict, int], tuple[int, dict, dict]]:
    """Return what answers as llama_cpp.server does: ids of a text by the tiny tokenizer, and 'ab' to a prompt."""
    tokenizer = models.load_tokenizer(settings_of(composed("model=tiny")).model)

    def respond(body: dict, number: int) -> tuple[int, dict, dict]:
        if "input" in body:
            ids = tokenizer(body["input"].replace(spoils, "") if spoils else body["input"])["input_ids"]
            return 200, {}, {"tokens": [257, *ids] if adds_bos else ids}
        return 200, {}, {"choices": [{"text": "ab", "finish_reason": "stop", "logprobs": None}]}

    return respond


def test_a_server_answers_texts_and_its_responses_are_judged(tmp_path: Path, serve: Callable[..., StandIn]) -> None:
    server = serve(llama_cpp())
    rows = [{"prompt": f"say {i} <b>"} for i in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["generation.backend=openai", f"generation.base_url={server.url}", "generation.prompts_as=text"]
    sampled = ["generation.text_responses=tokenize", "evaluation.temperatures=[1.0]", "evaluation.max_new_tokens=7"]
    data = [f"datasets.local.test={tmp_path}/test.jsonl", f"cache_dir={tmp_path}", "exp_name=judged"]
    launch.run_task(evaluation(*asked, *sampled, *data))
    entry = read_json(tmp_path / "judged/results.json")["models"]["a"]
    assert entry["mean_response_tokens"] == 3 and entry["eot_rate"] == 1
    assert "token_entropy" not in entry, "a server does not say how sure it was"
    assert all("ab" in json.dumps(row) for row in rows_of(tmp_path / "judged/samples.jsonl"))
    prompts = [body for body in server.bodies if "prompt" in body]
    assert len(prompts) == 3 and len({body["seed"] for body in prompts}) == 3
    for body in prompts:
        assert body["prompt"].startswith("<|im_start|>user\nsay") and body["prompt"].endswith("assistant\n")
        assert (body["top_k"], body["min_p"], body["repeat_penalty"], body["top_p"]) == (0, 0, 1, 1)
        assert body["temperature"] == 1 and body["max_tokens"] == 7 and body["stop"] == ["<|im_end|>"]


def test_a_prompt_that_the_server_reads_as_other_tokens_is_refused(serve: Callable[..., StandIn]) -> None:
    tokenizer = models.load_tokenizer(settings_of(composed("model=tiny")).model)

    def text(ids: list[int], server: StandIn) -> str:
        return TextPrompts(Server(server.url, 5, 0), tokenizer, "tiny").text(ids)

    ids = tokenizer("say 7")["input_ids"]
    assert text(ids, serve(llama_cpp())) == "say 7"
    with pytest.raises(ValueError, match=r"from token 3 on: ours are .*'7'.*, the server's \['7'\]"):
        text(ids, serve(llama_cpp(spoils=" ")))
    with pytest.raises(ValueError, match="as other tokens than the model learned, from token 0 on"):
        text(ids, serve(llama_cpp(adds_bos=True)))
    tokenizer.bos_token = "<|im_start|>"
    assert text([257, *ids], serve(llama_cpp(adds_bos=True))) == "say 7", "the server puts its own in front"
    with pytest.raises(ValueError, match="has no /extras/tokenize"):
        text(ids, serve(lambda body, number: (404, {}, {"error": "not found"})))
