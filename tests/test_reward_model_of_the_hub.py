"""A held-out reward model by its name on the hub: it scores as its folder does; one without a head is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import models
from engine import export
from settings.schema import ModelConfig, typed
from tests.support.helpers import composed, rows_of
from tests.support.stand_in_hub import StandInHub
from tests.test_publishing import TOKEN, session


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    found = StandInHub(TOKEN)
    yield found
    found.close()


@pytest.mark.slow
def test_a_reward_model_of_the_hub_scores_as_its_folder_does(hub: StandInHub, tmp_path: Path) -> None:
    config = typed(composed("model=tiny")["model"], ModelConfig)
    for name, head in (("reward", "reward"), ("chat", "lm")):
        model = models.load_model(config, trainable=False, head=head)
        export.save_model(model, models.load_tokenizer(config), tmp_path / name)
        files = {
            str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()
        }
        hub.add("model", f"owner/{name}", private=False, **files)
    rows = [{"prompt": f"say {i}", "response": "ha " * i} for i in range(1, 4)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["task=label", "model=tiny", f"label.responses={tmp_path}/responses.jsonl", f"cache_dir={tmp_path}"]
    sources = {"here": f"{tmp_path}/reward", "hub": "owner/reward", "chat": "owner/chat"}
    lines = [[*common, f"label.reward_model={source}", f"exp_name=by_{name}"] for name, source in sources.items()]
    here, there, refused = session(hub, tmp_path, lines)
    assert not here["error"] and not there["error"], there
    rewards = [
        [row["reward"] for row in rows_of(tmp_path / f"by_{name}/LABEL/labeled.jsonl")] for name in ("here", "hub")
    ]
    assert rewards[0] == rewards[1] and len(set(rewards[0])) == 3
    assert "label.reward_model=owner/chat is no reward model: it holds LlamaForCausalLM" in refused["error"]
