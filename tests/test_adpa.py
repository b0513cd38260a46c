"""ADPA joins rows and generations of the same prompt by dealing: every one of them has the weight of one."""

import json
from collections import Counter
from pathlib import Path

import launch
from conversations import Conversation
from dataloader import Example, Generation, Tokens
from tests.support.bigram import tokens
from tests.support.helpers import composed, rows_of
from trainers.adpa import dealt

NOTHING = Conversation([], None, None, None, {})


def rows_and_generations(rows: dict[int, int], responses: dict[int, int]):
    """Return examples and generations by prompt: so many rows and so many generations of each prompt (a number)."""
    examples = [
        Example([prompt], tokens([prompt], [10 + j]), None, None, NOTHING)
        for prompt, m in rows.items()
        for j in range(m)
    ]
    generations = {
        (prompt,): [Generation([prompt], [20 + j], [], "", "stop", {}) for j in range(count)]
        for prompt, count in responses.items()
    }
    return examples, generations


def supervised(sequence: Tokens) -> int | None:
    """Return the one supervised token of a sequence, None if it has none."""
    return next((i for i, on in zip(sequence.ids, sequence.response, strict=True) if on), None)


def joined(rows: dict[int, int], responses: dict[int, int]) -> list[tuple[int | None, int | None]]:
    pairs = dealt(*rows_and_generations(rows, responses))
    assert all(chosen.ids[0] == generated.ids[0] for chosen, generated in pairs)  # never another prompt's
    return [(supervised(chosen), supervised(generated)) for chosen, generated in pairs]


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
