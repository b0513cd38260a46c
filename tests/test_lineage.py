"""What was sampled and checked for a model's training, read from the folders of its runs."""

import json
from pathlib import Path
from typing import Any

import yaml

from evaluation.costs import cost_of
from evaluation.lineage import generated_tokens, run_of, scored_responses


def written(folder: Path, rows: list[dict[str, Any]], **config: Any) -> Path:
    """Write a run's folder with its config, its metrics and a model; return the model's folder."""
    (folder / "FINAL").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": "train", **config}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "FINAL"


def generations(folder: Path, tokens: int) -> str:
    """Write a run of task=generate; return its file."""
    written(folder, [], task="generate")
    (folder / "summary.json").write_text(json.dumps({"tokens": tokens}), encoding="utf-8")
    (folder / "generations.jsonl").touch()
    return str(folder / "generations.jsonl")


def test_what_was_sampled_on_the_way_counts_once(tmp_path: Path) -> None:
    first, second = generations(tmp_path / "gen", 100), generations(tmp_path / "gen2", 40)
    start = written(tmp_path / "sft", [{"step": 1, "loss/train": 1.0}])
    round1 = written(
        tmp_path / "r1", [{"step": 5}], model={"load_from": str(start)}, loss={"generations": first, "teacher": "x"}
    )
    round2 = written(tmp_path / "r2", [], model={"load_from": str(round1)}, loss={"generations": second})
    online = written(
        tmp_path / "ppo",
        [{"step": 1, "generated_tokens": 30}, {"step": 2, "generated_tokens": 70}, {"step": 2, "loss/eval": 1.0}],
        model={"load_from": str(round2)},
    )
    assert [generated_tokens(str(folder)) for folder in (start, round1, round2, online)] == [None, 100, 140, 210]
    again = written(tmp_path / "again", [], model={"load_from": str(round1)}, loss={"generations": first})
    assert generated_tokens(str(again)) == 100


def test_rows_made_of_generations_count_and_a_hub_s_name_is_nobody_s(tmp_path: Path) -> None:
    source = generations(tmp_path / "gen", 60)
    written(tmp_path / "labels", [], task="label", label={"responses": source})
    labeled = tmp_path / "labels" / "LABEL" / "labeled.jsonl"
    labeled.parent.mkdir()
    labeled.touch()
    (labeled.parent / "summary.json").write_text(json.dumps({"scored": 8}), encoding="utf-8")
    dpo = written(tmp_path / "dpo", [], datasets={"local": {"train": str(labeled), "test": None}})
    assert (generated_tokens(str(dpo)), scored_responses(str(dpo))) == (60, 8)
    ppo = [{"step": 1, "scored_responses": 16}, {"step": 2, "scored_responses": 32}]
    after = written(tmp_path / "ppo", ppo, model={"load_from": str(dpo)})
    assert scored_responses(str(after)) == 40
    cost = cost_of(str(after))
    assert cost is not None and cost.checked == 40 and scored_responses("owner/name") is None
    assert generated_tokens("meta-llama/Llama-3.2-1B") is None and run_of(None) is None
    assert run_of(str(tmp_path)) is None


def test_what_a_teacher_took_that_only_wrote_responses_is_not_its_student_s(tmp_path: Path) -> None:
    teacher = written(tmp_path / "teacher", [{"step": 1, "scored_responses": 5}])
    source = generations(tmp_path / "gen", 60)
    config = {"task": "generate", "model": {"load_from": str(teacher)}}
    (tmp_path / "gen" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    student = written(tmp_path / "student", [], datasets={"local": {"train": source, "test": None}})
    cost = cost_of(str(student))
    assert cost is not None and (cost.runs, cost.sampled, cost.checked) == (2, 60, 0)
    assert scored_responses(str(student)) is None
