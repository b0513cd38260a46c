"""The shop world: an exact judge, data that are what they say, and a tokenizer that loses nothing."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from worlds import shop

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "order : 9 figs , 5 kiwis , 8 apples , for ida , tone polite , reply :"
GOOD = "dear ida , 9 figs and 5 kiwis makes 14 , and 8 apples makes 22 . thank you !"


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, Any]]]:
    return shop.generate(1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "assets" / "shop_tokenizer")


def prompt_of(row: dict[str, Any]) -> str:
    return (row.get("messages") or row["chosen"])[0]["content"]


@pytest.mark.parametrize(
    ("old", "new", "fails"),
    [
        ("dear ida", "dear friend", {"name"}),
        ("dear ida", "dear ben", {"name"}),
        ("dear ida", "hi ida", {"tone"}),
        ("thank you !", "bye !", {"tone"}),
        ("9 figs", "8 figs", {"items"}),
        ("5 kiwis", "5 plums", {"items"}),
        ("9 figs and 5 kiwis", "5 kiwis and 9 figs", {"items"}),
        ("makes 14", "makes 13", {"first_total"}),
        ("makes 22", "makes 23", {"second_total"}),
        ("makes 22", "make 22", set()),
        ("dear ida ,", "dear dear ida ,", set(shop.CHECKS)),
        ("thank you !", "thank you ! !", set(shop.CHECKS)),
        (GOOD, "", set(shop.CHECKS)),
    ],
)
def test_every_flaw_fails_its_own_check_and_no_other(old: str, new: str, fails: set[str]) -> None:
    reply = GOOD.replace(old, new)
    verdicts = shop.checks(PROMPT, reply)
    assert {name for name, passed in verdicts.items() if not passed} == fails
    assert shop.check(PROMPT, reply) == float(not fails)


def test_the_judge_agrees_with_a_second_judge_written_by_another_route(data: dict[str, list[dict[str, Any]]]) -> None:
    right = 0
    for row in data["sft_train.jsonl"][:2000]:
        order, words = row["order"], row["messages"][1]["content"].split()
        (q1, i1), (q2, i2), (q3, i3) = order["items"]
        polite = order["tone"] == "polite"
        body = f"{order['name']} , {q1} {i1} and {q2} {i2} VERB {q1 + q2} , and {q3} {i3} VERB {q1 + q2 + q3} ."
        exact = (
            ["VERB" if word in ("make", "makes") else word for word in words[1:17]] == body.split()
            and (words[0] in ("dear", "esteemed", "honoured")) == polite
            and (words[-2] in ("you", "regards", "respect")) == polite
        )
        assert exact == bool(shop.check(prompt_of(row), row["messages"][1]["content"]))
        right += exact
    assert 150 < right < 320


def test_a_prompt_of_another_world_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match=r"not a prompt of worlds\.shop: 'Hello'.*order : 9 figs"):
        shop.check("Hello", GOOD)


def test_files_have_their_sizes_and_no_prompt_twice(data: dict[str, list[dict[str, Any]]]) -> None:
    sizes = {
        "prompts_test.jsonl": 1000,
        "pairs_test.jsonl": 500,
        "sft_test.jsonl": 500,
        "sft_train.jsonl": 8000,
        "pairs_train.jsonl": 4000,
    }
    assert {name: len(rows) for name, rows in data.items()} == sizes
    prompts = [prompt_of(row) for rows in data.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 14_000


def test_flaws_of_demonstrations_are_independent_and_as_frequent_as_said(data: dict[str, list[dict[str, Any]]]) -> None:
    verdicts = [shop.checks(prompt_of(row), row["messages"][1]["content"]) for row in data["sft_train.jsonl"]]
    passed = {name: sum(v[name] for v in verdicts) / len(verdicts) for name in shop.CHECKS}
    expected = {"grammar": 1.0, "name": 0.5, "tone": 0.65, "items": 0.65, "first_total": 0.75, "second_total": 0.75}
    assert passed == pytest.approx(expected, abs=0.025)  # four standard deviations of 8,000 draws
    exact = sum(all(v.values()) for v in verdicts) / len(verdicts)
    assert exact == pytest.approx(0.5 * 0.65 * 0.65 * 0.75 * 0.75, abs=0.015)


def test_chosen_passes_strictly_more_checks_than_rejected(data: dict[str, list[dict[str, Any]]]) -> None:
    margins: Counter[int] = Counter()
    for row in data["pairs_train.jsonl"]:
        assert row["chosen"][0] == row["rejected"][0]
        counts = [sum(shop.checks(prompt_of(row), row[side][1]["content"]).values()) for side in ("chosen", "rejected")]
        margins[counts[0] - counts[1]] += 1
    assert min(margins) >= 1
    assert margins[1] > 500 and margins[2] > 500  # not only hopeless rejected replies


def test_the_order_column_is_what_the_prompt_says(data: dict[str, list[dict[str, Any]]]) -> None:
    for name in data:
        row = data[name][0]
        order = shop.parse_prompt(prompt_of(row))
        assert row["order"] == {"items": [list(pair) for pair in order.items], "name": order.name, "tone": order.tone}
        assert shop.prompt_text(order) == prompt_of(row)


def test_the_command_writes_the_same_bytes_for_a_seed_and_others_for_another(tmp_path: Path) -> None:
    def contents(folder: str, seed: int) -> dict[str, bytes]:
        command = [sys.executable, "-m", "worlds.shop", str(tmp_path / folder), "--seed", str(seed)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    first = contents("a", 1)
    assert sorted(first) == sorted(name for name, _, _ in shop.FILES)
    assert contents("b", 1) == first
    assert all(content != first[name] for name, content in contents("c", 2).items())
    assert json.loads(first["prompts_test.jsonl"].splitlines()[0])["messages"][0]["role"] == "user"


def test_every_text_survives_encoding_and_decoding(data: dict[str, list[dict[str, Any]]], tokenizer: Any) -> None:
    texts = {prompt_of(row) for rows in data.values() for row in rows[:300]}
    texts |= {row[side][1]["content"] for row in data["pairs_train.jsonl"][:300] for side in ("chosen", "rejected")}
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids


def test_the_template_is_the_plain_prompt_then_the_reply_then_one_end(tokenizer: Any) -> None:
    user, assistant = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": GOOD}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == PROMPT
    text = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert text == f"{PROMPT} {GOOD} <end>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[: len(PROMPT.split())] == tokenizer(PROMPT)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.eos_token == "<end>"
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_tokenizer_of_the_repository_is_the_one_that_the_world_builds(tmp_path: Path, tokenizer: Any) -> None:
    shop.build_tokenizer(tmp_path)
    built = AutoTokenizer.from_pretrained(tmp_path)
    assert built.get_vocab() == tokenizer.get_vocab()
    assert len(built) == len(shop.vocabulary()) == 80
    assert built.chat_template == tokenizer.chat_template
    assert (tmp_path / "tokenizer.json").read_text() == (ROOT / "assets/shop_tokenizer/tokenizer.json").read_text()
