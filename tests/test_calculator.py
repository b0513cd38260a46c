"""The calculator: what it computes, what it refuses, GSM8K's own marks, and its tokens inside a batched generation."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

import models
from dataloader import encode_prompt
from generation.calculator import MARK, MAX_DEPTH, MAX_LENGTH, calculate, completion, value_of
from generation.calculator_hooks import (
    PAUSE,
    Calculator,
    Piece,
    check_tokenizer,
    forced_ids,
    ids_that_add,
    response_with_calculator,
)
from generation.hf import sample
from settings.schema import settings_from
from tests.support.helpers import ROOT, composed

GSM8K = next((f for p in ROOT.parents if (f := p / "shared/data/gsm8k").is_dir()), None)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        ("12/60", "0.2"),
        ("100-50-30-15", "5"),
        ("2-.5", "1.5"),
        ("60/(2/3)", "90"),
        ("-3+5", "2"),
        ("2*-3", "-6"),
        ("--4", "4"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("8/4/2", "1"),
        ("1,080+20", "1100"),
        ("10%*50", "5"),
        ("50%", "0.5"),
        ("1/3", "0.3333"),
        ("2/3", "0.6667"),
        ("-2/3", "-0.6667"),
        ("0.1+0.2", "0.3"),
        (" 4 + 5 ", "9"),
        ("007", "7"),
        ("3.", "3"),
        ("0", "0"),
        ("5-5", "0"),
    ],
)
def test_an_expression_has_its_exact_value(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1/0",
        "1/(2-2)",
        "2**3",
        "560//10",
        "2x",
        "__import__('os')",
        "1e9",
        "3 4",
        "1.2.3",
        "(1",
        "1)",
        "()",
        "1+",
        "*2",
        "1,08",
        "12,3456",
        "%",
        "²",
        "٣+1",
        "9" * 15 + "*10",
        "1/99999",
        "1" * (MAX_LENGTH + 1),
        "(" * 50 + "1" + ")" * 50,
        "-" * (MAX_DEPTH + 1) + "1",
    ],
)
def test_nonsense_has_no_value(text: str) -> None:
    assert calculate(text) is None


def test_the_longest_expressions_are_cheap_and_deep_ones_end() -> None:
    assert value_of("9*" * 59 + "9") == Fraction(9**60) and calculate("9*" * 59 + "9") is None
    assert calculate("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH) == "7"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("so <<48/2=", "24>>"),
        ("<<48/2=2", "4>>"),
        ("<<48/2=24", ">>"),
        ("<<48/2=24>", ">"),
        ("<<48/2=24>>", None),
        ("<<48/2=3", None),
        ("48/2=", None),
        ("<<48/2", None),
        ("<<what=", None),
        ("<<1+1=2>>2 <<3*3=", "9>>"),
        ("<<<<2+2=", "4>>"),
    ],
)
def test_a_mark_is_completed_from_the_text_alone(text: str, rest: str | None) -> None:
    assert completion(text) == rest


@pytest.mark.skipif(GSM8K is None, reason="GSM8K's files are not here")
def test_the_calculator_agrees_with_gsm8k() -> None:
    assert GSM8K
    text = "".join((GSM8K / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "test"))
    marks = MARK.findall("\n".join(json.loads(line)["answer"] for line in text.splitlines()))
    assert len(marks) == 7286
    assert [expression for expression, value in marks if value_of(expression) != Fraction(value)] == ["560//10"]
    # The rest is spelled otherwise by the data set's authors: 144.00 for 144, .4 for 0.4.
    otherwise = [(calculate(e), v) for e, v in marks if value_of(e) is not None and calculate(e) != v]
    assert len(otherwise) == 193
    assert all(v.startswith(".") or v.endswith("0") for _, v in otherwise)


# ---- while generating


@pytest.fixture(scope="module", params=["arithmetic"])
def small(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """Return (settings, model, tokenizer): a small model taught by heart to write wrong values into its marks."""
    settings = settings_from(composed("task=generate", f"model={request.param}", "generation.calculator=true"))
    tokenizer = models.load_tokenizer(settings.model)
    model: Any = models.load_model(settings.model, trainable=True)
    rows = [
        encode_prompt(tokenizer, turn(p))
        + tokenizer(r, add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id]
        for p, r in TAUGHT
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    # Padding is on the right and comes after the end: nothing before it sees it.
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return settings, model.eval(), tokenizer


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


TAUGHT = [
    ("Ada has 2 figs.", "2*3=<<2*3=9>>9.\n#### 9"),
    ("Each bag costs $4.", "That is 48/2=<<48/2=9>>9 So it is 9+1=<<9+1=9>>9.\n#### 9"),
    ("How many?", "9=<<(=9>>9.\n#### 9"),
]


def responses(small: tuple[Any, Any, Any], calculator: bool) -> list[tuple[str, str]]:
    settings, model, tokenizer = small
    generation = settings.generation.__class__(
        **{**vars(settings.generation), "temperature": 0.0, "max_new_tokens": 60, "calculator": calculator}
    )
    prompts = [encode_prompt(tokenizer, turn(prompt)) for prompt, _ in TAUGHT]
    got = sample(model, tokenizer, prompts, generation, [tokenizer.eos_token_id], len(tokenizer), seed=0)
    return [(tokenizer.decode(ids, skip_special_tokens=True), reason) for ids, reason in got]


def test_the_calculator_writes_over_what_the_model_would_say(small: tuple[Any, Any, Any]) -> None:
    assert [text for text, _ in responses(small, False)] == [answer for _, answer in TAUGHT]
    first, second, third = (text for text, _ in responses(small, True))
    assert "<<2*3=6>>" in first
    assert "<<48/2=24>>" in second
    for text in (first, second):  # whatever a response goes on with, every mark in it that has a value is right
        assert all(calculate(e) in (v, None) for e, v in MARK.findall(text))
    assert third == TAUGHT[2][1]  # nonsense is left to the model


class PauseAfter(StoppingCriteria):
    """What a server does for stop=["="]: end the row with the token that holds it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([PAUSE in self.tokenizer.decode([token]) for token in input_ids[:, -1].tolist()])


def test_a_backend_that_stops_at_equals_signs_responses_the_same(small: tuple[Any, Any, Any]) -> None:
    settings, model, tokenizer = small

    def speak(prompts: list[list[int]], rooms: list[int], seed: int) -> list[Piece]:
        pieces = []
        for ids, room in zip(prompts, rooms, strict=True):
            out = model.generate(
                torch.tensor([ids]),
                max_new_tokens=room,
                do_sample=False,
                stopping_criteria=[PauseAfter(tokenizer)],
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(ids) :].tolist()
            reason = (
                "stop"
                if out[-1] == tokenizer.eos_token_id
                else "pause"
                if PAUSE in tokenizer.decode(out[-1:])
                else "length"
            )
            pieces.append(Piece(out, reason))
        return pieces

    prompts = [encode_prompt(tokenizer, turn(prompt)) for prompt, _ in TAUGHT]
    got = response_with_calculator(speak, tokenizer, prompts, 60, seed=0)
    assert [(tokenizer.decode(ids, skip_special_tokens=True), reason) for ids, reason in got] == responses(small, True)
    short = response_with_calculator(speak, tokenizer, prompts, 12, seed=0)
    assert [ids for ids, _ in short] == [ids[:12] for ids, _ in got]
    assert {reason for _, reason in short} == {"length"}


def test_rows_of_a_batch_have_queues_of_their_own() -> None:
    settings = settings_from(composed("task=generate", "model=tiny"))
    tokenizer = models.load_tokenizer(settings.model)

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    calculator = Calculator(tokenizer, prompt_length=2)
    rows = ["<<<<7*8=", "xx <<3-3", "<<999/4="]  # the first two characters are the prompt
    said = ["", "", ""]
    for _ in range(5):
        ids = torch.tensor([ids_of(text) for text in rows])
        scores = calculator(ids, torch.zeros(3, len(tokenizer)))
        free = torch.isfinite(scores).sum(dim=1) > 1
        new = ["." if free[i] else tokenizer.decode([int(scores[i].argmax())]) for i in range(3)]
        rows = [text + piece for text, piece in zip(rows, new, strict=True)]
        said = [text + piece for text, piece in zip(said, new, strict=True)]
    assert said == ["56>>.", ".....", "....."]  # the third one's << is the prompt's


@pytest.mark.parametrize("folder", ["byte_tokenizer", "arithmetic_tokenizer"])
def test_forced_ids_decode_to_the_value(folder: str) -> None:
    tokenizer = models.load_tokenizer(settings_from(composed(f"model.tokenizer_name_or_path=assets/{folder}")).model)
    check_tokenizer(tokenizer)
    said = tokenizer("That is 9/4=<<9/4=", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(said + forced_ids(tokenizer, said)) == "That is 9/4=<<9/4=2.25>>"


def merging_tokenizer(folder: Path) -> Any:
    """Return a tokenizer in SentencePiece's manner: a space before what is encoded alone, and `=1` as one token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "▁", *"0123456789.-+*/<>=▁", "=1", ">>", "<<", "▁1"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(kinds.BPE(vocab, [("=", "1"), (">", ">"), ("<", "<"), ("▁", "1")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def test_merged_tokens_and_added_spaces_are_no_obstacle(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer(tmp_path)
    check_tokenizer(tokenizer)
    said = tokenizer("<<6+6=", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(said + forced_ids(tokenizer, said)) == "<<6+6=12>>"
    merged = tokenizer("<<6+6=1", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(merged)[-1] == "=1"
    assert tokenizer.decode(merged + forced_ids(tokenizer, merged)) == "<<6+6=12>>"


def test_a_tokenizer_that_cannot_write_digits_is_refused() -> None:
    tokenizer = models.load_tokenizer(settings_from(composed("model=quickstart_student")).model)
    assert ids_that_add(tokenizer, [], "24>>") == []
    with pytest.raises(ValueError, match="cannot write a value"):
        check_tokenizer(tokenizer)
