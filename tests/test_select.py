"""task=select: pairs by correctness, distinct responses, nothing from the test split, and files that the loaders read
back.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import launch
from dataloader import load_examples
from models import load_tokenizer
from settings.schema import settings_from
from tasks import select
from templates import tokenizer_digest
from tests.support.helpers import composed, rows_of

BYTES = tokenizer_digest(load_tokenizer(settings_from(composed("model=tiny")).model))  # who claims the ids
QUESTIONS = {"How many?": "6", "How much?": "1,080", "What is left?": "2", "Who?": "9", "Held out?": "3"}


def response(question: str, text: str, sample: int = 0, end: str = "stop") -> dict[str, Any]:
    """Return a row as task=generate writes it; the ids are the bytes, no tokenizer's."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "prompt_ids": list(question.encode()),
        "response": text,
        "response_ids": [*text.encode(), 1] if end == "stop" else list(text.encode()),
        "finish_reason": end,
        "tokenizer_digest": BYTES,
        "sample": sample,
        "meta": {"answer": QUESTIONS[question]},
    }


ROWS = [
    response("How many?", "2*3 is six #### 6"),
    response("How many?", "2*3 is six #### 6", 1),
    response("How many?", "three and three #### 6.0", 2),
    response("How many?", "I guess #### 7", 3),
    response("How many?", "no idea", 4),
    response("How many?", "cut #### 6", 5, "length"),
    response("How much?", "a b c d e f g h i #### $1080"),
    response("How much?", "a b c d e f g h j #### 1,080", 1),
    response("How much?", "quite another way #### 1080", 2),
    response("What is left?", "nothing"),
    response("Held out?", "#### 3"),
    response("Held out?", "#### 4", 1),
    response("Who?", "x #### 9"),
    response("Who?", "y #### 8", 1),
    response("Who?", "z #### 7", 2),
]


def run(folder: Path, name: str, *overrides: str) -> Path:
    """Run task=select on ROWS and return its SELECT folder."""
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    solved = {"question": "How much?", "answer": "a b c d e f g h k #### 1,080"}
    (folder / "train.jsonl").write_text(json.dumps(solved) + "\n", encoding="utf-8")
    (folder / "test.jsonl").write_text(
        json.dumps({"question": " Held  out?", "answer": "#### 3"}) + "\n", encoding="utf-8"
    )
    launch.run_task(
        composed(
            "task=select",
            f"cache_dir={folder}",
            f"exp_name={name}",
            "datasets=[gsm8k]",
            f"datasets.gsm8k.train={folder}/train.jsonl",
            f"datasets.gsm8k.test={folder}/test.jsonl",
            f"select.generations={folder}/generations.jsonl",
            "select.verifier=worlds.gsm8k:check",
            *overrides,
        )
    )
    return folder / name / "SELECT"


def test_pairs_are_correct_against_incorrect_of_one_question(tmp_path: Path) -> None:
    folder = run(tmp_path, "pairs", "select.pairs_per_prompt=3")
    pairs = rows_of(folder / "pairs_train.jsonl")
    by_question = {q: [p for p in pairs if p["prompt"][0]["content"] == q] for q in QUESTIONS}
    assert {q: len(p) for q, p in by_question.items()} == {
        "How many?": 3,
        "How much?": 0,
        "What is left?": 0,
        "Who?": 2,
        "Held out?": 0,
    }
    for pair in by_question["How many?"]:
        assert pair["chosen"] in ("2*3 is six #### 6", "three and three #### 6.0")
        assert pair["rejected"] in ("I guess #### 7", "no idea")
        assert pair["chosen_ids"] == [*pair["chosen"].encode(), 1]
    assert len({(p["chosen"], p["rejected"]) for p in pairs}) == len(pairs)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    assert counts["questions"] == 4 and counts["questions of the test split left out"] == 1
    assert (
        counts["questions without a correct response"] == 1 and counts["questions without an incorrect response"] == 1
    )
    assert counts["repeated responses dropped"] == 1 and counts["correct responses without an end dropped"] == 1


def test_every_response_is_used_before_one_is_used_again() -> None:
    question = select.Question(
        "q", [response("Who?", f"c{i}") for i in range(5)], [response("Who?", f"r{i}") for i in range(3)]
    )
    whole = select.draw_pairs(question, 100, select.random.Random(0))
    assert len({(p["chosen"], p["rejected"]) for p in whole}) == len(whole) == 15
    few = select.draw_pairs(question, 5, select.random.Random(0))
    assert len({p["chosen"] for p in few}) == 5 and len({p["rejected"] for p in few}) == 3


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    one, again, other = (
        run(tmp_path, name, f"seed={seed}", "select.pairs_per_prompt=1")
        for name, seed in (("a", 1), ("b", 1), ("c", 3))
    )
    texts = [(folder / "pairs_train.jsonl").read_text(encoding="utf-8") for folder in (one, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_held_out_pairs_are_of_other_questions(tmp_path: Path) -> None:
    folder = run(tmp_path, "held", "select.holdout=0.1")
    asked = [
        {row["prompt"][0]["content"] for row in rows_of(folder / f"pairs_{split}.jsonl")} for split in ("train", "test")
    ]
    assert len(asked[0]) == len(asked[1]) == 1 and asked[0] | asked[1] == {"How many?", "Who?"}


def test_distinct_responses_are_unlike_the_data_and_each_other(tmp_path: Path) -> None:
    folder = run(tmp_path, "distinct", "select.make=distinct")
    texts = [row["response"] for row in rows_of(folder / "distinct.jsonl")]
    # With the solution of the data set the first one shares 9 of 13 words (0.69), the second one 10 of 12 (0.83).
    assert texts == [
        "2*3 is six #### 6",
        "three and three #### 6.0",
        "a b c d e f g h i #### $1080",
        "quite another way #### 1080",
        "x #### 9",
    ]
    again = run(tmp_path, "again", "select.make=distinct", f"select.earlier=[{folder}/distinct.jsonl]")
    assert (again / "distinct.jsonl").read_text(encoding="utf-8") == (folder / "distinct.jsonl").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [("a b", "b a", 1.0), ("a b c", "b c d", 0.5), ("a", "b", 0.0), ("", "", 1.0), ("", "a", 0.0)],
)
def test_similarity_is_the_share_of_common_words(one: str, other: str, value: float) -> None:
    assert select.similarity(select.words(one), select.words(other)) == value


def test_what_is_written_is_read_back_with_its_ids(tmp_path: Path) -> None:
    pairs, distinct = run(tmp_path, "p", "select.holdout=0.5"), run(tmp_path, "d", "select.make=distinct")
    raw = composed(
        "model=tiny",
        "datasets=[gsm8k,local]",
        f"datasets.gsm8k.train={tmp_path}/train.jsonl",
        f"datasets.local.train={distinct}/distinct.jsonl",
    )
    settings = settings_from(raw)
    examples = load_examples(settings.datasets, "train", load_tokenizer(settings.model), settings.model)
    assert len(examples) == 1 + 5 and examples[0].conversation.meta == {"answer": "1,080"}
    assert (
        examples[1].response is not None and examples[1].response.ids == ROWS[0]["prompt_ids"] + ROWS[0]["response_ids"]
    )
    raw["datasets"] = {
        "local": {
            **raw["datasets"]["local"],
            "train": f"{pairs}/pairs_train.jsonl",
            "test": f"{pairs}/pairs_test.jsonl",
        }
    }
    settings = settings_from(raw)
    for split in ("train", "test"):
        rows = rows_of(pairs / f"pairs_{split}.jsonl")
        for example, row in zip(
            load_examples(settings.datasets, split, load_tokenizer(settings.model), settings.model), rows, strict=True
        ):
            assert example.chosen and example.rejected
            assert example.chosen.ids == row["prompt_ids"] + row["chosen_ids"] and sum(example.chosen.response) == len(
                row["chosen_ids"]
            )
            assert example.rejected.ids == row["prompt_ids"] + row["rejected_ids"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs select.generations"):
        launch.run_task(composed("task=select", f"cache_dir={tmp_path}", "datasets=[gsm8k]"))
    (tmp_path / "config.yaml").write_text("generation: {split: test}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="answers the test split"):
        run(tmp_path, "leak")
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="nothing to write"):
        run(tmp_path, "none", "select.verifier=tests.test_select:never")
    with pytest.raises(ValueError, match="verifier tests.support.rewards:raises failed on the response"):
        run(tmp_path, "raises", "select.verifier=tests.support.rewards:raises")
    with pytest.raises(ValueError, match="nothing to write"):  # one question has pairs: it cannot be on both sides
        run(tmp_path, "one", "select.verifier=tests.test_select:only_six", "select.holdout=0.5")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: no finish_reason"):
        run(tmp_path, "broken", f"select.generations={tmp_path}/broken.jsonl")


def never(prompt: str, response: str) -> float:
    """Find no response correct."""
    return 0.0


def only_six(prompt: str, response: str) -> float:
    """Find one question's responses correct."""
    return float("six" in response)


def test_responses_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    """Neither in one file, nor with the rows of earlier rounds."""
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[1], "tokenizer_digest": "another"}) + "\n")
    with pytest.raises(ValueError, match="mixed.jsonl, row 2: its ids are of another tokenizer"):
        run(tmp_path, "mixed", f"select.generations={mixed}")
    earlier = tmp_path / "earlier.jsonl"
    earlier.write_text(json.dumps({**ROWS[0], "tokenizer_digest": "another"}) + "\n")
    with pytest.raises(ValueError, match="earlier.jsonl.*another tokenizer"):
        run(tmp_path, "earlier", "select.make=distinct", f"select.earlier=[{earlier}]")
    nobodys = tmp_path / "nobodys.jsonl"
    nobodys.write_text(json.dumps({k: v for k, v in ROWS[0].items() if k != "tokenizer_digest"}) + "\n")
    with pytest.raises(ValueError, match="nobodys.jsonl, row 1: has token ids and no tokenizer_digest"):
        run(tmp_path, "nobodys", f"select.generations={nobodys}")


def test_no_pair_is_of_prompts_that_differ_in_white_space() -> None:
    rows = [response("Who?", "x #### 9"), response("Who?", "y #### 8")]
    spaced = [row | {"prompt_ids": [32, *row["prompt_ids"]], "response": f"{row['response']} "} for row in rows]
    question = select.Question("q", [rows[0], spaced[0]], [spaced[1], rows[1]])
    pairs, _ = select.make_pairs([question], 9, 0.0, 0)
    assert sorted((len(p["prompt_ids"]), p["chosen"], p["rejected"]) for p in pairs) == [
        (4, "x #### 9", "y #### 8"),
        (5, "x #### 9 ", "y #### 8 "),
    ]
    lonely = select.Question("q", [rows[0]], [spaced[1]])
    assert select.make_pairs([lonely], 9, 0.5, 0) == ([], [])
