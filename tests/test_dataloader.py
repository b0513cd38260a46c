"""Rows become conversations, conversations become ids: formats, masks, truncation, order."""

import json
from collections import Counter
from pathlib import Path

import pytest

import models
from conversations import find_format, parse_hh, read_rows, to_conversation
from dataloader import (
    collate,
    encode_example,
    epoch_order,
    global_batches,
    load_examples,
    local_micro_batches,
    turn_end,
)
from settings.schema import DatasetConfig, ModelConfig, typed
from tests.helpers import composed, write_pairs


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return typed(composed("model=tiny")["model"], ModelConfig)


@pytest.fixture(scope="module")
def tokenizer(config):
    return models.load_tokenizer(config)


def encoded(row, tokenizer, config, supervise="last"):
    conversation = to_conversation(row, find_format(row, "here"), "here")
    return encode_example(tokenizer, conversation, config, supervise, Counter())


def test_every_format_gives_the_same_ids(tokenizer, config):
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]
    from_messages = encoded({"messages": messages}, tokenizer, config)
    from_strings = encoded({"prompt": "hi there", "response": "yes"}, tokenizer, config)
    pair = encoded({"prompt": "hi there", "chosen": "yes", "rejected": "no"}, tokenizer, config)
    hh = encoded(
        {"chosen": "\n\nHuman: hi there\n\nAssistant: yes", "rejected": "\n\nHuman: hi there\n\nAssistant: no"},
        tokenizer,
        config,
    )
    assert from_messages.response == from_strings.response == pair.chosen == hh.chosen
    assert from_messages.prompt == pair.prompt and pair.rejected == hh.rejected


def test_the_end_of_turn_is_supervised_exactly_once(tokenizer, config):
    example = encoded({"prompt": "hi", "response": "yes"}, tokenizer, config)
    supervised = [i for i, on in zip(*example.response, strict=True) if on]
    assert supervised.count(turn_end(tokenizer).id) == 1 and supervised[-1] == turn_end(tokenizer).id
    assert tokenizer.decode(supervised[:-1]) == "yes"


def test_supervise_all_masks_every_assistant_turn_and_no_user_turn(tokenizer, config):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    every = encoded({"messages": messages}, tokenizer, config, "all").response
    last = encoded({"messages": messages}, tokenizer, config).response
    end = tokenizer.decode([turn_end(tokenizer).id])
    assert tokenizer.decode([i for i, on in zip(*every, strict=True) if on]) == f"1{end}2{end}"
    assert tokenizer.decode([i for i, on in zip(*last, strict=True) if on]) == f"2{end}"
    assert every.ids == last.ids


def test_hh_texts_keep_their_turns():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d\n\nAssistant: e"
    assert [(m["role"], m["content"]) for m in parse_hh(text)] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c d"),
        ("assistant", "e"),
    ]


def test_shp_prefers_what_labels_says():
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}
    assert to_conversation(row, "shp", "here").chosen[0]["content"] == "b"


def test_long_prompts_lose_their_oldest_turns_first(tokenizer, config):
    from dataclasses import replace

    short = replace(config, max_prompt_length=60, max_length=100)
    messages = [
        {"role": "user", "content": "old " * 20},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "new"},
        {"role": "assistant", "content": "yes"},
    ]
    example = encoded({"messages": messages}, tokenizer, short)
    assert len(example.prompt) <= 60
    assert "new" in tokenizer.decode(example.prompt) and "old" not in tokenizer.decode(example.prompt)


def test_a_cut_response_never_pretends_to_end(tokenizer, config):
    from dataclasses import replace

    short = replace(config, max_prompt_length=60, max_length=70)
    example = encoded({"prompt": "hi", "response": "long " * 50}, tokenizer, short)
    assert len(example.response.ids) == 70 and example.response.ids[-1] != turn_end(tokenizer).id


def test_broken_line_names_file_and_line(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        read_rows(str(file))


def test_json_parquet_and_saved_folders_are_read_alike(tmp_path: Path):
    import datasets

    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert (
        read_rows(str(tmp_path / "a.json"))
        == read_rows(str(tmp_path / "a.parquet"))
        == read_rows(str(tmp_path / "saved"))
        == rows
    )


def test_rows_without_a_supervised_token_are_refused_when_all_are(tmp_path: Path, tokenizer, config):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": ""}\n')
    with pytest.raises(ValueError, match="no train row keeps a supervised token"):
        load_examples({"a": DatasetConfig(train=str(tmp_path / "a.jsonl"))}, "train", tokenizer, config)


def test_weights_mix(tmp_path: Path, tokenizer, config):
    file = write_pairs(tmp_path / "a.jsonl", 10)
    for weight, count in ((1.0, 10), (0.5, 5), (2.3, 23)):
        assert (
            len(load_examples({"a": DatasetConfig(train=str(file), weight=weight)}, "train", tokenizer, config))
            == count
        )


def test_order_is_a_function_of_seed_and_epoch_and_every_example_comes_once():
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0) != epoch_order(50, 1, 1)
    seen = [i for batch in global_batches(50, 8, 1, 0) for i in batch]
    assert sorted(seen) == list(range(50))
    dealt = [i for rank in range(2) for micro in local_micro_batches(list(range(7)), 2, 2, rank, 2) for i in micro]
    assert sorted(dealt) == list(range(7))


def test_collate_pads_right_with_masks(tokenizer, config):
    rows = [encoded({"prompt": "hi", "response": r}, tokenizer, config).response for r in ("a", "a longer one")]
    batch = collate(rows, 0)
    assert batch.ids.shape == batch.attention.shape == batch.response.shape
    assert batch.attention.sum(1).tolist() == [len(r.ids) for r in rows]
    assert batch.response.sum(1).tolist() == [sum(r.response) for r in rows]
