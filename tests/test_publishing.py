"""hub.push and hub.pull over HTTP against a stand-in for the hub, by the hub's own library."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import launch
from report.parents import licenses_of, parents_of
from settings.artifacts import mark_done
from settings.schema import settings_from
from tests.support.helpers import ALONE, ROOT, composed, write_pairs
from tests.support.stand_in_hub import StandInHub

TOKEN = "hf_" + "x9" * 15

# Runs tasks one after the other, as launch.py does, in a process whose hub is $HF_ENDPOINT.
SESSION = """
import contextlib, io, json, sys
import launch
from tests.support.helpers import composed
for line in json.load(sys.stdin):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            launch.run_task(composed(*line))
        found = {"said": out.getvalue(), "error": ""}
    except ValueError as error:
        found = {"said": out.getvalue(), "error": str(error)}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    found = StandInHub(TOKEN)
    yield found
    found.close()


def session(hub: StandInHub, folder: Path, lines: list[list[str]], token: str = TOKEN) -> list[dict[str, str]]:
    """Run tasks where the hub is the stand-in; return what each said, and its error."""
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        input=json.dumps(lines),
        cwd=ROOT,
        env={**os.environ, **ALONE, **home, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HTTPS_PROXY": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(lines), done.stdout
    return found


@pytest.mark.slow
def test_model_cache_data_and_report_go_to_the_hub_with_cards_and_a_cache_comes_back(hub: StandInHub, tmp_path: Path):
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    out = tmp_path / "out"
    common = ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={out}"]
    evaluate = ["task=evaluate", *common[:2], f"datasets.local.test={data}", f"cache_dir={out}", "exp_name=judged"]
    evaluate += ["evaluation.temperatures=[1.0]", "evaluation.max_new_tokens=4"]
    evaluate += [f"++evaluation.models.mine={out}/sft/FINAL"]
    push = ["task=push", f"cache_dir={out}"]
    sft = [*common, "loss=sft", "n_steps=1", "exp_name=sft"]
    cache = [*common, "task=cache", "cache.top_k=3", "exp_name=cached", f"model.load_from={out}/sft/FINAL"]
    generate = [*common, "task=generate", "exp_name=said", "generation.max_new_tokens=4", "generation.n=2"]
    label = [
        "task=label",
        "model=tiny",
        f"cache_dir={out}",
        "exp_name=labeled",
        "label.make=scores",
        "hub.push=me/labels",
    ]
    label += [f"label.responses={out}/said/generations.jsonl", "label.verifier=tests.support.rewards:share_of_e"]
    hub.add("dataset", "me/open", private=False)
    found = session(
        hub,
        tmp_path,
        [
            sft,
            evaluate,
            [*push, f"hub.folder={out}/sft", "hub.push=me/model", f"hub.results={out}/judged", "dry_run=true"],
            [*push, f"hub.folder={out}/sft", "hub.push=me/model", f"hub.results={out}/judged"],
            [*cache, "hub.push=me/cache"],
            generate,
            label,
            [*push, f"hub.folder={out}/judged", "hub.push=me/report"],
            [*push, f"hub.folder={out}/cached/CACHE", "hub.push=me/open"],
            [*sft, "hub.push=me/again"],  # finished already: pushed all the same
            ["task=pull", f"cache_dir={out}", "exp_name=pulled", "hub.pull=me/cache"],
            [*sft[:-1], "exp_name=dckd", "loss=dckd", f"loss.teacher_cache={out}/pulled/CACHE"],
            [*sft[:-1], "exp_name=dckd_by_name", "loss=dckd", "loss.teacher_cache=hub:me/cache"],
        ],
    )
    assert [one["error"] for one in found if one["error"]] == [found[8]["error"]], found
    said = found[2]["said"]
    assert "would push the model of" in said and "as the private model me/model" in said and "## Parents" in said
    assert "is there and public: choose another name, or say hub.private=false" in found[8]["error"]
    model = hub.repos["model", "me/model"]
    assert model["private"] and model["commits"] == ["model by prefdistill"]
    assert model["files"]["model.safetensors"] == (out / "sft/FINAL/model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "run/config.yaml", "run/command.txt", "README.md"} <= model["files"].keys()
    card = model["files"]["README.md"].decode()
    assert ModelCard(card).data.library_name == "transformers"
    assert "## Scores" in card and "Judged as `mine`" in card and "loss=sft" in card and "## Digests" in card
    assert "datasets.local.train" in card and "license is not known" in card
    cached = hub.repos["dataset", "me/cache"]["files"]
    assert {"meta.json", "DONE", "README.md"} <= cached.keys()
    assert "`sft/FINAL`" in cached["README.md"].decode() and "task=cache" in cached["README.md"].decode()
    labels = hub.repos["dataset", "me/labels"]["files"]
    assert labels["labeled.jsonl"] == (out / "labeled/LABEL/labeled.jsonl").read_bytes()
    assert "data_files" in labels["README.md"].decode().split("---")[1]
    assert {"report.html", "results.json", "summary.md"} <= hub.repos["dataset", "me/report"]["files"].keys()
    assert not hub.repos["dataset", "me/open"]["files"] and ("model", "me/again") in hub.repos
    same = [(out / name / "FINAL/model.safetensors").read_bytes() for name in ("dckd", "dckd_by_name")]
    assert same[0] == same[1]
    assert TOKEN not in json.dumps(found) and all(
        TOKEN.encode() not in f for r in hub.repos.values() for f in r["files"].values()
    )
    assert all(token == TOKEN for method, path, token in hub.requests if method == "POST" and "/api/" in path)


@pytest.mark.slow
def test_a_push_that_cannot_work_says_why(hub: StandInHub, tmp_path: Path) -> None:
    run = finished(tmp_path / "out" / "run", {"task": "train", "model": {"name_or_path": "owner/base"}})
    line = ["task=push", f"cache_dir={tmp_path}/out", f"hub.folder={run}", "hub.push=me/model"]
    (found,) = session(hub, tmp_path, [line], token="hf_" + "y8" * 15)
    assert "hub.push=me/model: " in found["error"] and "the token comes from HF_TOKEN" in found["error"]


def finished(run: Path, config: dict[str, Any]) -> Path:
    """Write the folder of a finished run with a model."""
    (run / "FINAL").mkdir(parents=True)
    (run / "FINAL" / "model.safetensors").write_bytes(b"weights")
    (run / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    (run / "digest.txt").write_text("d" * 64, encoding="utf-8")
    mark_done(run)
    return run


def test_licenses_are_those_of_all_that_a_run_was_made_from(tmp_path: Path) -> None:
    known = {("owner/base", "model"): "apache-2.0", ("owner/pairs", "dataset"): "mit", ("owner/other", "model"): None}
    asked = lambda name, kind: known.get((name, kind))  # noqa: E731
    pairs = {"pairs": {"train": "owner/pairs#config:train", "test": None}}
    teacher = finished(
        tmp_path / "teacher", {"task": "train", "model": {"name_or_path": "owner/base"}, "datasets": pairs}
    )
    student = finished(
        tmp_path / "student",
        {"task": "train", "model": {"load_from": str(teacher / "FINAL"), "name_or_path": "owner/other"}},
    )
    (parent,) = parents_of(student, asked)
    assert parent.name == "teacher/FINAL" and parent.digest == "d" * 16
    assert parent.licenses == ("apache-2.0", "mit")
    (student / "FINAL/README.md").write_text("---\nlicense: llama3\n---\nx", encoding="utf-8")
    assert licenses_of(student / "FINAL", asked, 3) == ("llama3",)
    other = finished(tmp_path / "other", {"task": "train", "model": {"name_or_path": "owner/other"}, "datasets": pairs})
    assert [parent.licenses for parent in parents_of(other, asked)] == [(), ("mit",)]
    assert licenses_of(other / "FINAL", asked, 3) == ()  # one that is not known leaves all of it so


@pytest.mark.parametrize("name", ["model", "a/b/c", "../x", "a/ b", "-a/b", "https://h/a/b"])
def test_a_name_of_the_hub_is_owner_and_name(name: str) -> None:
    raw = composed()
    for key in ("push", "pull"):
        with pytest.raises(ValueError, match=f"hub.{key}=.* must be OWNER/NAME"):
            settings_from({**raw, "hub": {**raw["hub"], key: name}})


def test_what_is_pushed_is_said_without_a_hub_and_never_holds_a_secret(tmp_path: Path, capsys, monkeypatch) -> None:
    run = finished(tmp_path / "run", {"task": "train", "datasets": {}})
    line = ["task=push", f"hub.folder={run}", "hub.push=me/model", "dry_run=true"]
    launch.run_task(composed(*line))
    said = capsys.readouterr().out
    assert "would push the model" in said and "as the private model me/model" in said and "model.safetensors" in said
    launch.run_task(composed(*line, "hub.private=false"))
    assert "as the PUBLIC model" in capsys.readouterr().out
    (run / "FINAL" / "notes.txt").write_text(f"token {TOKEN}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes.txt holds what looks like a key.*nothing was pushed") as error:
        launch.run_task(composed(*line))
    assert TOKEN not in str(error.value)
    (run / "FINAL" / "notes.txt").unlink()
    rows = run / "FINAL" / "rows.jsonl"
    rows.write_text('{"text": "http://h/?token=abcdefgh"}\n', encoding="utf-8")  # of the web, no secret of ours
    launch.run_task(composed(*line))
    monkeypatch.setenv("OPENAI_API_KEY", "one-of-our-own-keys")
    rows.write_text('{"text": "one-of-our-own-keys"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl holds what looks like a key"):
        launch.run_task(composed(*line))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["dry_run=true"], "dry_run=true prints the plan of a pipeline"),
        (["task=push", "hub.push=a/b"], "hub.folder=FOLDER, the folder of a finished run"),
        (["task=push", "hub.push=a/b", "hub.folder={}", "dry_run=true"], "is no finished run"),
        (["task=inspect", "datasets=[local]", "datasets.local.train={}/x.jsonl", "hub.push=a/b"], "makes nothing that"),
    ],
)
def test_a_push_of_nothing_is_refused(line: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        launch.run_task(composed(*[word.replace("{}", str(tmp_path)) for word in line]))
