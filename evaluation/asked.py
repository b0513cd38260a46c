"""A model that is evaluated, what it is judged on, and how it answers: by its own weights or by a server."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import models
from dataloader import Example, collate, load_examples
from evaluation.matched import split_off
from evaluation.served import from_server, served_names, server_facts
from evaluation.turns import Answered, in_turns
from functional import row_sums, token_logps
from generation.hf import sample_watched
from settings.schema import GenerationConfig, Settings


class HeldOut(NamedTuple):
    """What the models are judged on: prompts to answer, pairs to rank, prompts that choose matched temperatures."""

    prompts: list[Example]
    pairs: list[Example]
    validation: list[Example]


def held_out(settings: Settings, tokenizer: Any) -> HeldOut:
    """Load the test split of every data set; n_eval_examples limits each of them.

    Rows with a prompt alone are the prompts to answer; where there are none, the prompts of all rows are.
    """
    run = settings.run
    rows: list[Example] = []
    for name, config in settings.datasets.items():
        rows += load_examples(
            {name: config},
            "test",
            tokenizer,
            settings.model,
            run.n_eval_examples,
            run.seed,
            run.tokens_dir,
            run.num_proc,
        )
    if not rows:
        raise ValueError("no held-out rows: set datasets.NAME.test to a file, a folder or hub_name:split")
    pairs = [row for row in rows if row.chosen is not None and row.rejected is not None]
    if settings.evaluation.reward_accuracy and not pairs:
        raise ValueError("evaluation.reward_accuracy=true needs held-out pairs: no test row has chosen and rejected")
    prompts = [row for row in rows if row.chosen is None and row.response is None] or rows
    if settings.evaluation.match_entropy is None:
        return HeldOut(prompts, pairs, [])
    scored, validation = split_off(len(prompts), settings.evaluation.match_prompts, run.seed)
    return HeldOut([prompts[i] for i in scored], pairs, [prompts[i] for i in validation])


class Asked:
    """A model that is evaluated: its data, and its weights once a batch needs them."""

    def __init__(self, settings: Settings, name: str, device: torch.device) -> None:
        self.settings, self.name, self.device = settings, name, device
        self.is_served = name in served_names(settings)
        self.own = settings.model.of_folder(settings.evaluation.models[name])
        self.dtype = models.resolve_dtype(self.own.policy_dtype, device)
        self.tokenizer = models.load_tokenizer(self.own)
        self.data = held_out(settings, self.tokenizer)
        self.loaded: tuple[str, Any] = ("", None)  # one model at a time

    def model(self, source: str | None = None) -> Any:
        """Return the model, or another folder's in the same precision, on this process's device."""
        source = source or self.settings.evaluation.models[self.name]
        if self.loaded[0] != source:
            self.loaded = ("", None)
            model: Any = models.load_model(self.own.of_folder(source), dtype=self.dtype, trainable=False)
            self.loaded = (source, model.to(self.device))
        return self.loaded[1]

    @property
    def facts(self) -> list[Any]:
        """Return what decides the model's answers, beside prompts and sampling."""
        return [
            models.model_digest(self.settings.evaluation.models[self.name]),
            models.tokenizer_digest(self.tokenizer),
            models.stop_ids_of(self.own, self.tokenizer),
            str(self.dtype),
            self.device.type,
            *(server_facts(self.settings.generation) if self.is_served else []),
        ]


def answer(asked: Asked, rows: Sequence[Example], temperature: float, seed: int) -> list[list[Answered]]:
    """Answer each prompt of a batch, and the turns that follow it, from the whole distribution.

    With each answer comes the entropy that it was drawn with.
    """
    config, tokenizer = asked.settings.evaluation, asked.tokenizer
    generation: GenerationConfig = replace(
        asked.settings.generation,
        n=1,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        calculator=config.calculator,
    )
    if asked.is_served:
        sample = from_server(asked.settings, generation, tokenizer, models.stop_ids_of(asked.own, tokenizer), seed)
    else:
        model = asked.model()
        stop = models.stop_ids(tokenizer, model)

        def sample(ids: list[list[int]]) -> list[Answered]:
            return list(sample_watched(model, tokenizer, ids, generation, stop, len(tokenizer), seed))

    conversations = [row.conversation for row in rows]
    longest = asked.settings.model.max_prompt_length
    return in_turns(sample, tokenizer, [row.prompt for row in rows], conversations, longest)


@torch.no_grad()
def pair_logps(model: Any, tokenizer: Any, pairs: list[Example]) -> np.ndarray:
    """Return log p(chosen) and log p(rejected) of each pair of one batch, [P, 2] float64."""
    device = next(model.parameters()).device
    tokens = [row.chosen for row in pairs if row.chosen] + [row.rejected for row in pairs if row.rejected]
    sequences = collate(tokens, tokenizer.pad_token_id).to(device)
    logits, targets, rows = models.response_logits(model, sequences, len(tokenizer))
    sums = row_sums(token_logps(logits, targets), rows, len(tokens))
    return sums.double().cpu().numpy().reshape(2, len(pairs)).T
