"""Arena-Hard's and MT-bench's files: questions in, answers out turn by turn, judgments back in."""

import json
from pathlib import Path
from typing import Any

import pytest

import launch
import models
from conversations import find_format, to_conversation
from dataloader import encode_prompt
from evaluation.answer_files import answer_row, form_of, style_of
from evaluation.judgments import entry_of, judgments_in, read_judgments
from evaluation.turns import dialog, in_turns, later_turns, messages_before_last
from settings.schema import ModelConfig, typed
from tests.support.chat_judge import ChatJudge
from tests.support.helpers import composed, rows_of

MT_BENCH = {
    "question_id": 81,
    "category": "math",
    "turns": ["How many ants?", "And bees?"],
    "reference": ["7", "8"],
}
ARENA_01 = {
    "question_id": "ab12",
    "category": "arena-hard-v0.1",
    "cluster": "x",
    "turns": [{"content": "Sort a list."}],
}
ARENA_2 = {"uid": "cd34", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort a list."}


def test_question_files_are_read_by_their_columns() -> None:
    for row, fmt, first, later in (
        (MT_BENCH, "questions", "How many ants?", ["And bees?"]),
        (ARENA_01, "questions", "Sort a list.", []),
        (ARENA_2, "strings", "Sort a list.", []),
    ):
        assert find_format(row, "x") == fmt
        conversation = to_conversation(row, fmt, "x")
        assert conversation.prompt == [{"role": "user", "content": first}] and conversation.response is None
        assert later_turns(conversation) == later
    assert [form_of(row) for row in (MT_BENCH, ARENA_01, ARENA_2, {"prompt": "x"})] == [
        "mt_bench",
        "arena_hard_01",
        "arena_hard_2",
        None,
    ]
    with pytest.raises(ValueError, match=r"here: turns\[0\] must be a text, this is 3"):
        to_conversation({"question_id": 1, "turns": [3]}, "questions", "here")


def test_a_row_with_turns_of_another_kind_is_one_question() -> None:
    conversation = to_conversation({"prompt": "x", "turns": 4}, "strings", "x")
    assert later_turns(conversation) == [] and form_of(conversation.meta) is None


def test_the_second_turn_is_asked_after_the_first_answer() -> None:
    """The model is a rule that says its prompt backwards: what it was asked shows in what it said."""
    tokenizer = models.load_tokenizer(typed(composed("model=tiny")["model"], ModelConfig))
    asked: list[list[str]] = []

    def sample(prompts: list[list[int]]) -> list[tuple[list[int], str, float]]:
        asked.append([tokenizer.decode(ids) for ids in prompts])
        return [(tokenizer(f"ok {len(ids)}", add_special_tokens=False).input_ids, "length", 1.0) for ids in prompts]

    rows = [to_conversation(row, "questions", "x") for row in (MT_BENCH, ARENA_01)]
    first = [encode_prompt(tokenizer, row.prompt) for row in rows]
    answers = in_turns(sample, tokenizer, first, rows, 200)
    assert [len(row) for row in answers] == [2, 1] and [len(batch) for batch in asked] == [2, 1]
    said = f"ok {len(first[0])}"
    assert asked[1] == [
        tokenizer.decode(encode_prompt(tokenizer, messages_before_last(rows[0].prompt, ["And bees?"], [said, ""])))
    ]
    assert said in asked[1][0] and asked[1][0].index(said) < asked[1][0].index("And bees?")
    assert dialog(["And bees?"], ["7", "8"]) == "7\n\n[User]\nAnd bees?\n\n[Assistant]\n8"
    with pytest.raises(ValueError, match="turn 2 of question 81 has a prompt of .* raise model.max_prompt_length=20"):
        in_turns(sample, tokenizer, first, rows, 20)


def test_answers_have_the_forms_that_the_tools_read() -> None:
    mt = answer_row(MT_BENCH, "How many ants?", "mine", [["7", "8"], ["6", "9"]], 4, 5.0)
    assert mt["question_id"] == 81 and mt["model_id"] == "mine" and mt["tstamp"] == 5.0 and "conv_metadata" not in mt
    assert mt["choices"] == [{"index": 0, "turns": ["7", "8"]}, {"index": 1, "turns": ["6", "9"]}]
    old = answer_row(ARENA_01, "Sort a list.", "mine", [["sorted(x)"]], 4, 5.0)
    assert old["choices"] == [{"index": 0, "turns": [{"content": "sorted(x)"}]}]
    assert old["conv_metadata"]["token_len"] == 4
    new = answer_row(ARENA_2, "Sort a list.", "mine", [["sorted(x)"]], 4, 5.0)
    assert new["uid"] == "cd34" and new["model"] == "mine" and new["metadata"] == old["conv_metadata"]
    assert new["messages"][-1] == {"role": "assistant", "content": {"answer": "sorted(x)"}}
    assert new["messages"][0] == {"role": "user", "content": "Sort a list."}


def test_style_counts_marks_outside_of_code() -> None:
    text = "# one\n## two\n**bold** and __bold__\n1. first\n - item\n* item\n```\n# no\n- no\n**no**\n```\n"
    found = style_of(text, 9)
    assert found["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert found["list_count"] == {"ordered": 1, "unordered": 2} and found["bold_count"] == {"**": 1, "__": 1}


def arena(uid: str, first: str | None, second: str | None, **more: Any) -> dict[str, Any]:
    games = [{"score": first, "judgment": {"answer": "x"}}, {"score": second, "judgment": {"answer": "x"}}]
    return {"uid": uid, "category": "hard_prompt", "judge": "j", "model": "b", "baseline": "a", "games": games, **more}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_arena_hards_verdicts_are_read_from_the_side_of_the_model(tmp_path: Path) -> None:
    """The baseline is A in the first game; much better counts three games: (0 + 1*3 + 1 + .5) / (1 + 3 + 1 + 1)."""
    rows = [arena("1", "A>B", "A>>B"), arena("2", "B>A", "A=B"), arena("3", None, "A>B")]
    (found,) = read_judgments(write(tmp_path / "j/b.jsonl", rows)).values()
    entry = entry_of(found)
    assert entry and entry["value"] == pytest.approx(4.5 / 6) and (entry["n"], entry["skipped"]) == (2, 1)
    assert (entry["by"], entry["opponent"]) == ("j", "a") and entry["ci95"] == pytest.approx([0.75, 0.75])
    assert judgments_in(tmp_path) == {"b": [entry]}


def test_mt_benchs_scores_and_pairs_are_read(tmp_path: Path) -> None:
    judge = ["gpt-4", "single-v1"]
    single = [
        {"question_id": q, "model": "b", "judge": judge, "score": score, "turn": turn}
        for q, turn, score in ((81, 1, 7), (81, 2, 5), (82, 1, 9), (82, 2, -1))
    ]
    pair = [
        {"question_id": q, "model_1": "a", "model_2": "b", "judge": judge, "turn": 1, "g1_winner": x, "g2_winner": y}
        for q, x, y in ((81, "model_2", "model_2"), (82, "model_1", "model_2"), (83, "error", "model_1"))
    ]
    write(tmp_path / "gpt-4_single.jsonl", single)
    write(tmp_path / "gpt-4_pair.jsonl", pair)
    pairs, scores = judgments_in(tmp_path)["b"]
    assert scores["kind"] == "score" and scores["value"] == 7.0 and (scores["n"], scores["skipped"]) == (2, 1)
    assert pairs["kind"] == "pair" and pairs["value"] == 0.75 and (pairs["n"], pairs["skipped"]) == (2, 1)
    assert judgments_in(tmp_path)["a"][0]["value"] == 0.25
    write(tmp_path / "other.jsonl", [{"model": "b"}])
    with pytest.raises(ValueError, match=r"other.jsonl, row 1: no judgment of Arena-Hard .*KeyError 'score'"):
        judgments_in(tmp_path)


@pytest.mark.slow
def test_an_evaluation_answers_both_turns_and_writes_the_files(tmp_path: Path) -> None:
    rows = [{"question_id": i, "category": "x", "turns": [f"say {i}", f"again {i}"]} for i in range(3)]
    write(tmp_path / "question.jsonl", [*rows, {"question_id": 9, "category": "x", "turns": ["say 9"]}])
    write(tmp_path / "train.jsonl", [{"prompt": f"say {i}", "response": "ha " * i} for i in range(1, 5)])
    common = ["model=tiny", "datasets=[local]", f"cache_dir={tmp_path}"]
    for seed, name in enumerate("ab"):
        train = [f"datasets.local.train={tmp_path}/train.jsonl", f"exp_name={name}", "n_steps=1", "lr=1e-3"]
        launch.run_task(composed(*common, *train, f"model.build_seed={seed}"))
    judge = ChatJudge(lambda first, second: 0.9 if len(first) > len(second) else 0.1)
    names = [f"+evaluation.models.{name}={tmp_path}/{run}/FINAL" for name, run in (("one", "a"), ("two", "b"))]
    asked = ["evaluation.temperatures=[1.0]", "evaluation.max_new_tokens=5", "evaluation.opponent=one"]
    judged = ["evaluation.judge=true", f"judge.base_url={judge.url}", "evaluation.n_samples=2"]
    data = f"datasets.local.test={tmp_path}/question.jsonl"
    launch.run_task(composed("task=evaluate", *common, *names, *asked, *judged, data, "exp_name=eval"))
    judge.close()
    answers = {row["question_id"]: row for row in rows_of(tmp_path / "eval/model_answer/two.jsonl")}
    assert sorted(answers) == [0, 1, 2, 9]
    assert [len(choice["turns"]) for choice in answers[0]["choices"]] == [2, 2]
    assert [len(choice["turns"]) for choice in answers[9]["choices"]] == [1, 1]
    sample = next(row for row in rows_of(tmp_path / "eval/samples.jsonl") if row["prompt"] == "say 0")
    first, second = answers[0]["choices"][0]["turns"]
    assert sample["responses"]["two"] == f"{first}\n\n[User]\nagain 0\n\n[Assistant]\n{second}"
    assert len(judge.asked) == 8 and sum("[User]\nagain" in question for question in judge.asked) == 6
    start = [f"model.load_from={tmp_path}/a/FINAL", "generation.split=test", "generation.backend=hf"]
    sampled = ["generation.n=2", "generation.max_new_tokens=5", "generation.check_rows=0"]
    launch.run_task(composed("task=generate", *common, *start, *sampled, data, "exp_name=gen"))
    generated = {row["question_id"]: row for row in rows_of(tmp_path / "gen/model_answer/gen.jsonl")}
    assert [[len(c["turns"]) for c in generated[i]["choices"]] for i in (0, 1, 2, 9)] == [[2, 2]] * 3 + [[1, 1]]
    assert generated[9]["model_id"] == "gen" and len(rows_of(tmp_path / "gen/generations.jsonl")) == 8
    texts = {(row["index"], row["sample"]): row["response"] for row in rows_of(tmp_path / "gen/generations.jsonl")}
    assert generated[0]["choices"][1]["turns"][0] == texts[0, 1]
