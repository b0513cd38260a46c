"""Teachers that stand elsewhere: parity with a teacher here, what is refused, and what a failure leaves.

The server is a stand-in that scores with a real model of ours; tests/test_cache_vllm.py asks a real vLLM.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import launch
import models
from generation.server import in_order
from settings.schema import ModelConfig, typed
from teacher import protocol
from teacher.cache import Reader
from teacher.served import PROBE_TEXT, probe_row
from tests.support.helpers import composed, write_pairs
from tests.support.scoring_server import Faults, ScoringServer

K = 4
SERVED, URL = "cache.backend=server", "cache.base_url=http://here:8000/v1"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("served")
    write_pairs(base / "pairs.jsonl", 11)
    launch.run_task(
        composed(*common(base), "exp_name=second", "++model.build_seed=5", "n_steps=2", "lr=1e-3", "loss=sft")
    )
    return base


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return typed(composed("model=tiny")["model"], ModelConfig)


@pytest.fixture(scope="module")
def tokenizer(config):
    return models.load_tokenizer(config)


@pytest.fixture(scope="module")
def both(base, config) -> tuple:
    """The teacher, which is the model of `model=tiny`, and the reference teacher, which is in a folder."""
    second = models.load_model(config, source=f"{base}/second/FINAL", trainable=False)
    return models.load_model(config, trainable=False), second


@pytest.fixture
def serve(both, tokenizer) -> Iterator[Callable[..., ScoringServer]]:
    started: list[ScoringServer] = []

    def start(which: int = 0, faults: Faults = Faults(), **options) -> ScoringServer:  # noqa: B008
        name = ("teacher", "start")[which]
        started.append(ScoringServer(both[which], tokenizer, **{"name": name, "faults": faults, **options}))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def common(base: Path) -> list[str]:
    return [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={base}/pairs.jsonl"]


def asking(base: Path, name: str, *overrides: str) -> list[str]:
    own = ["task=cache", f"exp_name={name}", f"cache.top_k={K}", "cache.batch_size=3", "cache.retries=0"]
    return [*common(base), *own, *overrides]


def at(*servers: ScoringServer) -> list[str]:
    keys = ("cache.base_url", "cache.reference_base_url")
    return ["cache.backend=server", *(f"{key}={server.url}" for key, server in zip(keys, servers, strict=False))]


def cache(base: Path, name: str, *overrides: str) -> Path:
    launch.run_task(composed(*asking(base, name, *overrides)))
    return base / name / "CACHE"


def entries(folder: Path) -> dict:
    """Return every sequence (ids, mask) with its arrays."""
    reader = Reader(folder)
    found = [(tuple(ids), tuple(mask)) for ids, mask in reader.sequences(10**6)]
    return {key: reader.get(*map(list, key)) for key in found}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*/*"))}


# ---- parity


@pytest.mark.parametrize("given_ids", ["binary", "whole_vocabulary"])
@pytest.mark.parametrize("quantity", ["logprob", "advantage"])
def test_a_served_teachers_cache_is_that_of_a_teacher_here(base, serve, quantity, given_ids):
    """float16 on disk of numbers that differ by float32 sums in another padding: a unit in the last place, or none."""
    second = quantity == "advantage"
    here = cache(
        base, f"here_{quantity}", *([f"cache.reference={base}/second/FINAL", "cache.beta=2"] if second else [])
    )
    servers = [serve(0, max_logprobs=-1), serve(1, max_logprobs=-1)][: 1 + second]
    beta = ["cache.beta=2"] if second else []
    there = cache(base, f"there_{quantity}_{given_ids}", *at(*servers), f"cache.given_ids={given_ids}", *beta)
    ours, theirs = entries(here), entries(there)
    assert ours.keys() == theirs.keys() and len(ours) == 22
    for key, arrays in ours.items():
        assert np.array_equal(arrays["ids"], theirs[key]["ids"])
        for name in arrays.keys() - {"ids"}:
            np.testing.assert_allclose(theirs[key][name], arrays[name], rtol=2**-10, atol=1e-5)
    one, other = (Reader(folder).meta for folder in (here, there))
    for name in ("quantity", "k", "vocab_size", "tokenizer_digest", "template_digest", "data_digest", "num_tokens"):
        assert getattr(one, name) == getattr(other, name)
    assert (other.backend, other.precision, other.teacher_digest) == ("server", "served", "served:teacher")
    assert other.reference_digest == ("served:start" if second else None)


def test_a_servers_float32_numbers_are_the_models_within_1e_5(serve, both, tokenizer):
    """Before float16 on disk: top k, given ids and whole vocabulary, with a hole in the response."""
    server, row = serve(0, max_logprobs=-1), probe_row(tokenizer)
    assert row.response[12:14] == [False, False] and sum(row.response) == 54
    top = protocol.top_k_of(
        server.generate(protocol.top_k_request("teacher", row.ids, K))[1], row.ids, row.response, K, len(tokenizer)
    )
    exact = server.logps(row.ids)[[t - 1 for t, on in enumerate(row.response) if on]].astype(np.float64)
    assert np.array_equal(top.ids, np.argsort(-exact, axis=1, kind="stable")[:, :K])
    np.testing.assert_allclose(top.logps, np.take_along_axis(exact, top.ids, 1), atol=1e-6)
    np.testing.assert_allclose(top.tail, 1 - np.exp(np.take_along_axis(exact, top.ids, 1)).sum(1), atol=1e-6)
    wanted = top.ids[:, ::-1].copy()
    body = protocol.given_ids_request("teacher", row.ids, row.response, wanted)
    given = protocol.given_logps_of(server.generate(body)[1], row.ids, row.response, K)
    whole = server.generate(protocol.top_k_request("teacher", row.ids, -1))[1]
    gathered = protocol.gathered_logps_of(whole, row.ids, row.response, wanted)
    np.testing.assert_allclose(given, top.logps[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(gathered, given, atol=1e-5)


def test_a_tie_at_the_border_leaves_the_token_itself_out():
    """Where a token that is tied with the K-th entry has rank K, too, K + 1 entries have rank <= K."""
    entry = lambda rank, logp: {"rank": rank, "logprob": logp}  # noqa: E731
    row = {"9": entry(2, -1.5), "3": entry(1, -0.5), "5": entry(2, -1.5)}
    answer = {"prompt_token_ids": [1, 9], "prompt_logprobs": [None, row]}
    assert protocol.top_k_of(answer, [1, 9], [False, True], 2, 10).ids.tolist() == [[3, 5]]


def test_training_reads_a_served_cache(base, serve):
    folder = cache(base, "to_train_on", *at(serve(0)))
    launch.run_task(
        composed(*common(base), "exp_name=student", "loss=dckd", f"loss.teacher_cache={folder}", "n_steps=1", "lr=1e-3")
    )
    assert (base / "student" / "FINAL").is_dir()


# ---- what is refused before the first sequence


@pytest.mark.parametrize(
    ("faults", "options", "words"),
    [
        (Faults(no_scale_out=True), {}, "HTTP 403.*--enable-scale-out"),
        (Faults(), {"max_logprobs": 3}, "HTTP 400.*--max-logprobs 4"),
        (Faults(ignores_top_k=True), {}, "no prompt_logprobs: the server ignores that field"),
        (Faults(no_ids=True), {}, "ignores return_token_ids"),
        (Faults(wrong_ids=True), {}, r"scored other ids than were sent: 64 of 64, the first difference at 63: \[7\]"),
        (Faults(one_row_less=True), {}, "has 63 rows for 64 tokens"),
        (Faults(few=True), {}, "3 of the 4 most probable ids came back before token 63"),
        (Faults(value=float("nan")), {}, "1 of 216 log-probabilities are not finite, the first is nan"),
        (Faults(value=-9999.0), {}, "not finite, the first is -9999"),
        (Faults(value=0.5), {}, "above 0, the first is 0.5"),
        (Faults(), {"max_model_len": 64}, "takes 64 tokens.* --max-model-len 65"),
        (Faults(), {"template": "{{ messages[0]['content'] }}"}, "another chat template.*--chat-template"),
        (Faults(errors=99), {}, "HTTP 500.*1 times in a row. Is the server of cache.base_url up"),
    ],
)
def test_a_teacher_that_cannot_do_it_is_refused_with_the_flag_to_set(base, serve, faults, options, words):
    server, name = serve(0, faults, **options), re.sub(r"\W", "", words)
    with pytest.raises(ValueError, match=words) as caught:
        cache(base, f"no_{name}", *at(server), "n_examples=2")
    assert server.url.removesuffix("/v1") in str(caught.value)
    assert len(server.requests) <= 1  # the probe alone, never row by row
    assert not list((base / f"no_{name}" / "CACHE").glob("shard-*"))


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (
            Faults(no_given_ids="refused"),
            "V2 model runner.*VLLM_USE_V2_MODEL_RUNNER=1.*cache.given_ids=whole_vocabulary",
        ),
        (Faults(no_given_ids="ignored"), "ignores prompt_logprob_token_ids.*cache.given_ids=whole_vocabulary"),
        (Faults(shifted=True), "not aligned"),
    ],
)
def test_a_reference_that_cannot_score_given_ids_is_refused(base, serve, faults, words):
    servers = serve(0), serve(1, faults)
    with pytest.raises(ValueError, match=words):
        cache(base, f"no_{faults.no_given_ids}{faults.shifted}", *at(*servers))
    assert len(servers[1].requests) == 2


def test_another_tokenizer_is_shown_by_its_ids(base, serve, tokenizer):
    class Other:
        bos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [5, *tokenizer(text, add_special_tokens=False)["input_ids"]]}

    server = serve(0)
    server.tokenizer = Other()
    with pytest.raises(ValueError, match="has another tokenizer.* they part at 0: .*tokenizer_name_or_path"):
        cache(base, "other_tokenizer", *at(server))


def test_a_server_without_tokenize_is_said_to_be_unchecked(base, serve, capsys):
    cache(base, "unchecked", *at(serve(0, Faults(no_tokenize=True))), "n_examples=1")
    out = capsys.readouterr().out
    assert "tokenizer not checked (/tokenize answers HTTP 404); chat template not checked" in out
    cache(base, "compared", *at(serve(0)), "n_examples=1")
    assert "tokenizer equal by ids; chat template equal by ids" in capsys.readouterr().out


def test_one_model_behind_both_addresses_is_refused_or_warned_of(base, serve, capsys):
    server = serve(0)
    with pytest.raises(ValueError, match="is its own reference: every advantage would be 0"):
        cache(base, "own", *at(server, server))
    cache(base, "twice", *at(server, serve(0)), "n_examples=1")
    assert "Do they serve one model?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([SERVED], "needs cache.base_url=http://HOST:PORT/v1"),
        ([SERVED, "cache.base_url=http://me:secret@host/v1"], "without a key or password"),
        ([URL], "is for cache.backend=server, not hf"),
        ([SERVED, URL, "cache.reference=x"], "set cache.reference_base_url"),
        ([SERVED, URL, "cache.reference_model_name=x"], "needs cache.reference_base_url"),
        ([SERVED, URL, "cache.quantity=value"], "cannot give cache.quantity=value"),
        ([SERVED, URL, "cache.quantity=advantage"], "set cache.reference_base_url="),
        (["cache.given_ids=all"], "cache.given_ids"),
        (["cache.concurrency=0"], "cache.concurrency=0 must be at least 1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        launch.settings_of(composed("task=cache", *overrides))


def test_a_name_that_is_not_served_is_refused(base, serve):
    with pytest.raises(ValueError, match="cache.model_name='gpt': .* serves teacher. Set cache.model_name"):
        cache(base, "name", *at(serve(0)), "cache.model_name=gpt")


# ---- failures, and going on


def test_a_server_that_dies_loses_nothing_and_is_named(base, serve):
    """Killed behind 14 requests; the second try asks for what is missing and for a probe."""
    whole = bytes_of(cache(base, "undying", *at(serve(0))))
    dying = serve(0, Faults(dies_after=14))
    named = ["cache.model_name=teacher", "cache.concurrency=2"]
    with pytest.raises(ValueError, match=r"Is the server of cache.base_url up\?.* of 22 sequences are in ") as caught:
        cache(base, "died", *at(dying), *named)
    assert dying.url.removesuffix("/v1") in str(caught.value)
    done = int(re.search(r"(\d+) of 22 sequences", str(caught.value)).group(1))
    assert 6 <= done < 14 and not (base / "died" / "DONE").exists()
    again = serve(0)  # on another port
    assert bytes_of(cache(base, "died", *at(again), *named)) == whole
    assert len(again.requests) == 1 + 22 - done


def test_failures_that_pass_are_tried_again_and_requests_are_bounded(base, serve):
    server = serve(0, Faults(errors=1, seconds=0.02))
    folder = cache(base, "flaky", *at(server), "cache.retries=2", "cache.concurrency=3")
    assert Reader(folder).meta.num_sequences == 22
    assert server.most_busy == 3 and len(server.requests) == 24  # a probe twice, 22 sequences


def test_a_server_that_is_too_slow_is_given_up_within_the_time_limit(base, serve):
    with pytest.raises(ValueError, match=r"no answer within cache.timeout=0.3 s, 1 times in a row"):
        cache(base, "slow", *at(serve(0, Faults(seconds=5))), "cache.timeout=0.3")


def test_a_cache_does_not_go_on_with_another_model_under_the_same_name(base, serve):
    named = ["cache.model_name=teacher", "cache.concurrency=1"]
    with pytest.raises(ValueError, match="the same command asks for the rest"):
        cache(base, "swapped", *at(serve(0, Faults(dies_after=9))), *named)
    before = bytes_of(base / "swapped" / "CACHE")
    with pytest.raises(ValueError, match="begun with another teacher than .* differ by .* cache.probe_tolerance=0.01"):
        cache(base, "swapped", *at(serve(1, name="teacher")), *named)
    with pytest.raises(ValueError, match="another model: teacher_digest='served:teacher', this run has 'served:gpt'"):
        cache(base, "swapped", *at(serve(0, name="gpt")), "cache.model_name=gpt")
    assert bytes_of(base / "swapped" / "CACHE") == before
    (base / "swapped/CACHE/served.json").unlink()
    with pytest.raises(ValueError, match="served.json is missing"):
        cache(base, "swapped", *at(serve(0)), *named)


def test_answers_in_any_order_are_taken_in_ours_and_no_more_than_asked_are_waiting():
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 13:
            raise ValueError("thirteen")
        return i * i

    found = in_order(range(40), work, concurrency=3, ahead=5)
    assert [next(found) for _ in range(4)] == [0, 1, 4, 9]
    assert max(begun) < 4 + 5
    with pytest.raises(ValueError, match="thirteen"):
        assert [*found]
    assert max(begun) <= 13 + 5


def test_served_json_says_who_was_asked(base, serve):
    servers = serve(0), serve(1)
    folder = cache(base, "said", *at(*servers), "n_examples=1")
    said = json.loads((folder / "served.json").read_text())
    assert [(part["model"], part["url"] + "/v1") for part in said.values()] == [
        ("teacher", servers[0].url),
        ("start", servers[1].url),
    ]
    assert all(len(part["ids"]) == 1 + len(part["logps"]) == 64 for part in said.values())
    assert len(PROBE_TEXT) > 64 and "OPENAI_API_KEY" not in os.environ
