"""vLLM for real on this machine: its responses and log-probabilities are Hugging Face's, as engine, server and cache.

tests/support/vllm_runs.py says which interpreter has vLLM.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
import models
from settings.schema import ModelConfig, typed
from teacher.cache import Reader
from teacher.quantities import Entry
from tests.support.helpers import WORDS, composed, rows_of
from tests.support.helpers import launch as run_launch
from tests.support.vllm_runs import (
    MODEL,
    NEEDS_VLLM,
    PYTHON,
    SLOWEST,
    TIE,
    Server,
    assert_greedy_is_hugging_faces,
    begun,
    generating,
    kept_through_kill,
    overrides,
    places,
    wait_for_rows,
)

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with 16 prompts, half of them with short responses: they end while the others are still under way."""
    base = tmp_path_factory.mktemp("vllm")
    with (base / "prompts.jsonl").open("w") as out:
        for i, word in enumerate(WORDS):
            short, long = f"Say only the word {word}.", f"Write {i + 1} sentences about a {word}."
            out.write(json.dumps({"prompt": long if i % 2 else short}) + "\n")
    return base


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return typed(composed(*MODEL)["model"], ModelConfig)


@pytest.fixture(scope="module")
def model(config):
    return models.load_model(config, trainable=False)


@pytest.fixture(scope="module")
def tokenizer(config):
    return models.load_tokenizer(config)


# ---- the engine


@pytest.fixture(scope="module")
def greedy(base) -> tuple[list[bytes], Path]:
    """A greedy run that is killed with signal 9 and started again: the rows of before, and its folder."""
    arguments = generating(base, "greedy", "generation.temperature=0")
    kept = kept_through_kill(arguments, base / "greedy/generations.jsonl", base / "killed.log", 2)
    done = run_launch(*arguments, timeout=SLOWEST, python=PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generation.backend=auto: vllm" in done.stdout  # the default where vLLM is installed
    return kept, base / "greedy"


def test_a_killed_run_loses_and_doubles_nothing(greedy):
    kept, folder = greedy
    lines = (folder / "generations.jsonl").read_bytes().splitlines(keepends=True)
    assert 0 < len(kept) < 16 and set(kept) <= set(lines)
    assert sorted(places(rows_of(folder / "generations.jsonl"))) == [(i, 0) for i in range(16)]


def test_greedy_vllm_is_greedy_hugging_face(greedy, model, tokenizer):
    rows = rows_of(greedy[1] / "generations.jsonl")
    assert assert_greedy_is_hugging_faces(rows, model, tokenizer) <= 2
    assert {row["sampling"]["backend"] for row in rows} == {"vllm"}


def test_the_generators_log_probabilities_are_the_trainers(greedy):
    gap = json.loads((greedy[1] / "summary.json").read_text())["logp_gap"]
    assert gap["rows"] == 16 and gap["tokens"] > 200
    assert gap["mean"] < 1e-4 and gap["max"] < 1e-3  # measured: 7e-6 and 3e-5
    row = rows_of(greedy[1] / "generations.jsonl")[0]
    assert len(row["response_logps"]) == len(row["response_ids"])


def test_samples_differ_and_keep_to_the_top_k(base, model, tokenizer):
    extra = [
        "generation.n=3",
        "generation.top_k=2",
        "generation.max_new_tokens=12",
        "n_examples=4",
        "generation.backend=vllm",
    ]
    done = run_launch(*generating(base, "sampled", *extra), timeout=SLOWEST, python=PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(base / "sampled/generations.jsonl")
    assert sorted(places(rows)) == [(i, s) for i in range(4) for s in range(3)]
    assert len({tuple(row["response_ids"]) for row in rows}) > 8
    for row in rows:
        with torch.no_grad():
            ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        second = logits.topk(2).values[:, 1]
        assert (logits.gather(1, ids[0, len(row["prompt_ids"]) :, None])[:, 0] >= second - TIE).all()


# ---- the calculator

WRONG = [
    "Copy this line: Total <<12+30=43>>43 eggs, then <<9*9=82>>82 more.",
    "Copy this line: Total <<12+30=42>>42 eggs, then <<9*9=71>>71 more.",
]
CALCULATING = ["generation.calculator=true", "generation.temperature=0"]


@pytest.fixture(scope="module")
def sums(base) -> list[str]:
    """Two prompts with wrong values, which SmolLM2 copies when it is alone, and two without a mark."""
    prompts = [*WRONG, "Say only the word cat.", "Write two sentences about a cat."]
    (base / "sums.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return [f"datasets.local.train={base / 'sums.jsonl'}", *CALCULATING]


def assert_calculated(rows: list[dict], model, tokenizer) -> None:
    assert assert_greedy_is_hugging_faces(rows, model, tokenizer, "generation.calculator=true") == 0
    responses = " ".join(row["response"] for row in rows)
    assert (
        "<<12+30=42>>" in responses
        and "<<9*9=81>>" in responses
        and "=43>>" not in responses
        and "=71>>" not in responses
    )
    for row in rows:
        assert ("response_logps" in row) == ("=" not in row["response"])  # what was written was not sampled


def test_vllm_with_the_calculator_responses_as_hugging_face_does(base, sums, model, tokenizer):
    arguments = generating(base, "calculated", *sums, "generation.backend=vllm")
    done = run_launch(*arguments, timeout=SLOWEST, python=PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_calculated(rows_of(base / "calculated/generations.jsonl"), model, tokenizer)


# ---- the cache


def test_the_two_backends_caches_agree(base, greedy):
    """Two float16 roundings of numbers that differ by 1e-4 are at most a unit in the last place apart, and that."""
    common = [
        "task=cache",
        f"cache.generations={greedy[1] / 'generations.jsonl'}",
        "cache.top_k=20",
    ]
    for backend in ("hf", "vllm"):
        done = run_launch(
            *overrides(base, f"cache_{backend}", *common, f"cache.backend={backend}"), timeout=SLOWEST, python=PYTHON
        )
        assert done.returncode == 0, done.stdout + done.stderr
    hf, vllm = (Reader(base / f"cache_{backend}/CACHE") for backend in ("hf", "vllm"))
    assert (hf.meta.backend, vllm.meta.backend) == ("hf", "vllm")
    assert (hf.meta.num_tokens, hf.meta.data_digest) == (vllm.meta.num_tokens, vllm.meta.data_digest)
    for row in rows_of(greedy[1] / "generations.jsonl"):
        ids = row["prompt_ids"] + row["response_ids"]
        mask = [False] * len(row["prompt_ids"]) + [True] * len(row["response_ids"])
        ours, theirs = (Entry(**reader.get(ids, mask)) for reader in (hf, vllm))
        assert (np.abs(ours.values - theirs.values) <= np.abs(ours.values) * 2**-10 + 1e-4).all()
        assert np.abs(ours.tail - theirs.tail).max() <= 2**-11 + 1e-4
        for t in zip(ours.ids, theirs.ids, ours.values, strict=True):  # another id only where two are tied
            for place in np.flatnonzero(t[0] != t[1]):
                near = np.abs(t[2] - t[2][place])
                assert np.sort(near)[1] <= np.abs(t[2][place]) * 2**-10 + 1e-4 or place == 19


def test_a_cache_is_not_continued_by_the_other_backend(base, greedy):
    common = [
        "task=cache",
        f"cache.generations={greedy[1] / 'generations.jsonl'}",
        "cache.top_k=20",
    ]
    (base / "cache_vllm/DONE").unlink()
    with pytest.raises(ValueError, match="made with another backend: backend='vllm', this run has 'hf'"):
        launch.run_task(composed(*overrides(base, "cache_vllm", *common)))


# ---- the server


@pytest.fixture(scope="module")
def server(base, config) -> Iterator[Server]:
    server = Server(str(models.model_source(config)), base / "server.log")
    yield server
    server.kill()


def asking(base: Path, name: str, server: Server, *extra: str) -> list[str]:
    return generating(
        base,
        name,
        "generation.backend=openai",
        f"generation.base_url={server.url}",
        "generation.concurrency=4",
        "generation.temperature=0",
        *extra,
    )


def test_a_servers_responses_are_hugging_faces(base, server, model, tokenizer):
    launch.run_task(composed(*asking(base, "served", server)))
    rows = rows_of(base / "served/generations.jsonl")
    assert sorted(places(rows)) == [(i, 0) for i in range(16)]
    assert assert_greedy_is_hugging_faces(rows, model, tokenizer) <= 2
    gap = json.loads((base / "served/summary.json").read_text())["logp_gap"]
    assert gap["mean"] < 1e-4 and gap["max"] < 1e-3


def test_a_servers_responses_are_the_engines(base, server, greedy):
    """Two rounds of rounding: rows part only where each parts from Hugging Face at a tie."""
    launch.run_task(composed(*asking(base, "served_again", server)))
    ours, theirs = (rows_of(base / f"{name}/generations.jsonl") for name in ("greedy", "served_again"))
    assert places(ours) == places(theirs)
    assert sum(a["response_ids"] == b["response_ids"] for a, b in zip(ours, theirs, strict=True)) >= 14


def test_a_server_with_the_calculator_responses_as_hugging_face_does(base, server, sums, model, tokenizer):
    launch.run_task(composed(*asking(base, "served_sums", server, *sums)))
    assert_calculated(rows_of(base / "served_sums/generations.jsonl"), model, tokenizer)


def test_a_server_that_gives_text_is_tokenized_only_on_demand_and_the_rows_say_so(base, server, tokenizer, capsys):
    launch.run_task(composed(*asking(base, "text", server, "generation.text_responses=tokenize")))
    assert "warning: 16 responses have ids made from the server's text" in capsys.readouterr().out
    text, ids = rows_of(base / "text/generations.jsonl"), rows_of(base / "served/generations.jsonl")
    assert all(row["ids_from_text"] for row in text) and not any("ids_from_text" in row for row in ids)
    assert json.loads((base / "text/summary.json").read_text())["ids_from_text"] == 16
    assert sum(a["response"] == b["response"] for a, b in zip(text, ids, strict=True)) >= 14


def test_a_prompt_that_is_too_long_is_the_servers_own_message(base, server):
    with pytest.raises(ValueError, match=r"refuses the request, HTTP 400.*512"):
        launch.run_task(composed(*asking(base, "long", server, "generation.max_new_tokens=600")))


def test_a_name_that_is_not_served_is_refused(base, server):
    with pytest.raises(ValueError, match=r"generation.model_name='gpt': .* serves smollm2"):
        launch.run_task(composed(*asking(base, "name", server, "generation.model_name=gpt")))


def test_a_killed_client_loses_and_doubles_nothing(base, server):
    arguments = asking(base, "client", server, "generation.max_new_tokens=48")
    path = base / "client/generations.jsonl"
    kept = kept_through_kill(arguments, path, base / "client.log", 3)
    launch.run_task(composed(*arguments))
    assert 0 < len(kept) < 16 and set(kept) <= set(path.read_bytes().splitlines(keepends=True))
    assert sorted(places(rows_of(path))) == [(i, 0) for i in range(16)]


def test_a_server_killed_in_the_middle_and_started_again_loses_and_doubles_nothing(base, server):
    """One run is patient and goes on by itself; the other gives up with one message and is started again."""
    many = ["generation.max_new_tokens=48", "generation.concurrency=2"]
    patient = begun(asking(base, "patient", server, *many, "generation.retries=30"), base / "patient.log")
    hasty = begun(asking(base, "hasty", server, *many, "generation.retries=1"), base / "hasty.log")
    paths = [base / name / "generations.jsonl" for name in ("patient", "hasty")]
    for path, process in zip(paths, (patient, hasty), strict=True):
        wait_for_rows(path, 2, process)
    server.kill()
    assert hasty.wait(timeout=120) == 2
    message = (base / "hasty.log").read_text()
    assert message.count("error:") == 1 and "2 times in a row. Is the server of generation.base_url up?" in message
    kept = [path.read_bytes().splitlines(keepends=True) for path in paths]
    assert all(0 < len(lines) < 16 for lines in kept) and patient.poll() is None
    server.start()
    assert patient.wait(timeout=300) == 0, (base / "patient.log").read_text()
    launch.run_task(composed(*asking(base, "hasty", server, *many)))
    for path, lines in zip(paths, kept, strict=True):
        assert set(lines) <= set(path.read_bytes().splitlines(keepends=True))
        assert sorted(places(rows_of(path))) == [(i, 0) for i in range(16)]
