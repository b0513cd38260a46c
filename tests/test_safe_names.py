"""Names stay in their folder, secrets are written nowhere, weights are safetensors, a card shows what it is given."""

from pathlib import Path

import pytest

import launch
import models
from pipeline.sweeps import as_sweep
from report.model_card import card
from settings.schema import settings_from
from settings.secrets import check_no_secret
from tests.support.helpers import composed, write_pairs
from tests.test_model_card import FACTS
from trainers.basic import BasicTrainer

OUTSIDE = ["../../x", "a/../../x", "/tmp/x", "..", "a//b", "~/x", "a\nb", "a/./b", "a\\..\\b", "x" * 300, "\x1b[31mred"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    raw = composed()
    for key in ("exp_name", "run_count"):
        with pytest.raises(ValueError, match=f"{key}=.* must be a name"):
            settings_from({**raw, key: name})
    with pytest.raises(ValueError, match="name of a model"):
        settings_from({**raw, "evaluation": {**raw["evaluation"], "models": {name: "x"}}})
    with pytest.raises(ValueError, match="name of a data set"):
        settings_from({**raw, "datasets": {name: {"train": "x.jsonl"}}})


def test_names_with_folders_in_them_and_other_alphabets_are_names() -> None:
    for name in ("stages/cache-12ab", "lr=1e-3,seed=1", "пробa/二", "a b"):
        assert settings_from({**composed(), "exp_name": name}).run.run_dir == Path("outputs") / name


def test_a_key_that_is_fixed_and_swept_is_refused() -> None:
    for line in (["-m", "lr=1", "lr=1,2"], ["-m", "++lr=1,2", "exp_name=x", "lr=1"], ["-m", "lr=1,2", "lr=3,4"]):
        with pytest.raises(ValueError, match="lr stands twice on a sweep's command line"):
            as_sweep(line)
    assert "lr=1,2" in as_sweep(["-m", "exp_name=x", "lr=1,2", "seed=1,2"])


TOKEN = "hf_" + "aB3dE6gH9" * 4


@pytest.mark.parametrize(
    "text",
    [TOKEN, f"x:{TOKEN}", "http://h/v1?api_key=12345678", "http://me:secret@h/v1", "sk-" + "a1" * 12, "from-the-env"],
)
def test_a_secret_in_the_configuration_or_typed_is_refused_and_not_shown(text: str) -> None:
    environment = {"MY_API_KEY": "from-the-env", "PATH": "/bin"}
    for raw, words in (({"datasets": {"a": {"train": text}}}, []), ({}, [f"datasets.a.train={text}"])):
        with pytest.raises(ValueError, match="datasets.a.train holds what looks like a key") as error:
            check_no_secret(raw, words, environment)
        assert text not in str(error.value)
    check_no_secret(
        {"a": "hf_models/sk-1", "b": [1, None], "c": "owner/name:train"}, ["judge.base_url=http://h:80/v1"], {}
    )


def test_a_run_with_keys_in_its_environment_writes_none_of_them(tmp_path: Path, monkeypatch, capfd) -> None:
    secrets = {name: f"secret-{name}-0123456789" for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    data = write_pairs(tmp_path / "pairs.jsonl", 4)
    line = [f"cache_dir={tmp_path}/out", "exp_name=run", "model=tiny", "datasets=[local]", "loss=sft", "n_steps=1"]
    line += [f"datasets.local.train={data}", "model.batch_size=4", "wandb.enabled=true", "wandb.mode=offline"]
    launch.run_task(composed(*line))
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"config.yaml", "command.txt", "README.md", "digest.txt"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    said = "".join(capfd.readouterr())
    for value in secrets.values():
        assert value not in said
        assert not [path for path in written if value.encode() in path.read_bytes()]


def test_a_folder_with_pickled_weights_is_refused_unless_asked_for(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    settings = settings_from(composed("model=tiny", f"++model.load_from={tmp_path}"))
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model.bin\).*model.pickled_weights=true"):
        models.load_model(settings.model, trainable=False)
    with pytest.raises(ValueError, match=r"pickles \(pytorch_model.bin\)"):
        models.load_model(settings.model, source=str(tmp_path), trainable=False)
    asked = settings_from(composed("model=tiny", f"++model.load_from={tmp_path}", "++model.pickled_weights=true"))
    assert models.model_source(asked.model) == str(tmp_path)


def test_a_card_shows_names_and_values_and_follows_none_of_them() -> None:
    nasty = "<script>alert(1)</script> [x](javascript:y) `a` ```"
    shown = card(FACTS._replace(name=nasty, command=f"run {nasty}\n```\n# free", objective="```\n# free"))
    head = next(line for line in shown.splitlines() if line.startswith("# "))
    assert "\\<script\\>" in head and "\\[x\\]\\(" in head
    assert "````bash\nrun" in shown and "````text\n```" in shown
    assert card(FACTS).count("# mine") == 1


def test_what_an_interruption_leaves_is_said_as_it_is(tmp_path: Path, monkeypatch) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    line = [f"cache_dir={tmp_path}", "exp_name=run", "model=tiny", "datasets=[local]", "loss=sft", "n_steps=4"]
    line += [f"datasets.local.train={data}", "model.batch_size=4", "eval_every=2"]
    step = BasicTrainer._step

    def interrupted(self: BasicTrainer, number: int) -> int:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(BasicTrainer, "_step", interrupted)
    for more, words in (
        (["save_every=0"], r"no checkpoint yet \(save_every=0 keeps none\)"),
        (["save_every=1"], "from checkpoint-2"),
    ):
        with pytest.raises(KeyboardInterrupt, match=words):
            launch.run_task(composed(*line, *more))
