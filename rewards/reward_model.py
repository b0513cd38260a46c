"""Scores by a reward model: responses as text, tokenized with the reward model's own tokenizer and template."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from tqdm import tqdm

import models
from conversations import Message
from dataloader import Tokens, collate
from generation.interface import length_batches
from settings.schema import Settings
from tokens.encoding import encode_turn, fit_prompt, shielded


def check_reward_model(folder: str, key: str) -> None:
    """Refuse a folder or a model of the hub that is no reward model with one label: its head would be a random one."""
    found = _architecture(folder)
    if found is None:
        return  # the loader says what is wrong with it
    kinds, labels = found.get("architectures") or [], found.get("id2label", {"0": "", "1": ""})
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds) or len(labels) != 1:
        raise ValueError(
            f"{key}={folder} is no reward model: it holds {', '.join(kinds) or 'no architecture'} with {len(labels)} "
            "label(s), and a "
            "...ForSequenceClassification with one label is needed, as loss=bradley-terry writes it"
        )


def _architecture(folder: str) -> dict[str, Any] | None:
    """Return the config.json of a folder, or of a model that the hub has by this name; None where there is none."""
    source = models.local_source(folder)
    path = Path(source) / "config.json"
    if not path.is_file():
        try:
            path = Path(hf_hub_download(source, "config.json")) if not Path(source).is_dir() else path
        except (OSError, ValueError):  # unreachable, unknown, or no name of the hub
            return None
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class RewardModel:
    """A reward model on this process's device."""

    def __init__(self, settings: Settings, folder: str, key: str) -> None:
        check_reward_model(folder, key)
        self.config = settings.model.of_folder(folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = models.load_tokenizer(self.config)
        dtype = models.resolve_dtype(self.config.policy_dtype, self.device)
        loaded: Any = models.load_model(self.config, dtype=dtype, trainable=False, head="reward")
        self.model = loaded.to(self.device)
        self.shortened: Counter[str] = Counter()

    def tokens(self, prompt: list[Message], response: str, ended: bool) -> Tokens:
        """Tokenize a response; one that was cut has no end-of-turn token. One that spells special tokens has none."""
        prompt, prompt_ids = fit_prompt(self.tokenizer, prompt, self.config.max_prompt_length, self.shortened)
        message = shielded(self.tokenizer, [{"role": "assistant", "content": response}])[0]
        turn = encode_turn(self.tokenizer, prompt, message, self.shortened)
        turn = turn if ended else turn[:-1]
        ids = (prompt_ids + turn)[: self.config.max_length]
        self.shortened["response cut"] += len(prompt_ids) + len(turn) > self.config.max_length
        return Tokens(ids, [False] * len(prompt_ids) + [True] * (len(ids) - len(prompt_ids)))

    @torch.inference_mode()
    def batch_scores(self, rows: Sequence[Tokens]) -> list[float]:
        """Return the score of each row of one padded batch."""
        batch = collate(list(rows), self.tokenizer.pad_token_id).to(self.device)
        return models.last_token_scores(self.model, batch).tolist()

    def scores(self, rows: Sequence[tuple[list[Message], str, bool]], batch_size: int, label: str) -> list[float]:
        """Return the score of each (prompt, response, whether it ended), longest first on the device."""
        every = [self.tokens(*row) for row in rows]
        found: dict[int, float] = {}
        for batch in tqdm(length_batches([row.ids for row in every], batch_size), desc=label, mininterval=1):
            found.update(zip(batch, self.batch_scores([every[i] for i in batch]), strict=True))
        return [found[i] for i in range(len(rows))]
