"""Rows become conversations, conversations become ids: formats, masks, truncation, order."""

import json
from collections import Counter
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import pytest
from transformers import AddedToken
from transformers.utils import chat_template_utils

import launch
import models
from conversations import PARSERS, find_format, parse_hh, to_conversation
from dataloader import (
    collate,
    encode_example,
    encode_prompt,
    epoch_order,
    load_examples,
)
from generation.interface import forbidden_ids
from settings.paths import ROOT
from settings.schema import DatasetConfig, ModelConfig, typed
from templates import render, stopped, template_digest, tokenizer_digest, turn_end
from tests.support.helpers import composed, write_pairs
from tokens.sources import check_source, read_rows


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


def written(path: Path, *rows: dict) -> str:
    """Write rows as JSONL and return the path as a source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(tmp_path: Path, tokenizer, config, *rows: dict, split: str = "train", **options) -> list:
    source = {split: written(tmp_path / "a.jsonl", *rows)}
    return load_examples({"a": DatasetConfig(**source, **options)}, split, tokenizer, config)


def test_rows_without_a_supervised_token_are_refused_when_all_are(tmp_path: Path, tokenizer, config):
    empty = {"prompt": "what is it?", "response": ""}
    with pytest.raises(ValueError, match="no train row keeps a supervised token") as refused:
        loaded(tmp_path, tokenizer, config, empty, empty)
    assert f"{tmp_path}/a.jsonl, row 1" in str(refused.value) and "'what is it?'" in str(refused.value)


def test_the_first_dropped_row_is_named(tmp_path: Path, tokenizer, config, capsys):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}, {"prompt": "a", "response": ""}]
    assert len(loaded(tmp_path, tokenizer, config, *rows)) == 1
    assert "2 dropped: no supervised token; the first one dropped" in (out := capsys.readouterr().out)
    assert "a.jsonl, row 2)" in out


def test_a_cut_response_is_counted_however_it_is_supervised(tmp_path: Path, tokenizer, config, capsys):
    short = replace(config, max_prompt_length=60, max_length=90)
    row = {"prompt": "hi", "response": "long " * 50}
    generated = {"prompt": "hi", "prompt_ids": [1], "response": "a", "response_ids": [5] * 100}
    generated["tokenizer_digest"] = tokenizer_digest(tokenizer)
    for rows, supervise in ([row], "last"), ([row], "all"), ([generated], "last"):
        loaded(
            tmp_path,
            tokenizer,
            short,
            *rows,
            {**rows[0], "response": "short", "response_ids": [5]},
            supervise=supervise,
        )
        assert "train: 2 of 2 rows (1 response cut)" in capsys.readouterr().out, (rows, supervise)


# ---- contents that are no plain text


def test_parts_of_text_are_joined_and_other_parts_are_refused_by_row(tmp_path: Path, tokenizer, config):
    def row(*parts, role="user"):
        return {"messages": [{"role": role, "content": list(parts)}, {"role": "assistant", "content": "yes"}]}

    parts = row({"type": "text", "text": "hi "}, {"type": "text", "text": "there"})
    plain = {"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]}
    split, joined = loaded(tmp_path, tokenizer, config, parts, plain)
    assert split.response == joined.response and split.conversation.prompt == joined.conversation.prompt
    image = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(
        ValueError, match=r"a.jsonl, row 2: messages\[0\].content has a part that is no text, .*image_url"
    ):
        loaded(tmp_path, tokenizer, config, plain, row(image))
    with pytest.raises(ValueError, match=r"row 1: messages\[0\].content must be a text, this is 5"):
        loaded(tmp_path, tokenizer, config, {"messages": [{"role": "user", "content": 5}, plain["messages"][1]]})


PROMPT = [{"role": "user", "content": "q"}]
ANSWER = [*PROMPT, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("good", "column"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen"),
        ({"prompt": "q", "response": "a"}, "prompt"),
        ({"chosen": ANSWER, "rejected": ANSWER}, "rejected"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "rejected"),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, "human_ref_B"),
        ({"question": "q", "answer": "a #### 1"}, "answer"),
    ],
)
def test_a_null_is_refused_with_file_row_and_column(tmp_path: Path, tokenizer, config, good, column):
    with pytest.raises(ValueError, match=rf"a.jsonl, row 2: {column} must be a .*None.*remove the row"):
        loaded(tmp_path, tokenizer, config, good, {**good, column: None})


def test_a_row_without_a_pair_is_refused_by_its_place(tmp_path: Path):
    source = written(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q"})
    data = ["datasets=[local]", f"datasets.local.train={source}", f"cache_dir={tmp_path}"]
    with pytest.raises(ValueError, match="a.jsonl, row 2: loss=dpo learns from pairs, .*no chosen and no rejected"):
        launch.run_task(composed("loss=dpo", "model=tiny", *data))


def test_a_template_that_refuses_a_role_names_the_row(tmp_path: Path, tokenizer, config):
    strict = models.load_tokenizer(config)
    refusal = "{{ raise_exception('System role not supported') }}"
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}" + refusal + "{% endif %}" + strict.chat_template
    rows = [{"messages": ANSWER}, {"messages": [{"role": "system", "content": "s"}, *ANSWER]}]
    with pytest.raises(ValueError, match="a.jsonl, row 2: .*roles system, user: System role not supported"):
        loaded(tmp_path, strict, config, *rows)


def test_an_unknown_format_lists_those_that_are_there(tmp_path: Path, tokenizer, config):
    with pytest.raises(ValueError, match="format='chatml' is not known") as refused:
        loaded(tmp_path, tokenizer, config, {"messages": ANSWER}, format="chatml")
    assert all(name in str(refused.value) for name in PARSERS)
    with pytest.raises(ValueError, match="cannot tell the format from the columns .'text'") as refused:
        loaded(tmp_path, tokenizer, config, {"text": "?"})
    assert all(name in str(refused.value) for name in PARSERS)


# ---- templates


def test_a_turn_ends_with_an_added_special_token_that_has_no_role(tokenizer, config):
    """Llama 3's base tokenizer with an instruct template: <|eot_id|> is there, and eos is another token."""
    added = models.load_tokenizer(config)
    added.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<|reserved|>", special=True)])
    added.chat_template = (
        "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    end, reserved = added.convert_tokens_to_ids(["<|eot_id|>", "<|reserved|>"])
    assert end not in added.all_special_ids and added.eos_token_id != end
    assert turn_end(added) == (end, True)
    assert models.stop_ids(added) == sorted([end, added.eos_token_id])
    example = encoded({"prompt": "hi", "response": "yes"}, added, config)
    assert [i for i, on in zip(*example.response, strict=True) if on][-1] == end
    assert example.response.ids.count(added.eos_token_id) == 0
    forbidden = forbidden_ids(added, models.stop_ids(added), len(added), len(added)).nonzero().flatten().tolist()
    assert reserved in forbidden and end not in forbidden


DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}"


def clock(monkeypatch, *day: int) -> None:
    """Let the library's clock show a day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(*day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_midnight_changes_no_id_and_a_pinned_date_is_part_of_the_digest(config, monkeypatch):
    dated, plain = models.load_tokenizer(config), models.load_tokenizer(config)
    dated.chat_template = DATED + dated.chat_template
    clock(monkeypatch, 2026, 11, 26)
    before = encode_prompt(dated, PROMPT)
    clock(monkeypatch, 2026, 11, 27)
    assert encode_prompt(dated, PROMPT) == before
    rendered = stopped(dated).apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    assert rendered == dated.decode(before)  # lm-evaluation-harness renders for itself
    assert dated.decode(before).startswith("Today is 26 Jul 2024\n")
    other = models.load_tokenizer(replace(config, template_date="2026-11-27"))
    undated_digest = tokenizer_digest(other)
    assert undated_digest == tokenizer_digest(plain)  # a template without a date does not know the day
    other.chat_template = dated.chat_template
    assert dated.decode(encode_prompt(other, PROMPT)).startswith("Today is 27 Nov 2026\n")
    assert template_digest(other) != template_digest(dated) and tokenizer_digest(other) != tokenizer_digest(dated)


def test_a_stopped_clock_changes_nothing_else_of_a_template(config, monkeypatch):
    """White space at its start, formats in variables, calls inside macros: as the library renders it on that day."""
    dated = models.load_tokenizer(config)
    clock(monkeypatch, 2024, 7, 26)
    for start in ("", "\n", "\n\n  ", "  {% if true %}\nx{% endif %}", "{%- if true %}\n  y\n{%- endif %}"):
        for wanted in ("%d %b %Y", "%A, %d. %B %y, %H:%M (%j) 100%%", "%Y-%m-%d"):
            ask = f"{{% macro today(f) %}}{{{{ strftime_now(f) }}}}{{% endmacro %}}{{% set f = {wanted!r} %}}"
            ask += "{% if strftime_now is defined %}{{ today(f) }}{% endif %}"
            dated.chat_template = start + ask + "{{ messages[0]['content'] }}"
            expected = dated.apply_chat_template(PROMPT, tokenize=False)
            assert render(dated, PROMPT, False) == expected and date(2024, 7, 26).strftime(wanted) in expected


def test_a_day_that_is_none_is_refused(config):
    for wrong in ("today", "26-07-2024", "20240726", "2024-02-30"):
        with pytest.raises(ValueError, match=f"model.template_date='{wrong}' must be a day"):
            replace(config, template_date=wrong)


def test_weights_mix(tmp_path: Path, tokenizer, config):
    file = write_pairs(tmp_path / "a.jsonl", 10)
    for weight, count in ((1.0, 10), (0.5, 5), (2.3, 23)):
        assert (
            len(load_examples({"a": DatasetConfig(train=str(file), weight=weight)}, "train", tokenizer, config))
            == count
        )


def test_weights_mix_the_train_split_alone(tmp_path: Path, tokenizer, config):
    """A test row that came nine times would count as nine and narrow every interval."""
    file = write_pairs(tmp_path / "a.jsonl", 11)
    for weight in (9.0, 0.3):
        data = {"a": DatasetConfig(train=str(file), test=str(file), weight=weight)}
        found = load_examples(data, "test", tokenizer, config)
        assert [e.conversation.prompt for e in found] == [
            e.conversation.prompt
            for e in load_examples({"a": DatasetConfig(train=str(file))}, "train", tokenizer, config)
        ]


def test_a_weight_that_takes_no_row_is_refused(tmp_path: Path, tokenizer, config):
    file = write_pairs(tmp_path / "a.jsonl", 10)
    data = {"a": DatasetConfig(train=str(file)), "b": DatasetConfig(train=str(file), weight=0.04)}
    with pytest.raises(ValueError, match="datasets.b.weight=0.04 takes none of 10 rows: give at least 0.1"):
        load_examples(data, "train", tokenizer, config)


def test_order_is_a_function_of_seed_and_epoch_and_every_example_comes_once():
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0) != epoch_order(50, 1, 1)
    assert sorted(epoch_order(50, 1, 0)) == list(range(50))


def test_collate_pads_right_with_masks(tokenizer, config):
    rows = [encoded({"prompt": "hi", "response": r}, tokenizer, config).response for r in ("a", "a longer one")]
    batch = collate(rows, 0)
    assert batch.ids.shape == batch.attention.shape == batch.response.shape
    assert batch.attention.sum(1).tolist() == [len(r.ids) for r in rows]
    assert batch.response.sum(1).tolist() == [sum(r.response) for r in rows]


def test_a_file_that_the_repository_ships_is_found_from_another_folder(tmp_path: Path, monkeypatch):
    name = f"outputs/{tmp_path.name}.jsonl"
    file = ROOT / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    try:
        check_source(name, "datasets.x.train")
        assert read_rows(name) == [{"prompt": "a"}]
    finally:
        file.unlink()
