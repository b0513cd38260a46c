"""Rows as others write them: a prompt beside its sides, columns that are null, calls of tools, broken characters."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import launch
import models
from conversations import find_format, to_conversation
from dataloader import load_examples
from estimate.text_lengths import text_examples
from tests.support.helpers import composed
from tokens.encoding import encode_text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(row: dict):
    return to_conversation(row, find_format(row, "here"), "here")


def loaded(folder: Path, *lines: bytes, **options):
    data = folder / "rows.jsonl"
    data.write_bytes(b"".join(lines))
    settings = launch.settings_of(composed("model=tiny", "datasets=[local]", f"datasets.local.train={data}"))
    datasets = {"local": settings.datasets["local"]}
    for key, value in options.items():
        object.__setattr__(datasets["local"], key, value)
    return load_examples(datasets, "train", models.load_tokenizer(settings.model), settings.model)


SYSTEM = {"role": "system", "content": "be kind"}
MORE = [assistant("which?"), user("the red one")]


@pytest.mark.parametrize(
    ("given", "before", "wanted"),
    [
        ([user("q")], [], [user("q")]),  # TRL's explicit prompt
        ([SYSTEM, user("q")], MORE, [SYSTEM, user("q"), *MORE]),  # sides of several turns
        ("q", MORE, [user("q"), *MORE]),
        ([SYSTEM], [user("q")], [SYSTEM, user("q")]),
        ([user("q")], [user("q")], [user("q")]),  # a copy of what the sides hold
        ([user("q")], [SYSTEM, user("q")], [SYSTEM, user("q")]),
        ([user("q")], [user("q"), *MORE], [user("q"), *MORE]),
        ("q", [SYSTEM, user("q")], [SYSTEM, user("q")]),  # UltraFeedback's
        ("a name of the prompt", [user("q")], [user("q")]),
        (None, [user("q")], [user("q")]),
    ],
)
def test_a_prompt_beside_its_sides_is_not_lost(given, before, wanted):
    found = read({"prompt": given, "chosen": [*before, assistant("yes")], "rejected": [*before, assistant("no")]})
    assert found[:3] == (wanted, [assistant("yes")], [assistant("no")])


def test_a_prompt_that_the_sides_hold_in_part_is_refused():
    sides = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
    with pytest.raises(ValueError, match="here: prompt and chosen both hold .*'q'.*chosen does not begin with prompt"):
        read({"prompt": [SYSTEM, user("q")], **sides})


def test_a_response_is_the_first_column_that_holds_one():
    for row in ({"response": None, "completion": "yes"}, {"completion": None, "teacher_response": "yes"}):
        assert read({"prompt": "q", **row}).response == [assistant("yes")]
    assert read({"prompt": "q", "response": None, "completion": None}).response is None


@pytest.mark.parametrize("content", [None, "let me look"])
def test_a_call_of_a_tool_is_refused_and_none_is_not(content):
    call = {"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    row = {"messages": [user("q"), call, {"role": "tool", "content": "3"}, assistant("3")]}
    with pytest.raises(ValueError, match=r"here: messages\[1\] calls a tool, .*'name': 'f'.* not part of any text"):
        read(row)
    call["tool_calls"] = []
    assert [m["content"] for m in read(row).prompt] == ["q", content or "", "3"]


HALF = b'{"prompt": "q", "response": "half of \\ud83d"}\n'
WHOLE = b'{"prompt": "q", "response": "whole"}\n'


def test_half_a_character_is_named_with_its_row_or_dropped_and_counted(tmp_path: Path, capsys):
    """A lone surrogate is a text to JSON and to Python, and none to a tokenizer."""
    with pytest.raises(
        ValueError, match=r"rows.jsonl, row 2: .*half a character, U\+D83D, after '.*half of '.*on_error"
    ):
        loaded(tmp_path, WHOLE, HALF)
    assert len(loaded(tmp_path, WHOLE, HALF, on_error="drop")) == 1
    assert "1 dropped: cannot be read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="half a character"):
        encode_text(models.load_tokenizer(launch.settings_of(composed("model=tiny")).model), "half of \ud83d")


def test_a_pair_of_halves_is_a_character(tmp_path: Path):
    (row,) = loaded(tmp_path, b'{"prompt": "q", "response": "\\ud83d\\ude00"}\n')
    assert row.response.num_supervised == 5  # its four bytes, and the end of the turn


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not UTF-8 .*0xe9.*iconv"):
        loaded(tmp_path, WHOLE, b"\n", '{"prompt": "caf\u00e9", "response": "x"}\n'.encode("latin1"))


def test_a_line_that_is_no_json_is_dropped_and_counted_where_the_data_set_says_so(tmp_path: Path, capsys):
    torn = b'{"prompt": "q", "resp\n'
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not valid JSON .*on_error=drop"):
        loaded(tmp_path, WHOLE, b"\n", torn, WHOLE)
    assert [row.where[-5:] for row in loaded(tmp_path, WHOLE, b"\n", torn, WHOLE, on_error="drop")] == [
        "row 1",
        "row 3",
    ]
    assert "1 dropped: cannot be read; the first one dropped" in capsys.readouterr().out


@pytest.mark.parametrize("second", ["other type", "no parquet"])
def test_parquet_that_cannot_be_read_is_one_message(tmp_path: Path, second: str):
    folder = tmp_path / "rows"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "response": "a", "n": 1}]), folder / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "response": "a", "n": "one"}]), folder / "b.parquet")
    if second == "no parquet":
        (folder / "b.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    settings = launch.settings_of(composed("model=tiny", "datasets=[local]", f"datasets.local.train={folder}"))
    tokenizer = models.load_tokenizer(settings.model)
    with pytest.raises(
        ValueError, match=r"rows/a.parquet and 1 more: cannot be read as one table of Parquet \(.*git lfs"
    ):
        load_examples(settings.datasets, "train", tokenizer, settings.model)


@pytest.mark.parametrize("task", ["inspect", "select"])
def test_every_task_leaves_out_what_the_loader_drops(tmp_path: Path, task: str):
    rows = [b'{"question": "q", "answer": "it is #### 1"}\n', b'{"question": "q", "ans\n', b'{"question": "r"}\n']
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(b"".join([*rows, b'{"question": "s", "answer": "#### 2"}\n']))
    said = [{"role": "user", "content": "w"}]
    made = {
        "prompt": said,
        "prompt_ids": [1],
        "finish_reason": "stop",
        "tokenizer_digest": "t",
        "meta": {"answer": "3"},
    }
    made_rows = [made | {"response": text, "response_ids": [len(text)]} for text in ("#### 3", "#### 44")]
    (tmp_path / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_rows))
    line = [f"task={task}", f"cache_dir={tmp_path}", "exp_name=run", "datasets=[gsm8k]", "datasets.gsm8k.on_error=drop"]
    line += [f"datasets.gsm8k.{split}={tmp_path}/{split}.jsonl" for split in ("train", "test")]
    more = {"select": [f"select.generations={tmp_path}/generations.jsonl", "select.verifier=worlds.gsm8k:check"]}
    launch.run_task(composed(*line, *more.get(task, ["model=tiny"])))
    if task == "inspect":
        found = json.loads((tmp_path / "run" / "inspect.json").read_text())
        assert "rows dropped: nothing to learn" in json.dumps(found)
    with pytest.raises(ValueError, match="train.jsonl, line 2: not valid JSON|test.jsonl, line 2: not valid JSON"):
        refused = ["datasets.gsm8k.on_error=refuse", "exp_name=refused"]
        launch.run_task(composed(*line, *refused, *more.get(task, ["model=tiny"])))


@pytest.mark.parametrize(("asked", "seen"), [(10, 5), (20, 9)])
def test_an_estimate_of_repeated_rows_sees_as_many_as_it_draws(tmp_path: Path, asked: int, seen: int):
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "q" * 10 * i, "response": "a"}) for i in range(1, 10)]
    data.write_text("\n".join([*lines, '{"prompt": "to', ""]))
    line = ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", "datasets.local.weight=2"]
    # the tenth line is none, and left out
    found, _, number = text_examples(
        launch.settings_of(composed(*line, "task=estimate", f"estimate.rows={asked}")), "train"
    )
    assert number == 20 and len({len(example.prompt) for example in found}) == seen


@pytest.mark.parametrize("task", ["train", "inspect"])
def test_a_first_line_that_is_no_json_is_dropped_like_any_other(task: str, tmp_path: Path) -> None:
    row = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "rows.jsonl").write_text("not json\n" + 2 * row)
    line = [f"task={task}", "loss=dpo", "model=tiny", "model.batch_size=2", "datasets=[local]", f"cache_dir={tmp_path}"]
    line.append(f"datasets.local.train={tmp_path}/rows.jsonl")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: not valid JSON"):
        launch.run_task(composed(*line, "exp_name=refused"))
    launch.run_task(composed(*line, "exp_name=dropped", "datasets.local.on_error=drop"))
    (tmp_path / "rows.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"line 1: not valid JSON"):
        launch.run_task(composed(*line, "exp_name=nothing", "datasets.local.on_error=drop"))
