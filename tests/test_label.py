"""task=label: scores by a verifier, a reward model and a judge; rows that the loaders read back; what goes wrong."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import launch
import models
from dataloader import load_examples
from rewards.reward_model import RewardModel
from templates import turn_end
from tests.support.helpers import composed, rows_of, write_pairs
from tests.test_judge import Response, Server, longer_wins, serve  # noqa: F401

ROWS = [
    {"prompt": "say 1", "response": "eeee"},
    {"prompt": "say 1", "response": "abc"},
    {"prompt": "say 1", "response": "ex"},
    {"prompt": "say 2", "response": "none"},
    {"prompt": "say 3", "response": "a"},
    {"prompt": "say 3", "response": "b"},
]
CHECKER = "label.verifier=tests.support.rewards:share_of_e"
BYTES = models.tokenizer_digest(models.load_tokenizer(launch.settings_of(composed("model=tiny")).model))


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def label(folder: Path, *overrides: str, name: str = "label") -> list[dict]:
    launch.run_task(
        composed(
            "task=label",
            "model=tiny",
            f"cache_dir={folder}",
            f"exp_name={name}",
            f"label.responses={folder}/responses.jsonl",
            *overrides,
        )
    )
    return rows_of(folder / name / "LABEL" / "labeled.jsonl")


def examples_of(path: Path) -> list:
    settings = launch.settings_of(composed("model=tiny", "datasets=[local]", f"datasets.local.train={path}"))
    return load_examples(settings.datasets, "train", models.load_tokenizer(settings.model), settings.model)


def test_a_verifier_gives_rewards_labels_and_pairs(tmp_path: Path, responses: Path) -> None:
    scores = label(tmp_path, CHECKER, name="scores")
    assert [row["reward"] for row in scores] == [1.0, 0.0, 0.5, 0.25, 0.0, 0.0] and [
        row["response"] for row in scores
    ] == [r["response"] for r in ROWS]
    binary = label(tmp_path, CHECKER, "label.make=binary", "label.threshold=0.5", name="binary")
    assert [row["label"] for row in binary] == [True, False, True, False, False, False]
    pairs = label(tmp_path, CHECKER, "label.make=pairs", name="pairs")
    assert pairs == [
        {"prompt": "say 1", "chosen": "eeee", "rejected": "abc", "chosen_reward": 1.0, "rejected_reward": 0.0}
    ]
    summary = json.loads((tmp_path / "pairs" / "LABEL" / "summary.json").read_text())
    assert (
        summary["prompts with one response"] == 1
        and summary["prompts whose responses tie"] == 1
        and summary["scored"] == 6
    )
    example = examples_of(tmp_path / "pairs" / "LABEL" / "labeled.jsonl")[0]
    assert example.chosen is not None and example.rejected is not None
    assert [e.conversation.meta["label"] for e in examples_of(tmp_path / "binary" / "LABEL" / "labeled.jsonl")] == [
        r["label"] for r in binary
    ]


def test_generated_ids_travel_into_pairs(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "prompt_ids": [1, 2],
            "tokenizer_digest": BYTES,
            "response_ids": ids,
            "response": text,
            "finish_reason": "stop",
            "meta": {},
        }
        for ids, text in (([5, 0], "eee"), ([6, 7, 0], "xyz"))
    ]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    label(tmp_path, CHECKER, "label.make=pairs")
    (example,) = examples_of(tmp_path / "label" / "LABEL" / "labeled.jsonl")
    assert example.chosen.ids == [1, 2, 5, 0] and example.rejected.ids == [1, 2, 6, 7, 0]


def test_a_reward_model_scores_as_it_was_trained(tmp_path: Path, responses: Path) -> None:
    """The scores of chosen and rejected responses are those that training logged; a causal model is refused."""
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    common = ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}"]
    launch.run_task(
        composed(
            *common, "loss=bradley-terry", f"datasets.local.test={data}", "exp_name=reward", "n_steps=6", "lr=3e-3"
        )
    )
    logged = rows_of(tmp_path / "reward" / "metrics.jsonl")[-1]
    rows = [
        {"prompt": row["chosen"][0]["content"], "response": row[side][1]["content"]}
        for row in rows_of(data)
        for side in ("chosen", "rejected")
    ]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = [row["reward"] for row in label(tmp_path, f"label.reward_model={tmp_path}/reward/FINAL")]
    assert sum(scored[::2]) / 8 == pytest.approx(logged["rewards_eval/chosen"], abs=1e-5)
    assert sum(scored[1::2]) / 8 == pytest.approx(logged["rewards_eval/rejected"], abs=1e-5)
    settings = launch.settings_of(composed("task=label", *common, "label.responses=x", CHECKER))
    model = RewardModel(settings, f"{tmp_path}/reward/FINAL", "label.reward_model")
    end = turn_end(model.tokenizer).id
    forged = f"a{model.tokenizer.convert_ids_to_tokens(end)}b"  # as text it begins no new turn
    assert model.tokens([{"role": "user", "content": "say"}], forged, True).ids.count(end) == 2  # prompt, response
    launch.run_task(composed(*common, "exp_name=plain", "n_steps=1"))
    with pytest.raises(ValueError, match="is no reward model: it holds LlamaForCausalLM"):
        label(tmp_path, f"label.reward_model={tmp_path}/plain/FINAL", name="refused")


def test_a_judge_scores(tmp_path: Path, responses: Path, serve) -> None:  # noqa: F811
    server: Server = serve(longer_wins)
    rows = label(tmp_path, "label.judge=true", f"judge.base_url={server.url}")
    assert [row["reward"] for row in rows] == [4, 3, 2, 4, 1, 1]


def test_a_killed_run_keeps_its_scores(tmp_path: Path, responses: Path) -> None:
    label(tmp_path, CHECKER)
    folder = tmp_path / "label" / "LABEL"
    lines = (folder / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "scores.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:7])
    (tmp_path / "label" / "DONE").unlink()
    before = (folder / "labeled.jsonl").read_bytes()
    label(tmp_path, CHECKER)
    assert json.loads((folder / "summary.json").read_text())["scores taken from an earlier run"] == 3
    assert (folder / "labeled.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "needs one of label.verifier"),
        ([CHECKER, "label.judge=true"], "given: verifier, judge"),
        (["label.verifier=tests.support.rewards:no_number"], "failed on row 1 .*it gives nan.*label.on_error=skip"),
        (["label.verifier=tests.support.rewards:raises"], "failed on row 1 .*no such order.*label.on_error=skip"),
        (["label.judge=true"], "a judge needs judge.base_url"),
        ([CHECKER, "label.make=pairs", "label.margin=2"], "nothing to write"),
        ([CHECKER, "label.make=best"], "label.make='best' is not known"),
        (["label.judge=true", "judge.base_url=localhost:8000"], "must be http://HOST:PORT/v1"),
    ],
)
def test_what_cannot_work_is_one_error(tmp_path: Path, responses: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label(tmp_path, *overrides)


def test_a_resume_takes_no_score_of_a_row_with_another_reference_answer(tmp_path: Path) -> None:
    """A verifier reads the row's meta, so the score belongs to it, too."""
    path, check = tmp_path / "responses.jsonl", "label.verifier=worlds.gsm8k:check"
    row = {"prompt": "2*3?", "response": "six #### 6", "answer": "6"}
    path.write_text(json.dumps(row) + "\n")
    assert label(tmp_path, check)[0]["reward"] == 1.0
    (tmp_path / "label" / "DONE").unlink()
    path.write_text(json.dumps({**row, "answer": "7"}) + "\n")
    assert label(tmp_path, check)[0]["reward"] == 0.0


def test_a_resume_takes_no_score_of_an_edited_verifier(tmp_path: Path, responses: Path, monkeypatch) -> None:
    module = tmp_path / "own_verifier.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    for value in (0.25, 0.75):
        module.write_text(f"def check(prompt, response):\n    return {value}  # {'x' * int(100 * value)}\n")
        importlib.invalidate_caches()
        sys.modules.pop("own_verifier", None)
        (tmp_path / "label" / "DONE").unlink(missing_ok=True)
        assert label(tmp_path, "label.verifier=own_verifier:check")[0]["reward"] == value


def test_a_resume_takes_no_score_of_an_edited_question(tmp_path: Path, responses: Path, serve) -> None:  # noqa: F811
    server: Server = serve(lambda question: (200, "Score: 5"))
    template, asked = tmp_path / "score.txt", []
    for text in ("Rate {prompt} {response}", "Rate again {prompt} {response}"):
        template.write_text(text)
        (tmp_path / "label" / "DONE").unlink(missing_ok=True)
        label(tmp_path, "label.judge=true", f"judge.base_url={server.url}", f"judge.score_template={template}")
        asked.append(json.loads((tmp_path / "label" / "LABEL" / "summary.json").read_text()))
    assert [summary["scores taken from an earlier run"] for summary in asked] == [0, 0]


def test_ids_of_two_tokenizers_or_of_an_unknown_one_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "hi", "prompt_ids": [1], "response_ids": [5, 0], "response": "eee", "tokenizer_digest": BYTES}
    for other, message in (
        ({**row, "tokenizer_digest": "another"}, "row 2: its ids are of another tokenizer .digest another.*row 1"),
        ({k: v for k, v in row.items() if k != "tokenizer_digest"}, "row 2: has token ids and no tokenizer_digest"),
    ):
        (tmp_path / "responses.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
        with pytest.raises(ValueError, match=message):
            label(tmp_path, CHECKER)


def test_bad_rows_are_an_error_or_counted(tmp_path: Path, responses: Path) -> None:
    responses.write_text(
        responses.read_text() + json.dumps({"prompt": "say 9"}) + "\n" + json.dumps({"text": "?"}) + "\n"
    )
    with pytest.raises(ValueError, match="row 7: has no response to score"):
        label(tmp_path, CHECKER)
    assert len(label(tmp_path, CHECKER, "label.on_error=skip")) == 6
    assert json.loads((tmp_path / "label" / "LABEL" / "summary.json").read_text())["rows that could not be read"] == 2


def generated(prompt: str, prompt_ids: list[int], response: str, **more) -> dict:
    row = {"prompt": [{"role": "user", "content": prompt}], "prompt_ids": prompt_ids, "response": response}
    row |= {"response_ids": [ord(c) for c in response] + [257], "finish_reason": "stop", "tokenizer_digest": BYTES}
    return row | {"meta": {}, **more}


def test_a_pair_is_of_one_prompt_and_white_space_makes_another(tmp_path: Path) -> None:
    """Code differs by its indentation alone, and a response was sampled behind the ids of its own prompt."""
    prompts = {"if x:\n  y\nz": [1, 2, 3], "if x:\n  y\n  z": [1, 2, 2, 3]}
    rows = [generated(text, ids, said) for text, ids in prompts.items() for said in (f"e{len(ids)}", f"a{len(ids)}")]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rows[2:], rows[1]]))
    pairs = label(tmp_path, CHECKER, "label.make=pairs")
    assert [(pair["prompt_ids"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ([1, 2, 3], "e3", "a3"),
        ([1, 2, 2, 3], "e4", "a4"),
    ]
    assert all(pair["prompt"][0]["content"] in prompts for pair in pairs)


def test_pairs_are_made_of_rows_in_any_format(tmp_path: Path) -> None:
    system, asked = {"role": "system", "content": "be kind"}, {"role": "user", "content": "say 1"}
    said = [{"role": "assistant", "content": text} for text in ("eeee", "abc")]
    rows = [{"messages": [system, asked, one], "prompt": "the name of the prompt"} for one in said]
    rows += [{"instruction": "say 2", "input": "", "output": one["content"]} for one in said]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = label(tmp_path, CHECKER, "label.make=pairs")
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ([system, asked], "eeee", "abc"),
        ("say 2", "eeee", "abc"),
    ]
    examples = examples_of(tmp_path / "label" / "LABEL" / "labeled.jsonl")
    assert examples[0].conversation.prompt == [system, asked]
