"""Generation: what is sampled, what may not be, order, seeds, the rows written, and going on after a kill."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import launch
import models
from dataloader import encode_prompt, load_examples
from generation.hf import sample
from settings.schema import DatasetConfig, GenerationConfig, ModelConfig, typed
from tasks.generate import backend_of, cut, length_batches
from tests.support.helpers import begin, composed, rows_of, write_pairs
from tokens.generations import read_generations


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    tiny = typed(composed("model=tiny")["model"], ModelConfig)
    return replace(tiny, build={**(tiny.build or {}), "vocab_size": 300})  # wider than the tokenizer's 259


@pytest.fixture(scope="module")
def tokenizer(config):
    return models.load_tokenizer(config)


@pytest.fixture(scope="module")
def model(config):
    return models.load_model(config, trainable=False)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    texts = ["hi", "a longer prompt than the first", "one", "four words are here", "x" * 50]
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def sampling(**changes) -> GenerationConfig:
    return replace(
        typed(composed()["generation"], GenerationConfig), **{"max_new_tokens": 12, "batch_size": 3, **changes}
    )


def run_sample(model, tokenizer, prompts, seed=0, stop=None, **changes):
    stop = models.stop_ids(tokenizer, model) if stop is None else stop
    return sample(model, tokenizer, prompts, sampling(**changes), stop, len(tokenizer), seed)


def forbidden(tokenizer, stop) -> list[int]:
    return [*range(259, 300), *(set(tokenizer.all_special_ids) - set(stop))]


@torch.no_grad()
def greedy_loop(model, tokenizer, ids: list[int], stop: list[int], length: int) -> list[int]:
    """Decode one prompt without padding, cache or batch."""
    start = len(ids)
    while len(ids) < start + length and (len(ids) == start or ids[-1] not in stop):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[forbidden(tokenizer, stop)] = -torch.inf
        ids = [*ids, int(logits.argmax())]
    return ids[start:]


def test_greedy_in_padded_batches_is_a_plain_loop_over_each_prompt(model, tokenizer, prompts):
    stop = models.stop_ids(tokenizer, model)
    expected = [greedy_loop(model, tokenizer, ids, stop, 12) for ids in prompts]
    assert [ids for ids, _ in run_sample(model, tokenizer, prompts, temperature=0.0)] == expected


def test_a_response_ends_with_its_stop_token_or_at_the_limit(model, tokenizer, prompts):
    stop = [tokenizer.eos_token_id, *range(100)]  # so many that some responses end early
    responses = run_sample(model, tokenizer, prompts * 8, stop=stop)
    assert {reason for _, reason in responses} == {"stop", "length"} or all(r == "stop" for _, r in responses)
    for ids, reason in responses:
        assert not set(ids[:-1]) & set(stop)
        assert (ids[-1] in stop) if reason == "stop" else (len(ids) == 12 and ids[-1] not in stop)
    assert cut([5, 2, 9, 2], [2, 3]) == ([5, 2], "stop") and cut([5, 9], [2]) == ([5, 9], "length")


def test_padding_surplus_vocabulary_and_foreign_specials_are_never_sampled(config, model, tokenizer, prompts):
    stop = models.stop_ids(tokenizer, model)
    biased = models.load_model(config, trainable=False)
    head = torch.nn.Linear(biased.config.hidden_size, 300)
    head.weight.data, head.bias.data = biased.lm_head.weight.data, torch.zeros(300)
    head.bias.data[forbidden(tokenizer, stop)] = 50.0  # without the ban nothing else would be sampled
    biased.lm_head = head
    ids = {token for response, _ in run_sample(biased, tokenizer, prompts * 4) for token in response}
    assert ids and not ids & set(forbidden(tokenizer, stop))


def test_the_sampled_distribution_is_the_models(config, tokenizer, prompts):
    sharp = models.load_model(config, trainable=False)
    sharp.generation_config.repetition_penalty = 5.0  # a folder's own habits must not shape the sample
    sharp.generation_config.top_k = 1
    own = sharp.generation_config
    responses = run_sample(sharp, tokenizer, [prompts[0]] * 2000, max_new_tokens=1, batch_size=1000)
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in responses]), minlength=300) / 2000
    logits = sharp(input_ids=torch.tensor([prompts[0]])).logits[0, -1].detach()
    logits[forbidden(tokenizer, models.stop_ids(tokenizer, sharp))] = -torch.inf
    expected = logits.softmax(-1)
    assert expected.max() < 0.9 and (expected > 0.01).sum() > 3  # worth testing
    assert (counts - expected).abs().max() < 0.05  # 4 standard errors at p = 0.5
    assert sharp.generation_config is own


def test_a_nucleus_and_a_top_k_cut_the_tail(model, tokenizer, prompts):
    logits = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].detach()
    logits[forbidden(tokenizer, models.stop_ids(tokenizer, model))] = -torch.inf
    top = set(logits.topk(3).indices.tolist())
    cut_responses = run_sample(model, tokenizer, [prompts[0]] * 300, max_new_tokens=1, batch_size=300, top_k=3)
    assert {ids[0] for ids, _ in cut_responses} == top
    one = run_sample(model, tokenizer, [prompts[0]] * 50, max_new_tokens=1, top_p=1e-6)
    assert {ids[0] for ids, _ in one} == {int(logits.argmax())}


def test_a_seed_repeats_the_responses_and_leaves_the_global_state_alone(model, tokenizer, prompts):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = run_sample(model, tokenizer, prompts, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(9)
    assert one == run_sample(model, tokenizer, prompts, seed=1) != run_sample(model, tokenizer, prompts, seed=2)


def test_batches_go_from_long_to_short_and_hold_every_prompt_once():
    batches = length_batches([[0] * n for n in (3, 9, 1, 9, 5)], 2)
    assert batches == [[1, 3], [4, 0], [2]]


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=r"generation.backend='sglang' is not known; use hf, vllm, openai"):
        backend_of("sglang")


# ---- the task


def overrides(base: Path, name: str, *extra: str) -> list[str]:
    return [
        "task=generate",
        "model=tiny",
        f"cache_dir={base}",
        f"exp_name={name}",
        "datasets=[local]",
        f"datasets.local.train={base / 'pairs.jsonl'}",
        "generation.max_new_tokens=6",
        "generation.batch_size=4",
        "generation.n=2",
        *extra,
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with 9 prompts and a finished run `whole`: 18 responses in 5 batches."""
    base = tmp_path_factory.mktemp("generate")
    write_pairs(base / "pairs.jsonl", 9)
    rows = [{**row, "score": i} for i, row in enumerate(rows_of(base / "pairs.jsonl"))]
    (base / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch.run_task(composed(*overrides(base, "whole")))
    return base


def test_rows_carry_ids_text_reason_sampling_and_origin(base, tokenizer):
    rows = rows_of(base / "whole/generations.jsonl")
    assert sorted((row["meta"]["score"], row["sample"]) for row in rows) == [(i, s) for i in range(9) for s in (0, 1)]
    for row in rows:
        assert row["prompt_ids"] == encode_prompt(tokenizer, row["prompt"])
        ids = row["response_ids"]
        body = ids[:-1] if row["finish_reason"] == "stop" else ids
        assert row["response"] == tokenizer.decode(body)
        assert row["sampling"]["temperature"] == 1.0 and row["sampling"]["n"] == 2 and row["model_digest"]
    by_prompt = {json.dumps(row["prompt_ids"]): row["response_ids"] for row in rows}
    assert any(row["response_ids"] != by_prompt[json.dumps(row["prompt_ids"])] for row in rows)
    generations = read_generations(base / "whole/generations.jsonl", tokenizer)
    assert len(generations) == 18 and sum(generations[0].tokens.response) == len(rows[0]["response_ids"])


def test_ids_of_another_tokenizer_are_refused_with_what_they_would_have_been(base, config, tokenizer):
    """By everything that computes with them: loss.generations, cache.generations, data sets, and a resume."""
    path = base / "whole/generations.jsonl"
    other_config = replace(config, tokenizer_name_or_path="assets/shop_tokenizer")
    other, mine = models.load_tokenizer(other_config), models.tokenizer_digest(tokenizer)
    message = rf"generations.jsonl, (line|row) 1: its ids are of another tokenizer .*{mine}"
    with pytest.raises(ValueError, match=message) as refused:
        read_generations(path, other)
    assert models.tokenizer_digest(other) in str(refused.value) and "decoded here" in str(refused.value)
    data = {"own": DatasetConfig(train=str(path))}
    assert len(load_examples(data, "train", tokenizer, config)) == 18
    with pytest.raises(ValueError, match=message):
        load_examples(data, "train", other, other_config)
    changed = models.load_tokenizer(config)
    changed.chat_template = "{# edited #}" + changed.chat_template
    changed.save_pretrained(base / "tokenizer")
    (base / "resumed").mkdir()
    (base / "resumed/generations.jsonl").write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="line 1: written with another tokenizer_digest"):
        launch.run_task(composed(*overrides(base, "resumed", f"model.tokenizer_name_or_path={base}/tokenizer")))
    nobodys = base / "nobodys.jsonl"
    rows = [{k: v for k, v in row.items() if k != "tokenizer_digest"} for row in rows_of(path)]
    nobodys.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"nobodys.jsonl, row 1: has token ids and no tokenizer_digest.*Sample again"):
        load_examples({"own": DatasetConfig(train=str(nobodys))}, "train", tokenizer, config)
    text = [{k: v for k, v in row.items() if not k.endswith("_ids")} for row in rows]
    nobodys.write_text("".join(json.dumps(row) + "\n" for row in text))  # the way out that the message names
    anew = load_examples({"own": DatasetConfig(train=str(nobodys))}, "train", tokenizer, config)
    assert [e.prompt for e in anew] == [row["prompt_ids"] for row in rows if row["response"].strip()]


def test_what_a_generated_row_answers_keeps_its_columns(base, config, tokenizer):
    """A verifier of rollouts on generated rows finds the reference answer where it was."""
    data = {"own": DatasetConfig(train=str(base / "whole/generations.jsonl"))}
    found = load_examples(data, "train", tokenizer, config)
    assert {e.conversation.meta["score"] for e in found} == set(range(9))


@pytest.mark.parametrize("keep", [0, 5, 8, 11, 17])
def test_a_killed_run_goes_on_to_the_same_file(base, keep):
    """`keep` whole rows and half a row lie there."""
    name = f"killed_{keep}"
    whole = (base / "whole/generations.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (base / name).mkdir()
    (base / name / "generations.jsonl").write_bytes(b"".join(lines[:keep]) + lines[keep][:40])
    launch.run_task(composed(*overrides(base, name)))
    assert (base / name / "generations.jsonl").read_bytes() == whole


def test_rows_of_another_run_are_refused(base):
    name = "other"
    (base / name).mkdir()
    lines = (base / "whole/generations.jsonl").read_bytes().splitlines(keepends=True)
    (base / name / "generations.jsonl").write_bytes(b"".join(lines[:6]))
    for change, what in (
        ("generation.seed=5", "sampling"),
        ("model.build_seed=5", "model_digest"),
        ("n_examples=3", "prompt"),
    ):
        with pytest.raises(ValueError, match=f"generations.jsonl, line 1: written with another {what}"):
            launch.run_task(composed(*overrides(base, name, change)))
    assert (base / name / "generations.jsonl").read_bytes() == b"".join(lines[:6])


@pytest.mark.slow
def test_a_run_killed_with_signal_9_loses_and_doubles_nothing(base):
    name, many = "kill9", ["generation.batch_size=1", "generation.n=3", "generation.max_new_tokens=24"]
    path = base / name / "generations.jsonl"
    process = begin(*overrides(base, name, *many), log=base / "log.txt")
    deadline = time.monotonic() + 120
    while (not path.is_file() or path.stat().st_size < 1500) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cut_at = path.read_bytes()
    assert 0 < cut_at.count(b"\n") < 27 and not (base / name / "DONE").exists()
    launch.run_task(composed(*overrides(base, name, *many)))
    assert path.read_bytes().startswith(cut_at[: cut_at.rindex(b"\n") + 1])
    launch.run_task(composed(*overrides(base, "unkilled", *many)))
    assert path.read_bytes() == (base / "unkilled/generations.jsonl").read_bytes()


def test_a_split_without_a_source_is_refused(base):
    with pytest.raises(ValueError, match="no prompts: no data set has a test source"):
        launch.run_task(composed(*overrides(base, "no_test", "generation.split=test")))
