"""ADPA joins rows and generations of the same prompt by dealing: every one of them has the weight of one."""

import json
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import launch
import models
from settings.schema import ModelConfig, typed
from tests.support.helpers import composed, rows_of
from tokens.columns import groups_of
from tokens.generations import generated_sequences, read_generations
from trainers.adpa import NONE, dealt


def keys(prompts: list[int]) -> np.ndarray:
    """Return keys [n, 16] of prompts that are numbers."""
    return np.frombuffer(b"".join(bytes([prompt] * 16) for prompt in prompts), np.uint8).reshape(-1, 16)


def joined(rows: dict[int, int], responses: dict[int, int]) -> list[tuple[int | None, int | None]]:
    """Deal so many generations of each prompt (a number) to so many of its rows: the number of the row (from 10) and of
    the generation (from 20) within the prompt, None where it is not supervised."""
    prompts = [prompt for prompt, m in rows.items() for _ in range(m)]
    answered = [prompt for prompt, n in responses.items() for _ in range(n)]
    firsts = {prompt: answered.index(prompt) for prompt in responses}
    places = [j for m in rows.values() for j in range(m)]
    found = []
    parts = [part.tolist() for part in dealt(keys(prompts), keys(answered))]
    for row, generation, with_chosen in zip(*parts, strict=True):
        assert generation == NONE or answered[generation] == prompts[row]  # never another prompt's
        answer = None if generation == NONE else 20 + generation - firsts[prompts[row]]
        found.append((10 + places[row] if with_chosen else None, answer))
    return found


def test_as_many_generations_as_rows_meet_once_each():
    assert joined({1: 3}, {1: 3}) == [(10, 20), (11, 21), (12, 22)]
    assert joined({1: 1, 2: 1}, {1: 1, 2: 1}) == [(10, 20), (10, 20)]


def test_several_generations_of_a_row_repeat_its_chosen_response_alike():
    assert joined({1: 1}, {1: 3}) == [(10, 20), (10, 21), (10, 22)]
    assert joined({1: 2}, {1: 4}) == [(10, 20), (10, 22), (11, 21), (11, 23)]


def test_what_does_not_come_out_even_is_neither_lost_nor_doubled():
    more = joined({1: 2}, {1: 5})
    assert Counter(generated for _, generated in more) == {20: 1, 21: 1, 22: 1, 23: 1, 24: 1}
    assert Counter(chosen for chosen, _ in more) == {10: 2, 11: 2, None: 1}  # the fifth has the advantage term only
    fewer = joined({1: 3}, {1: 2})
    assert fewer == [(10, 20), (11, 21), (12, None)]  # the third row has the NLL term only


def plainly(prompts: list[int], answered: list[int]) -> list[tuple[int, int, bool]]:
    """Deal prompt by prompt, row by row."""
    seen, found = Counter[int](), []
    for row, prompt in enumerate(prompts):
        its = [i for i, other in enumerate(answered) if other == prompt]
        mine, share = its[seen[prompt] :: prompts.count(prompt)], len(its) // prompts.count(prompt)
        seen[prompt] += 1
        found += [(row, generation, k < max(1, share)) for k, generation in enumerate(mine)] or [(row, NONE, True)]
    return found


def test_all_at_once_the_deals_are_those_of_row_by_row():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40, 150):
        prompts, answered = rng.integers(0, 1 + size // 3, size).tolist(), rng.integers(0, 1 + size // 3, size).tolist()
        found = dealt(keys(prompts), keys(answered))
        assert list(zip(*(part.tolist() for part in found), strict=True)) == plainly(prompts, answered)


def test_an_epoch_sees_every_row_and_generation_of_a_repeated_prompt_once(tmp_path: Path):
    """Through the command line: three rows of one prompt, two of another, one of a third are 6 items, not 14."""
    rows = [{"prompt": f"say {p}", "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate("aaabbc")]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    launch.run_task(composed(*common, "task=generate", "exp_name=gen", "generation.max_new_tokens=4"))
    generations = f"{tmp_path}/gen/generations.jsonl"
    launch.run_task(composed(*common, "exp_name=reference", "n_steps=1"))
    cache = ["task=cache", "cache.top_k=4", f"cache.reference={tmp_path}/reference/FINAL"]
    launch.run_task(composed(*common, *cache, "exp_name=adv", f"cache.generations={generations}"))
    run = ["loss=adpa", f"loss.generations={generations}", f"loss.advantages={tmp_path}/adv/CACHE", "exp_name=adpa"]
    launch.run_task(composed(*common, *run, "n_epochs=1", "model.batch_size=2", "log_every=1"))
    logged = rows_of(tmp_path / "adpa" / "metrics.jsonl")
    assert [row["examples"] for row in logged] == [2, 4, 6]
    # the same cache twice, whatever the weights, is that cache
    twice = [part.replace(f"{tmp_path}/adv/CACHE", f"[{tmp_path}/adv/CACHE,{tmp_path}/adv/CACHE]") for part in run[:3]]
    more = ["exp_name=twice", "loss.advantage_weights=[3,1]", "n_epochs=1", "model.batch_size=2", "log_every=1"]
    launch.run_task(composed(*common, *twice, *more))
    again = rows_of(tmp_path / "twice" / "metrics.jsonl")
    assert [row["loss/train"] for row in again] == pytest.approx([row["loss/train"] for row in logged], abs=1e-5)
    with pytest.raises(ValueError, match="loss.advantage_weights=.* one weight a teacher of loss.advantages: 0, 1"):
        launch.run_task(composed(*common, *twice, "exp_name=wrong", "loss.advantage_weights=[3]"))


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(typed(composed("model=tiny")["model"], ModelConfig))


def generations_of(path: Path, count: int, tokenizer, text: str = "a text") -> Path:
    """Write rows as task=generate does, every seventh with an empty response."""
    digest = models.tokenizer_digest(tokenizer)
    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            ids = [5 + (i * j) % 90 for j in range(30)]
            answer = [] if i % 7 == 6 else ids[: 1 + i % 29]
            row = {"prompt_ids": ids[:20], "response_ids": answer, "prompt": [{"role": "user", "content": text}]}
            out.write(json.dumps({**row, "response": text, "finish_reason": "stop", "tokenizer_digest": digest}) + "\n")
    return path


def test_sequences_are_those_of_the_rows_with_and_without_a_store(tmp_path: Path, tokenizer) -> None:
    path = generations_of(tmp_path / "generations.jsonl", 40, tokenizer)
    wanted = [generation.tokens for generation in read_generations(path, tokenizer)]
    for place in (None, tmp_path / "tokens", tmp_path / "tokens"):  # the second time it is there
        found = generated_sequences(path, tokenizer, place, 2)
        assert list(found) == wanted and [t.key for t in found] == [t.key for t in wanted] and len(found[3:5]) == 2
        assert [t.num_supervised for t in found] == [sum(t.response) for t in wanted]
        assert groups_of(found.prompt_keys()).max() + 1 == len({str(t.ids[:20]) for t in wanted})
    with path.open("a", encoding="utf-8") as out:  # another content is another store
        out.write(path.read_text(encoding="utf-8").splitlines()[0] + "\n")
    assert len(generated_sequences(path, tokenizer, tmp_path / "tokens")) == 41


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a store"])
def test_what_is_wrong_with_generations_is_said_alike(tmp_path: Path, tokenizer, kept: bool) -> None:
    path, place = tmp_path / "generations.jsonl", tmp_path / "tokens" if kept else None
    with pytest.raises(ValueError, match="generations.jsonl is no file: task=generate writes"):
        generated_sequences(path, tokenizer, place)
    generations_of(path, 3, tokenizer)
    lines = path.read_text(encoding="utf-8").splitlines()
    changes = {
        "{": "generations.jsonl, line 2: not valid JSON",
        "{}": "generations.jsonl, line 2: the row has no 'prompt_ids'; was it written by task=generate",
        lines[1].replace(models.tokenizer_digest(tokenizer), "other"): "line 2: its ids are of another tokenizer",
    }
    for line, message in changes.items():
        path.write_text("\n".join([lines[0], line, lines[2]]) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            generated_sequences(path, tokenizer, place)


@pytest.mark.slow
def test_a_hundred_thousand_generations_take_little_memory(tmp_path: Path, tokenizer) -> None:
    path = generations_of(tmp_path / "generations.jsonl", 100_000, tokenizer, "a long text " * 100)
    generated_sequences(path, tokenizer, tmp_path / "tokens")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = generated_sequences(path, tokenizer, tmp_path / "tokens")
    assert len(dealt(found.prompt_keys(), found.prompt_keys()).rows) == len(found)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(f"100,000 generations, {path.stat().st_size / 2**20:.0f} MB: {grown:.0f} MB more")
    assert grown < 100
