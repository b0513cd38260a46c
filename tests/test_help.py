"""launch.py --help and help=GROUP/NAME: what they say, and that each example runs."""

import re
import shlex

import pytest
import yaml

from launch import settings_of
from settings.help import CONFIG, EXAMPLES, GROUPS, MEANT, choices, help_text
from tests.support.helpers import ROOT, composed, write_pairs


def test_the_overview_says_what_it_does_with_six_examples_and_a_line_a_group() -> None:
    text = help_text(["--help"])
    assert len(EXAMPLES) == 6 and all(f"launch.py {line}" in text for line, _ in EXAMPLES)
    for group, meant in MEANT.items():
        assert re.search(rf"^  {group} +{re.escape(meant)}$", text, re.M)
    assert "help=loss/adpa" in text and "estimate" in text
    assert len(text.splitlines()) < 45


@pytest.mark.parametrize("line", [line for line, _ in EXAMPLES if "pipeline=" not in line])
def test_the_examples_compose(line: str, tmp_path, monkeypatch) -> None:
    for name in ("sft.jsonl", "pairs.jsonl"):
        write_pairs(tmp_path / name, 4)
    monkeypatch.chdir(tmp_path)
    assert settings_of(composed(*shlex.split(line))).datasets


def test_a_loss_is_shown_with_formula_needs_source_and_commented_keys() -> None:
    text = help_text(["help=loss/adpa"])
    gamma = yaml.safe_load((CONFIG / "loss/adpa.yaml").read_text(encoding="utf-8"))["gamma"]
    assert f"− {gamma} · token_mean of Σ_a π_θ(a|s_t) A(s_t, a)" in text
    assert "an advantage cache" in text and "2502.17927" in text
    assert re.search(r"^gamma: .*# \w", text, re.M)


def test_the_keys_of_a_base_are_shown_too_and_help_beside_a_choice_means_the_choice() -> None:
    text = help_text(["loss=dpo", "--help"])
    assert text == help_text(["help=loss/dpo"])
    assert "# strength of the implicit KL constraint" in text and "nll_weight: " in text
    assert "defaults:" not in text


@pytest.mark.parametrize("group", MEANT)
def test_every_choice_of_every_group_has_a_text(group: str) -> None:
    listed = help_text([f"help={group}"])
    for choice in choices(group):
        assert re.search(rf"^  {re.escape(choice)}\b", listed, re.M)
        text = help_text([f"help={group}/{choice}"])
        assert f"---- config/{group}/{choice}.yaml" in text
        assert group != "loss" or not re.search(r"L = .*\{\w+\}", text)
    assert set(GROUPS) < set(MEANT)


def test_the_keys_of_a_run_are_those_of_config_yaml() -> None:
    text = help_text(["help=config"])
    assert "\nlr: " in text and "override hydra" not in text and "subdir" not in text


@pytest.mark.parametrize(
    ("name", "near", "listed"),
    [
        ("loss/adap", "loss/adpa", "loss/tvkd"),
        ("modle", "model", "section"),
        ("section/cahce", "section/cache", "section/judge"),
        ("pipeline/../config", "", "pipeline/quickstart"),
    ],
)
def test_a_wrong_name_says_the_nearest_and_the_list(name: str, near: str, listed: str) -> None:
    with pytest.raises(ValueError, match=rf"help={re.escape(name)} is not known") as refused:
        help_text([f"help={name}"])
    assert listed in str(refused.value) and (f"Did you mean {near!r}" in str(refused.value) or not near)


@pytest.mark.parametrize("name", ["online-adpa", "opd"])
def test_a_method_that_nobody_scores_asks_for_prompts_alone(name: str) -> None:
    text = help_text([f"help=loss/{name}"])
    assert re.search(r"^  needs    prompts; ", text, re.M), text


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_method_whose_responses_are_scored_names_who_scores(name: str) -> None:
    needs = "prompts and a verifier or reward model, or responses with a reward"
    assert f"  needs    {needs}; " in help_text([f"help=loss/{name}"])


@pytest.mark.parametrize("name", choices("loss"))
def test_the_commands_of_a_loss_compose_and_make_what_the_last_one_reads(name: str, tmp_path, monkeypatch) -> None:
    for file in ("sft.jsonl", "pairs.jsonl", "prompts.jsonl", "rewards.jsonl"):
        write_pairs(tmp_path / file, 4)
    monkeypatch.chdir(tmp_path)
    text = help_text([f"help=loss/{name}"])
    commands = [shlex.split(line)[2:] for line in re.findall(r"^  (python launch.py .*)$", text, re.M)]
    assert text.startswith("  python launch.py ") and f"loss={name}" in commands[-1]
    made = {word.partition("=")[2] for command in commands[:-1] for word in command if word.startswith("exp_name=")}
    read = set(re.findall(r"outputs/(\w+)/(?:CACHE|generations)", " ".join(commands[-1])))
    assert made == read, "each command before the last makes what the last one reads"
    for command in commands:
        assert settings_of(composed(*command)).datasets
    for page in re.findall(r"^  page     (.*)$", text, re.M):
        assert (ROOT / page).is_file()


def test_dckd_is_two_lines_with_its_page_and_a_required_key() -> None:
    text = help_text(["help=loss/dckd"])
    assert text.count("python launch.py ") == 2 and "task=cache" in text.splitlines()[0]
    assert re.search(r"^teacher_cache: \(required\) +# ", text, re.M) and "???" not in text
    assert "  page     docs/losses_dckd.md" in text
    assert "  page     docs/losses_online.md" in help_text(["help=loss/grpo"])
    assert help_text(["help=loss/sft"]).count("python launch.py ") == 1
