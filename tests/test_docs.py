"""What README, docs/ and scripts/llama_adpa.sh show works: commands compose, examples run, links lead somewhere."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs import losses_table, map_table, quickstart_table, rewards_table
from evaluation.cells import best_of
from evaluation.intervals import seed_interval
from evaluation.markdown import span
from launch import settings_of
from pipeline.composing import merged
from scripts import quickstart_sweep
from tests.support.helpers import ROOT, composed, launch, rows_of, write_pairs

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
SCRIPT = (ROOT / "scripts/llama_adpa.sh").read_text(encoding="utf-8")
BLOCKS = [
    found
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for found in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
]


def commands() -> list[list[str]]:
    """Return the words of every launch.py command of the bash blocks of README and docs, of the README's indented lines
    and of the script, with the shell's variables filled in.
    """
    text = "\n".join([body for language, body in BLOCKS if language == "bash"] + [SCRIPT]).replace("\\\n", " ")
    text += "\n" + "\n".join(
        line.strip() for line in README.splitlines() if line.startswith("    ") and "launch.py " in line and "=" in line
    )
    variables: dict[str, str] = {}
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.M):
        variables[name] = re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), value)
    lines = [line for line in text.splitlines() if "launch.py" in line and not re.match(r"#|\w+=", line)]
    return [
        shlex.split(re.sub(r"\$(\w+)", lambda m: variables[m[1]], line.split("&&")[-1]), comments=True)
        for line in lines
    ]


def named(command: list[str]) -> str:
    """Return what a command is told by: its exp_name, else its first words."""
    return next((word for word in command if word.startswith("exp_name=")), " ".join(overrides(command)[:3]))


COMMANDS = commands()
SINGLE = [c for c in COMMANDS if not any(w.startswith("pipeline=") or w == "loss=my_exponential" for w in c)]
PIPELINES = [c for c in COMMANDS if any(w.startswith("pipeline=") for w in c)]


def overrides(command: list[str]) -> list[str]:
    """Return what follows launch.py."""
    return command[next(i for i, word in enumerate(command) if word.endswith("launch.py")) + 1 :]


def write_the_files_of_the_pages(folder: Path) -> None:
    """Write every file that README and pages suppose the reader has, or write in an earlier step."""
    for name in (
        "pairs.jsonl",
        "prompts.jsonl",
        "orders.jsonl",
        "question.jsonl",
        "questions.jsonl",
        "train.jsonl",
        "test.jsonl",
        "sft.jsonl",
    ):
        write_pairs(folder / name, 4)


def block(path: str) -> str:
    """Return the block whose first line is a comment with this path."""
    return next(body for _, body in BLOCKS if body.startswith(f"# {path}\n"))


@pytest.mark.parametrize("command", SINGLE, ids=named)
def test_every_command_of_readme_docs_and_script_composes(command: list[str], tmp_path: Path, monkeypatch) -> None:
    write_the_files_of_the_pages(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = overrides(command)
    named = [word.removeprefix("--config-name=") for word in words if word.startswith("--config-name=")]
    words = [word for word in words if not word.startswith("--config-name=")]
    settings = settings_of(composed(*words, config_name=named[0] if named else "config"))
    without_rows = ("label", "estimate", "summarize", "report", "push", "pull", "export")
    assert settings.datasets or settings.run.task in without_rows
    if "--config_file" in command:
        config = yaml.safe_load((ROOT / command[command.index("--config_file") + 1]).read_text(encoding="utf-8"))
        assert settings.model.batch_size % (config["num_processes"] * settings.model.gradient_accumulation_steps) == 0


def test_the_script_has_the_nine_stages_in_order() -> None:
    names = re.findall(r"\bexp_name=(\w+)", SCRIPT)
    stages = [
        "teacher_sft",
        "teacher_dpo",
        "student_sft",
        "cache_logprobs",
        "dckd",
        "generate",
        "cache_advantages",
        "adpa_plus",
        "evaluate",
    ]
    assert names == stages
    assert len(PIPELINES) >= 2


@pytest.mark.slow  # test_pipeline.py plans in the default run
@pytest.mark.parametrize("command", PIPELINES, ids=lambda c: next(w for w in c if w.startswith("pipeline=")))
def test_the_pipelines_of_the_readme_have_a_plan(command: list[str], tmp_path: Path) -> None:
    write_the_files_of_the_pages(tmp_path)
    words = [word for word in overrides(command) if word != "dry_run=true"]
    done = launch(*words, "dry_run=true", f"cache_dir={tmp_path}/out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ stages, 0 done", done.stdout)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_loss_dataset_and_model_that_the_readme_adds_work(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs*", "tests", "__pycache__", "*.log"))
    for path in (
        "trainers/my_exponential.py",
        "config/loss/my_exponential.yaml",
        "config/datasets/mine.yaml",
        "config/model/mine.yaml",
    ):
        (copy / path).write_text(block(path), encoding="utf-8")
    (copy / "config/model/mine.yaml").write_text(
        block("config/model/mine.yaml").replace("some/hub-name", "null"), encoding="utf-8"
    )
    (copy / "data").mkdir()
    write_pairs(copy / "data/mine_train.jsonl", 16)
    asked = ["loss=my_exponential", "datasets=[mine]", f"cache_dir={tmp_path}", "n_steps=2", "log_every=1", "lr=1e-3"]
    # The README's model is a hub name; the same file with the tiny architecture in its place needs no network.
    tiny = yaml.safe_load((copy / "config/model/tiny.yaml").read_text(encoding="utf-8"))
    build = "{" + ", ".join(f"{k}: {v}" for k, v in tiny["build"].items()).replace("True", "true") + "}"
    model = [
        "model=mine",
        f"++model.build={build}",
        f"++model.tokenizer_name_or_path={tiny['tokenizer_name_or_path']}",
        "model.batch_size=8",
    ]
    command = [sys.executable, "launch.py", *asked, *model, "exp_name=added"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "added/metrics.jsonl")
    assert rows[0]["loss/train"] == pytest.approx(1.0, abs=1e-5)  # the margin is 0 where policy and reference are one
    assert "rewards_train/margins" in rows[0] and (tmp_path / "added/FINAL/model.safetensors").is_file()


def test_the_readme_is_short_and_its_drawing_is_of_the_real_stages() -> None:
    assert len(README.splitlines()) <= 120
    assert max(map(len, README.splitlines())) <= 120
    drawn = re.findall(r"\w+", block_of("mermaid").split("\n", 1)[1])
    stages: dict[str, dict] = {}
    for name in ("dckd", "adpa_plus"):
        stages |= yaml.safe_load((ROOT / f"config/pipeline/{name}.yaml").read_text(encoding="utf-8"))["stages"]
    assert set(drawn) == set(stages) - {"evaluate"}


def test_the_rooms_of_the_readme_are_those_of_the_repository() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "docs", "assets", "benchmarks", "scripts"}
    assert {room for room in rooms if not re.search(rf"^    {room}/ ", README, re.M)} == set()


def block_of(language: str) -> str:
    """Return the first block in a language."""
    return next(body for kind, body in BLOCKS if kind == language)


def test_the_tables_of_the_quickstart_are_those_of_the_file_that_a_run_wrote() -> None:
    """README, docs/results.md and the log show docs/measured/quickstart.json; no interval of a share leaves [0, 1]."""
    measured = json.loads(quickstart_table.MEASURED.read_text(encoding="utf-8"))
    page, log = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("results", "log"))
    assert quickstart_table.between(README) == quickstart_table.short_table(measured)
    assert quickstart_table.between(page) == quickstart_table.full_table(measured)
    assert quickstart_table.full_table(measured) in log
    stages = yaml.safe_load((ROOT / "config/pipeline/quickstart.yaml").read_text(encoding="utf-8"))["stages"]
    assert list(measured["models"]) == list(stages["evaluate"]["set"]["evaluation"]["models"])
    for parts in measured["models"].values():
        assert list(parts) == ["1", "0.3", "greedy", "matched"]
        for part in parts.values():
            scores = list(part["per_seed"].values())
            assert part["score"] == pytest.approx(sum(scores) / len(scores)) and len(scores) == len(measured["seeds"])
            across = seed_interval(scores, (0.0, 1.0))
            assert part["ci95_over_seeds"] == (pytest.approx(list(across)) if across else None)
            for low, high in (part["ci95"], *([across] if across else [])):
                assert 0 <= low <= part["score"] <= high <= 1


def test_the_table_of_more_seeds_is_that_of_a_file_whose_worlds_no_other_table_used() -> None:
    more = json.loads(quickstart_table.REGULARIZED.read_text(encoding="utf-8"))
    page = (ROOT / quickstart_table.RESULTS).read_text(encoding="utf-8")
    assert quickstart_table.between(page, "regularized") == quickstart_table.regularized_table(more)
    wanted = yaml.safe_load((ROOT / "config/pipeline/regularized.yaml").read_text(encoding="utf-8"))["seeds"]
    assert more["seeds"] == wanted and not {*wanted} & {*seeds_of("quickstart"), *seeds_of("quickstart_sweep")}
    for pairs in more["comparisons"].values():
        found = next(pair for pair in pairs if pair["second"] == "dckd_long" and pair["first"] != "teacher_dpo")
        assert found["ci95_over_seeds"][0] <= found["difference"] <= found["ci95_over_seeds"][1]
    for way in ("1", "matched"):
        found = more["comparisons"][way][0]
        said = f"{found['difference']:+.3f} {span(found['ci95_over_seeds'], '+.3f')}"
        assert (found["first"], found["second"]) == ("adpa_plus_regularized", "dckd_long")
        assert said in " ".join(page.split()) and (way != "1" or said in " ".join(README.split()))


def test_the_quickstart_has_the_settings_that_the_sweep_chose_with_one_budget() -> None:
    results = json.loads((ROOT / "docs/measured/quickstart_sweep.json").read_text(encoding="utf-8"))
    stages = yaml.safe_load((ROOT / "config/pipeline/quickstart.yaml").read_text(encoding="utf-8"))["stages"]
    assert (ROOT / "docs/quickstart_sweep.md").read_text(encoding="utf-8") == quickstart_sweep.table(results)
    trained = {name for name, stage in stages.items() if "loss" in stage and stage.get("start") and name != "dckd"}
    assert set(results["methods"]) == set(quickstart_sweep.TRIES) == trained - {"teacher_dpo"}
    steps = {name: stages[name]["set"]["n_steps"] for name in trained | {"dckd"}}
    for name, rows in results["methods"].items():
        assert [row["setting"] for row in rows if row["eligible"]] == quickstart_sweep.TRIES[name] and len(rows) >= 3
        assert len(quickstart_sweep.TRIES[name]) == 3
        best = max((row for row in rows if row["eligible"]), key=lambda row: row["success"]["mean"])
        assert best["chosen"] and sum(row["chosen"] for row in rows) == 1
        assert merged(stages[name]["set"], best["setting"]) == stages[name]["set"], f"{name}: the sweep chose otherwise"
        before = steps["dckd"] if stages[name]["start"] == "dckd" else 0
        assert before + steps[name] == steps["dckd_long"]
    used = json.loads(quickstart_table.MEASURED.read_text(encoding="utf-8"))["seeds"]
    assert results["world_seed"] not in used


def test_the_tables_of_rewards_are_those_of_the_file_that_runs_wrote() -> None:
    measured = json.loads(rewards_table.MEASURED.read_text(encoding="utf-8"))
    page = rewards_table.PAGE.read_text(encoding="utf-8")
    assert rewards_table.written(page, measured) == page, "run: python -m docs.rewards_table"
    models = measured["rewards"]["models"]
    assert models["grpo"]["scored_responses"] == 400 * 32 * 8
    assert models["ppo"]["scored_responses"] == 25 * 4000  # 400 steps of 256 are 25 passes over all prompts
    assert models["reverse_kl"]["scored_responses"] is None and len(measured["rewards"]["seeds"]) >= 3


def test_the_map_s_tables_and_every_difference_it_speaks_of_are_those_of_the_file_that_runs_wrote() -> None:
    maps = json.loads(map_table.MEASURED.read_text(encoding="utf-8"))
    page = map_table.PAGE.read_text(encoding="utf-8")
    assert map_table.written(page, maps) == page, "run: python -m docs.map_table"
    said = map_table.figures((ROOT / "docs/map.md").read_text(encoding="utf-8"))
    assert said and said <= map_table.known_figures(maps)
    used = {seed for name in ("quickstart", "quickstart_sweep") for seed in seeds_of(name)}
    for one in maps:
        assert len(one["seeds"]) >= 3 and not used & set(one["seeds"])
        for cell in one["cells"]:
            for found in cell["decoded"].values():
                scores = {name: found["models"][name]["per_seed"] for name in one["methods"]}
                assert found["best"] == best_of(scores)


def seeds_of(name: str) -> list[int]:
    """Return the world seeds of a measured file."""
    measured = json.loads((ROOT / f"docs/measured/{name}.json").read_text(encoding="utf-8"))
    return measured["seeds"] if "seeds" in measured else [measured["world_seed"]]


def prose(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs write them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_no_link_is_dead(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), f"{page.name} points to {target}"
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{page.name}: no {target}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_is_short_and_in_the_site_s_menu(page: Path) -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert [next(iter(group)) for group in menu[1:]] == ["First steps", "Methods", "Running big", "Formats", "Log"]
    assert page.name in str(menu)
    if page.name != "log.md":
        lines = page.read_text(encoding="utf-8").splitlines()
        assert len(lines) < 150
        prose_lines = [
            line for line in prose("\n".join(lines)).splitlines() if not line.startswith(("|", "#", "    ", "L = "))
        ]
        assert all(len(line) <= 120 for line in prose_lines), max(prose_lines, key=len)


@pytest.mark.skipif(not shutil.which("mkdocs"), reason="mkdocs is not installed (requirements/docs.lock)")
def test_the_site_builds(tmp_path: Path) -> None:
    command = ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert 'src="http' not in (tmp_path / "site/index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_of_losses_is_the_code() -> None:
    page = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
    written = page.split(losses_table.BEGIN)[1].split(losses_table.END)[0].strip()
    assert written == losses_table.table(), "run: python -m docs.losses_table"
