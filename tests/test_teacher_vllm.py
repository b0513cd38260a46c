"""Two teachers in vLLM engines, one after the other: parity with teachers here, kills, and what is refused.

The engine is a stand-in that scores with a real model of ours; tests/test_cache_vllm.py asks a real vLLM.
"""

from pathlib import Path

import numpy as np
import pytest

import launch
import models
from settings.artifacts import is_done
from settings.schema import ModelConfig, typed
from tests.support.engine import Faults, Killed, install
from tests.support.helpers import composed, write_pairs
from tests.test_served_teacher import bytes_of, entries

K, ROWS = 4, 7
SEQUENCES = 2 * ROWS
BOTH = 2 * 2 + 2 * SEQUENCES  # requests of a whole cache: two probes of two requests, every sequence by each teacher


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("engines")
    write_pairs(base / "pairs.jsonl", ROWS)
    for name, seed in (("first", 0), ("second", 5)):
        config = typed(composed("model=tiny", f"++model.build_seed={seed}")["model"], ModelConfig)
        models.load_model(config, trainable=False).save_pretrained(base / name)
        models.load_tokenizer(config).save_pretrained(base / name)
    return base


def common(base: Path) -> list[str]:
    return [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={base}/pairs.jsonl"]


def asking(base: Path, name: str, *overrides: str) -> list[str]:
    own = ["task=cache", f"exp_name={name}", f"cache.top_k={K}", "cache.batch_size=3", "cache.beta=2"]
    teachers = [f"model.load_from={base}/first", f"cache.reference={base}/second"]
    return [*common(base), *own, *teachers, "cache.flush_seconds=0", *overrides]


def cache(base: Path, name: str, *overrides: str) -> Path:
    launch.run_task(composed(*asking(base, name, *overrides)))
    return base / name / "CACHE"


@pytest.mark.parametrize("given_ids", ["binary", pytest.param("whole_vocabulary", marks=pytest.mark.slow)])
def test_advantages_of_two_engines_are_those_of_two_teachers_here(base, monkeypatch, given_ids):
    engine = install(monkeypatch)
    there = cache(base, given_ids, "cache.backend=vllm", f"cache.given_ids={given_ids}")
    ours, theirs = entries(cache(base, f"{given_ids}_here")), entries(there)
    assert ours.keys() == theirs.keys() and len(ours) == SEQUENCES
    for key, arrays in ours.items():
        assert np.array_equal(arrays["ids"], theirs[key]["ids"])
        for name in arrays.keys() - {"ids"}:
            np.testing.assert_allclose(theirs[key][name], arrays[name], rtol=2**-10, atol=2e-5)
    assert [Path(start["model"]).name for start in engine.started] == ["first", "second"]
    assert len(engine.requests) == BOTH and not (base / given_ids / "TOP_K").exists()
    widths = {request.prompt_logprobs for _, request in engine.requests if hasattr(request, "prompt_logprobs")}
    assert widths == ({K, -1} if given_ids == "whole_vocabulary" else {K})


@pytest.mark.slow
def test_a_cache_that_is_killed_asks_each_engine_only_for_what_is_missing(base, monkeypatch):
    """Killed while the first teacher scores, then while the second does; batches of three are asked for again whole."""
    whole = bytes_of(cache_with(base, monkeypatch, "at_once", Faults()))
    for name, dies in (("in_first", 2 + 8), ("in_second", 4 + SEQUENCES + 8)):
        with pytest.raises(Killed):
            cache_with(base, monkeypatch, name, Faults(dies_after=dies))
        assert is_done(base / name / "TOP_K") == (name == "in_second")
        for key, value in (("reference", f"{base}/first"), ("beta", "1")):
            with pytest.raises(ValueError, match=f"made with another {key}"):
                cache(base, name, "cache.backend=vllm", f"cache.{key}={value}")
        engine = install(monkeypatch)
        assert bytes_of(cache(base, name, "cache.backend=vllm")) == whole
        probes = 2 * len(engine.started)
        assert len(engine.started) == (1 if name == "in_second" else 2)
        assert len(engine.requests) == probes + (SEQUENCES - 6) + (SEQUENCES if name == "in_first" else 0)
    again = install(monkeypatch)
    (base / "in_second/DONE").unlink(missing_ok=True)
    cache(base, "in_second", "cache.backend=vllm")
    assert again.started == []  # a cache that is whole asks nobody


def cache_with(base: Path, monkeypatch, name: str, faults: Faults) -> Path:
    install(monkeypatch, faults)
    return cache(base, name, "cache.backend=vllm")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("refused", "requires the V2 model runner.*VLLM_USE_V2_MODEL_RUNNER=1 .*cache.given_ids=whole_vocabulary"),
        ("unknown", "Unexpected keyword.*vLLM 0.32 or newer"),
        ("ignored", "has no prompt_token_id_logprobs.*VLLM_USE_V2_MODEL_RUNNER=1"),
        ("shifted", "other log-probabilities when it is asked for them by id"),
    ],
)
def test_an_engine_that_cannot_score_given_ids_is_refused_before_the_first_sequence(base, monkeypatch, fault, said):
    engine = install(monkeypatch, Faults(given_ids=fault))
    with pytest.raises(ValueError, match=said):
        cache(base, f"no_{fault}", "cache.backend=vllm")
    assert len(engine.started) == 1 and len(engine.requests) <= 2
    assert not list((base / f"no_{fault}").glob("*/shard-*"))


def test_a_quantity_of_the_work_in_between_cannot_be_asked_for():
    with pytest.raises(ValueError, match="cache.quantity='top_k' is not known"):
        launch.settings_of(composed("task=cache", "cache.quantity=top_k"))
