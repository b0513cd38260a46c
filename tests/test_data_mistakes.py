"""Rows as people have them: foreign columns are read, bad rows named or dropped and counted, marks forge no turn."""

import json
from pathlib import Path

import pytest

import launch
import models
from conversations import find_format, to_conversation
from dataloader import load_examples
from settings.schema import DatasetConfig, ModelConfig, typed
from templates import turn_end
from tests.support.helpers import composed
from tokens.encoding import CLOSE, OPEN, encode_text
from tokens.generations import read_generations

HI = [{"role": "user", "content": "hi"}]
YES = [{"role": "assistant", "content": "yes"}]
GOOD = {"messages": [*HI, *YES]}
LIKED = {"prompt": "hi", "completion": "yes", "label": True}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return typed(composed("model=tiny")["model"], ModelConfig)


@pytest.fixture(scope="module")
def tokenizer(model: ModelConfig):
    return models.load_tokenizer(model)


def written(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def loaded(rows: list, tokenizer, model: ModelConfig, folder: Path, **options):
    data = DatasetConfig(str(written(folder / "rows.jsonl", rows)), **options)
    return load_examples({"a": data}, "train", tokenizer, model)


def read(row: dict):
    return to_conversation(row, find_format(row, "here"), "here")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "yes"},
        {"prompt": HI, "completion": YES},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"instruction": "hi", "input": "", "output": "yes"},
        {"instruction": "hi", "input": None, "output": "yes", "system": "", "history": []},
    ],
)
def test_columns_of_trl_sharegpt_and_alpaca_are_read(row):
    found = read(row)
    assert (found.prompt, found.response, found.meta) == (HI, YES, {})


def test_pairs_and_systems_of_sharegpt_and_alpaca_are_read():
    no = [{"role": "assistant", "content": "no"}]
    system = [{"role": "system", "content": "be kind"}]
    turns = [{"from": "human", "value": "hi"}]
    sides = {"chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    found = read({"conversations": turns, "system": "be kind", **sides, "score": 1})
    assert found[:4] == (system + HI, YES, no, None) and found.meta == {"score": 1}
    found = read({"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no", "system": "be kind"})
    assert found[:4] == (system + HI, YES, no, None)
    found = read({"instruction": "two", "input": "more", "output": "yes", "history": [["hi", "no"]]})
    assert found.prompt == [*HI, *no, {"role": "user", "content": "two\nmore"}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [*HI, "yes"]}, r"messages\[1\] must be an object with role and content, this is 'yes'"),
        ({"messages": [*HI, {"role": "assistant"}]}, r"messages\[1\] must be an object with role and content"),
        ({"messages": [*HI, {"role": None, "content": "x"}]}, r"messages\[1\].role must be a text, this is None"),
        ({"messages": [*HI, {"role": "assistant", "content": 7}]}, r"content must be a text, this is 7"),
        ({"messages": None}, "messages must be a text or a non-empty list .*this is None"),
        ({"messages": []}, "messages must be a text or a non-empty list"),
    ],
)
def test_a_bad_value_after_the_first_row_is_named_with_file_row_and_value(row, words, tokenizer, model, tmp_path):
    with pytest.raises(ValueError, match=f"rows.jsonl, row 3: .*{words}"):
        loaded([GOOD, GOOD, row], tokenizer, model, tmp_path)


@pytest.mark.parametrize(
    ("rows", "loss", "words"),
    [
        ([{"prompt": "hi", "completion": "x", "score": 3}], "dpo", r"row 1: .* gives a prompt and response .*score"),
        ([GOOD, {"messages": HI}], "sft", "row 2: loss=sft needs a response in every row, and this one gives a prompt"),
        ([LIKED, {"prompt": "ho"}], "kto", "row 2: loss=kto needs pairs, or a response .*, and .* gives a prompt"),
        ([LIKED, LIKED | {"completion": None}], "kto", "row 2: loss=kto needs .*, and this row gives a prompt"),
        ([LIKED, LIKED | {"label": "good"}], "kto", "row 2: loss=kto needs .* `label` .*; this row has 'good'"),
    ],
)
def test_a_row_without_what_the_loss_learns_is_named_with_its_columns(rows, loss, words, tmp_path):
    data = written(tmp_path / "rows.jsonl", rows)
    run = [f"cache_dir={tmp_path}", "exp_name=run", f"loss={loss}", "model=tiny", "datasets=[local]"]
    with pytest.raises(ValueError, match=f"rows.jsonl, {words}"):
        launch.run_task(composed(*run, f"datasets.local.train={data}"))


STRINGS = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
LISTS = {"chosen": [*HI, *YES], "rejected": [*HI, {"role": "assistant", "content": "no"}]}
HH_PAIR = {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}


@pytest.mark.parametrize("row", [STRINGS, LISTS, HH_PAIR, {"prompt": HI, "chosen": None, "rejected": None}])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_side_that_is_null_is_named_with_file_and_row_in_the_first_row_too(
    row, before, side, tokenizer, model, tmp_path
):
    whole = STRINGS | {"prompt": HI} if row["chosen"] is None else row
    empty = row | {side: None}
    said = "chosen" if row["chosen"] is None else side
    with pytest.raises(
        ValueError, match=rf"rows.jsonl, row {before + 1}: {said} must be a text.*this is None \(null\)"
    ):
        loaded([*[whole] * before, empty, whole], tokenizer, model, tmp_path)


def test_a_run_on_a_pair_with_a_null_says_where(tmp_path):
    data = written(tmp_path / "rows.jsonl", [STRINGS | {"chosen": None}, STRINGS])
    run = [f"cache_dir={tmp_path}", "exp_name=run", "loss=dpo", "model=tiny", "datasets=[local]"]
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: chosen must be a text, this is None \(null\)"):
        launch.run_task(composed(*run, f"datasets.local.train={data}"))


def pair(prompt: str, other: str) -> dict:
    return {"chosen": f"\n\nHuman: {prompt}\n\nAssistant: a", "rejected": f"\n\nHuman: {other}\n\nAssistant: b"}


def test_a_pair_that_answers_two_prompts_stops_the_run_or_is_dropped_and_counted(tokenizer, model, tmp_path, capsys):
    rows = [pair("same", "same"), pair("one way to say it", "one way to ask it"), pair("last", "last")]
    words = r"row 2: chosen and rejected answer different prompts: message 0 reads .*say it.*ask it"
    with pytest.raises(ValueError, match=words) as error:
        loaded(rows, tokenizer, model, tmp_path)
    assert ".on_error=drop" in str(error.value) and "datasets.NAME" not in str(error.value)
    kept = loaded(rows, tokenizer, model, tmp_path, on_error="drop")
    assert [example.where[-5:] for example in kept] == ["row 1", "row 3"]
    said = capsys.readouterr().out
    assert "train: 2 of 3 rows (1 dropped: cannot be read; the first one dropped: " in said
    assert "row 2: chosen and rejected answer different prompts" in said
    with pytest.raises(ValueError, match="no train row keeps"):
        loaded(rows[1:2], tokenizer, model, tmp_path, on_error="drop")


def test_empty_messages_and_equal_roles_in_a_row_are_counted(tokenizer, model, tmp_path, capsys):
    empty = {"messages": [{"role": "system", "content": " "}, *HI, *YES]}
    loaded([GOOD, empty, {"messages": [*HI, *HI, *YES]}], tokenizer, model, tmp_path)
    assert "train: 3 of 3 rows (1 empty message, 1 equal roles in a row)" in capsys.readouterr().out


def test_text_that_spells_the_end_of_a_turn_is_counted_and_forges_none_where_it_is_split(
    tokenizer, model, tmp_path, capsys
):
    end = turn_end(tokenizer).id
    mark = tokenizer.convert_ids_to_tokens(end)
    forged = {
        "messages": [{"role": "user", "content": f"hi{mark} there"}, {"role": "assistant", "content": f"a{mark}b"}]
    }
    plain = {"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "ab"}]}
    ends = [row.response.ids.count(end) for row in loaded([plain, forged], tokenizer, model, tmp_path)]
    assert ends[1] == ends[0] + 2
    assert "warning: train: 1 of 2 rows spell the tokenizer's own marks" in capsys.readouterr().out
    rows = loaded([plain, forged], tokenizer, model, tmp_path, special_tokens="split")
    said = capsys.readouterr().out
    assert "1 spells control tokens" in said and "warning" not in said
    assert [row.response.ids.count(end) for row in rows] == [ends[0], ends[0]]
    assert tokenizer.decode(rows[1].response.ids).count(mark) == ends[0] + 2  # the text is all there
    supervised = [i for i, on in zip(*rows[1].response, strict=True) if on]
    assert supervised.count(end) == 1 and supervised[-1] == end
    assert rows[1].conversation.response == forged["messages"][1:]  # what is shown is what was written
    both = (
        loaded([plain], tokenizer, model, tmp_path),
        loaded([plain], tokenizer, model, tmp_path, special_tokens="split"),
    )
    assert both[0][0].response == both[1][0].response


def test_a_text_that_a_model_wrote_forges_no_end_of_turn(tokenizer):
    end = turn_end(tokenizer).id
    mark = tokenizer.convert_ids_to_tokens(end)
    ids = encode_text(tokenizer, f"a{mark}b")
    assert end not in ids and tokenizer.decode(ids) == f"a{mark}b"
    assert encode_text(tokenizer, "plain") == tokenizer("plain", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("special_tokens", ["keep", "split"])
def test_the_shield_s_own_characters_are_letters_like_others(special_tokens, tokenizer, model, tmp_path):
    """What stands between them is read as it would be without them."""
    end = turn_end(tokenizer).id
    mark = tokenizer.convert_ids_to_tokens(end)
    text = f"a{OPEN}{mark}{CLOSE}b{OPEN}"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]}
    (example,) = loaded([row], tokenizer, model, tmp_path, special_tokens=special_tokens)
    ids = [i for i, on in zip(example.response.ids, example.response.response, strict=True) if on]
    assert ids.count(end) == (2 if special_tokens == "keep" else 1)
    assert tokenizer.decode(ids[:-1]) == text


def test_a_role_is_a_word(tokenizer, model, tmp_path):
    row = {"messages": [{"role": "user\nx<|im_end|>", "content": "hi"}, *YES]}
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: messages\[0\].role must be a word such as user"):
        loaded([row], tokenizer, model, tmp_path)


def test_many_cut_rows_are_a_warning_with_their_share(tokenizer, model, tmp_path, capsys):
    long = {"messages": [*HI, {"role": "assistant", "content": "word " * model.max_length}]}
    prompt = {"messages": [{"role": "user", "content": "word " * model.max_length}, *YES]}
    loaded([long, prompt, GOOD, GOOD], tokenizer, model, tmp_path)
    said = capsys.readouterr().out
    assert f"warning: train: response cut in 25% of 4 rows, at model.max_length={model.max_length}" in said
    assert "warning: train: prompt shortened in 25% of 4 rows, at its beginning, to model.max_prompt_length=" in said


def test_an_empty_file_of_generations_and_a_folder_in_its_place_say_what_to_do(tmp_path):
    (tmp_path / "generations.jsonl").touch()
    with pytest.raises(ValueError, match="generations.jsonl has no rows: task=generate writes one a response"):
        read_generations(tmp_path / "generations.jsonl", None)
    with pytest.raises(ValueError, match="is a folder: give the file in it, .*generations.jsonl"):
        read_generations(tmp_path, None)


def test_a_run_in_the_place_of_its_model_is_refused_with_the_model_named(tmp_path):
    (tmp_path / "run" / "FINAL").mkdir(parents=True)
    with pytest.raises(ValueError, match="run is a run's folder; its model is .*run/FINAL"):
        models.local_source(str(tmp_path / "run"))
    (tmp_path / "run" / "FINAL").rmdir()
    (tmp_path / "run" / "command.txt").touch()
    with pytest.raises(ValueError, match="without FINAL, the model: the run has not ended"):
        models.local_source(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["loss=dckd", "loss.teacher_cache={}/none"], "loss.teacher_cache: teacher cache .*none does not exist"),
        (["loss=dckd", "loss.teacher_cache={}/runn/CACHE"], "does not exist: did you mean .*/run/CACHE?"),
        (["loss=dckd", "loss.teacher_cache={}/run"], "is a run's folder; its cache is .*run/CACHE: give that"),
        (["loss=dckd", "loss.teacher_cache={}/model"], "is a model. Have its cache made by task=cache model"),
        (["loss=adpa", "loss.advantages={}/run/CACHE", "loss.generations={}/none"], "loss.generations=.*none: no such"),
        (["loss=sft", "model.load_from={}/none"], "no model folder"),
    ],
)
def test_inputs_are_looked_for_before_rows_are_tokenized(line, words, tmp_path):
    (tmp_path / "run" / "CACHE").mkdir(parents=True)
    (tmp_path / "run" / "CACHE" / "DONE").touch()
    (tmp_path / "run" / "DONE").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    data = written(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    run = [f"cache_dir={tmp_path}/out", "exp_name=x", "model=tiny", "datasets=[local]"]
    inputs = [part.replace("{}", str(tmp_path)) for part in line]
    with pytest.raises(ValueError, match=words):
        launch.run_task(composed(*run, f"datasets.local.train={data}", *inputs))
    assert not (tmp_path / "out" / "tokens").exists()
