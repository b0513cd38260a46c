"""GSM8K's format, its verifier and votes, the arithmetic world, and a whole round of DPO-ST from the command line."""

import json
from pathlib import Path

import pytest

import launch
from conversations import Conversation, find_format, to_conversation
from evaluation.majority import majority_scores
from generation.calculator import MARK, calculate
from models import load_tokenizer
from rewards.verifiers import majority_response, scored, takes_meta, vote_of
from settings.schema import settings_from
from tests.support.helpers import ROOT, composed, rows_of
from tests.support.helpers import launch as command
from worlds import arithmetic, gsm8k, shop

GSM8K = next((f for p in ROOT.parents if (f := p / "shared/data/gsm8k").is_dir()), None)
ROW = {"question": "How many?", "answer": "2*3=<<2*3=6>>6\n#### 1,080"}


def test_question_and_answer_become_prompt_response_and_reference() -> None:
    assert find_format(ROW, "x") == "gsm8k"
    conversation = to_conversation(ROW, "gsm8k", "x")
    assert conversation.prompt == [{"role": "user", "content": "How many?"}]
    assert conversation.response == [{"role": "assistant", "content": ROW["answer"]}]
    assert conversation.meta == {"answer": "1,080"}
    with pytest.raises(ValueError, match="row 3: a gsm8k answer ends with '#### number'"):
        to_conversation({**ROW, "answer": "six"}, "gsm8k", "row 3")


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("#### 1080", True),
        ("so\n#### 1,080", True),
        ("####1080", True),
        ("#### $1,080.00", True),
        ("#### 1080.", True),
        ("#### 1080 clips", True),
        ("#### 108", False),
        ("#### -1080", False),
        ("#### 10800", False),
        ("1080", False),
        ("#### many", False),
        ("", False),
        ("#### 1 #### 1080", False),
        ("#### 1080 #### 1", True),
        ("#### " + "1" * 5000, False),
    ],
)
def test_the_number_after_the_hashes_decides(response: str, right: bool) -> None:
    assert gsm8k.check("How many?", response, {"answer": "1,080"}) == float(right)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("3 + 4 = 1080 clips.", True),
        ("The answer is $1,080.00.", True),
        ("**1,080**", True),
        ("1080 of 1,081", False),
        ("-1080", False),
        ("1080" + "x" * 400, False),
        ("1" * 5000, False),
        ("none", False),
        ("", False),
    ],
)
def test_the_last_number_decides_where_no_hashes_were_learned(response: str, right: bool) -> None:
    assert gsm8k.check_last("How many?", response, {"answer": "1,080"}) == float(right)


def test_signs_and_decimals_are_compared_as_numbers() -> None:
    assert gsm8k.check("", "#### -$2.50", {"answer": "-2.5"}) == 1.0
    assert gsm8k.check("", "#### .5", {"answer": "0.50"}) == 1.0
    with pytest.raises(ValueError, match="needs the reference in the row's `answer`"):
        gsm8k.check("How many?", "#### 1", {})
    with pytest.raises(ValueError, match="worlds.gsm8k:check_last needs the reference"):
        gsm8k.check_last("How many?", "1", {"answer": 1})


def test_a_verifier_gets_the_meta_data_if_it_takes_it() -> None:
    assert takes_meta(gsm8k.check) and not takes_meta(shop.check)
    conversation = Conversation([{"role": "user", "content": "q"}], None, None, None, {"answer": "2"})
    assert scored(gsm8k.check, conversation, "#### 2") == 1.0
    assert scored(lambda prompt, response: len(prompt), conversation, "") == 1.0


@pytest.mark.parametrize(
    ("numbers", "winner"),
    [("5 6 6", 1), ("5 6 5 6", 0), ("6 5 5 6 5", 1), ("? ? 4", 2), ("? ?", 0), ("7.0 8 7", 0)],
)
def test_the_majority_is_the_most_frequent_answer(numbers: str, winner: int) -> None:
    responses = [f"{i} #### {number}" for i, number in enumerate(numbers.split())]
    assert majority_response(responses, gsm8k.vote) == responses[winner]


def test_majority_scores_go_prompt_by_prompt() -> None:
    rows = [Conversation([{"role": "user", "content": "q"}], None, None, None, {"answer": a}) for a in ("1", "2")]
    passes = [["#### 1", "#### 1"], ["#### 3", "#### 2"], ["#### 1", "#### 3"]]
    assert majority_scores(passes, rows, gsm8k.check) == [1.0, 0.0]
    with pytest.raises(ValueError, match="worlds.shop defines no vote"):
        vote_of(shop.check)


@pytest.mark.skipif(GSM8K is None, reason="GSM8K's files are not here")
def test_every_solution_of_gsm8k_is_found_right() -> None:
    assert GSM8K
    rows = rows_of(GSM8K / "train.jsonl") + rows_of(GSM8K / "test.jsonl")
    conversations = [to_conversation(row, find_format(row, "x"), "x") for row in rows]
    assert len(conversations) == 2300
    assert all(scored(gsm8k.check, c, row["answer"]) == 1.0 for c, row in zip(conversations, rows, strict=True))
    wrong = [scored(gsm8k.check, c, row["answer"]) for c, row in zip(conversations, rows[1:], strict=False)]
    assert sum(wrong) / len(wrong) < 0.05  # the next question's solution is right by chance only


# ---- the arithmetic world


def test_the_world_is_a_function_of_its_seed_and_its_solutions_are_right() -> None:
    files = arithmetic.generate(3)
    assert files == arithmetic.generate(3) != arithmetic.generate(4)
    questions = [row["question"] for rows in files.values() for row in rows]
    assert len(set(questions)) == len(questions)
    for row in files["train.jsonl"] + files["test.jsonl"]:
        assert scored(gsm8k.check, to_conversation(row, "gsm8k", "x"), row["answer"]) == 1.0
        marks = MARK.findall(row["answer"])
        assert len(marks) == 2 and all(calculate(expression) == value for expression, value in marks)
    assert all(row["answer"].startswith("#### ") for row in files["questions_train.jsonl"])


def test_the_tokenizer_of_the_world_is_the_one_shipped_and_loses_nothing(tmp_path: Path) -> None:
    arithmetic.build_tokenizer(tmp_path)
    shipped = ROOT / "assets" / "arithmetic_tokenizer"
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((shipped / "tokenizer.json").read_text())
    tokenizer = load_tokenizer(settings_from(composed("model=arithmetic")).model)
    for row in arithmetic.generate(1)["train.jsonl"][:200]:
        for text in row.values():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


# ---- from end to end


def test_evaluation_with_calculator_and_majority(tmp_path: Path) -> None:
    rows = arithmetic.generate(1)["test.jsonl"][:6]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = [
        "datasets=[gsm8k]",
        f"datasets.gsm8k.train={tmp_path}/test.jsonl",
        f"datasets.gsm8k.test={tmp_path}/test.jsonl",
    ]
    # Learned by heart: then the six answers are right, one by one and by majority.
    steps = ["lr=5e-3", "n_epochs=100", "n_steps=60", "model.batch_size=6", "warmup=0.1"]
    launch.run_task(composed("model=arithmetic", *data, f"cache_dir={tmp_path}", "exp_name=m", *steps))
    launch.run_task(
        composed(
            "task=evaluate",
            "model=arithmetic",
            *data,
            f"cache_dir={tmp_path}",
            "exp_name=e",
            "evaluation.verifier=worlds.gsm8k:check",
            "evaluation.majority=3",
            "evaluation.calculator=true",
            f"++evaluation.models.m={tmp_path}/m/FINAL",
        )
    )
    row = json.loads((tmp_path / "e" / "results.json").read_text())["models"]["m"]
    assert row["majority"]["votes"] == 3 and row["majority"]["n"] == 6 and row["majority"]["temperature"] == 1.0
    assert row["greedy"]["score"] >= 5 / 6 and row["majority"]["score"] >= 4 / 6
    low, high = row["majority"]["ci95"]
    assert low < row["majority"]["score"] <= high
    assert "majority of 3 [95 %]" in (tmp_path / "e" / "results.md").read_text()
    with pytest.raises(ValueError, match="needs a temperature above 0"):
        launch.run_task(
            composed(
                "task=evaluate",
                "model=arithmetic",
                *data,
                f"cache_dir={tmp_path}",
                "exp_name=f",
                "evaluation.verifier=worlds.gsm8k:check",
                "evaluation.majority=3",
                "evaluation.temperatures=[0.0]",
                f"++evaluation.models.m={tmp_path}/m/FINAL",
            )
        )


@pytest.mark.parametrize(
    ("pipeline", "stages"), [("dpo_st", 17), pytest.param("dpo_st_arithmetic", 18, marks=pytest.mark.slow)]
)
def test_the_pipelines_have_a_plan(pipeline: str, stages: int, tmp_path: Path) -> None:
    done = command(f"pipeline={pipeline}", "dry_run=true", f"cache_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"{stages} stages, 0 done" in done.stdout
    assert "generation.calculator=true" in done.stdout and "evaluation.majority=" in done.stdout


@pytest.mark.slow
def test_a_short_run_goes_through_every_stage(tmp_path: Path) -> None:
    done = command(
        "pipeline=dpo_st_arithmetic",
        f"cache_dir={tmp_path}",
        "n_eval_examples=40",
        "pipeline.stages.evaluate.set.evaluation.majority=2",
        "++pipeline.data.questions.set.datasets.local.weight=0.1",
        # From about 400 steps on some responses are right; the other stages only have to run.
        *(
            f"pipeline.stages.{name}.set.n_steps={steps}"
            for name, steps in (("sft", 450), ("sft_1", 450), ("dpo_st", 3), ("self_training", 3))
        ),
        *(f"++pipeline.stages.{name}.set.n_steps=3" for name in ("dpo_1", "dpo_2")),
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "dpo_st_arithmetic" / "results.json").read_text())
    assert {"sft", "dpo_st", "self_training"} <= results["models"].keys() and results["majority_comparisons"]
    first, second = (
        rows_of(tmp_path / "dpo_st_arithmetic" / f"select_distinct_{i}" / "SELECT" / "distinct.jsonl") for i in (1, 2)
    )
    assert second[: len(first)] == first and len(second) > len(first)
