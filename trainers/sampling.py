"""The policy as it stands, asked for responses while it trains."""

import hashlib
from collections.abc import Sequence
from typing import Any

import models
from engine import samples
from generation.on_policy import sample_rows
from tokens.encoding import encode_prompt
from trainers.batches import Item


def stop_ids(trainer: Any) -> list[int]:
    """Return the ids that end a turn of the policy: its tokenizer's and its own."""
    return models.stop_ids(trainer.tokenizer, trainer.placement.unwrapped(trainer.policy))


def answers(
    trainer: Any, prompts: list[list[int]], seeds: list[int], max_new_tokens: int
) -> list[tuple[list[int], str]]:
    """Answer each prompt with the policy as it stands; all ranks call it."""
    placement, model = trainer.placement, trainer.placement.unwrapped(trainer.policy)
    with models.scoring(trainer.policy), placement.generating(trainer.policy):
        return sample_rows(
            model, trainer.tokenizer, prompts, seeds, max_new_tokens, stop_ids(trainer), placement.in_step
        )


def first_prompts(items: Sequence[Item], number: int) -> list[list[int]]:
    """Return the first different prompts: what stands before the first supervised token of an item's first sequence."""
    found: dict[tuple[int, ...], None] = {}
    for item in items[: 4 * number]:
        tokens = item.sequences[0]
        length = next((at for at, on in enumerate(tokens.response) if on), len(tokens.ids))
        if length:
            found[tuple(int(one) for one in tokens.ids[:length])] = None
    return [list(ids) for ids in list(found)[:number]]


class Sampler:
    """Fixed prompts with a seed each: a step's samples depend on the policy alone."""

    def __init__(self, trainer: Any, step: int) -> None:
        run, tokenizer = trainer.run_config, trainer.tokenizer
        self.trainer, self.run = trainer, run
        if run.sample_prompts:
            self.prompts = [encode_prompt(tokenizer, [{"role": "user", "content": t}]) for t in run.sample_prompts]
            self.texts = list(run.sample_prompts)
        else:
            self.prompts = first_prompts(trainer.test_items or trainer.train_items, samples.PROMPTS)
            self.texts = [tokenizer.decode(ids) for ids in self.prompts]
        if not self.prompts:
            raise ValueError("sample_every: no row of the data holds a prompt; give sample_prompts=[TEXT]")
        seeded = (hashlib.sha256(f"{run.seed} sample {n}".encode()).digest() for n in range(len(self.prompts)))
        self.seeds = [int.from_bytes(digest[:8], "big") >> 2 for digest in seeded]
        if trainer.processes.is_main:
            samples.keep_until(run.run_dir, step)

    def __call__(self, step: int) -> None:
        """Write the responses of a step; all ranks call it."""
        found = answers(self.trainer, self.prompts, self.seeds, self.run.sample_tokens)
        if self.trainer.processes.is_main:
            ends = set(stop_ids(self.trainer))
            kept = ([one for one in ids if one not in ends] for ids, _ in found)
            samples.append(self.run.run_dir, step, self.texts, [self.trainer.tokenizer.decode(ids) for ids in kept])


def due(every: int, step: int, last: int) -> bool:
    """Tell whether samples are taken after a step; the last step is one of them."""
    return bool(every) and (step % every == 0 or step == last)
