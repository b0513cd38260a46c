"""The policy as it stands, asked for responses while it trains."""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import models
from engine import export, samples
from generation.checks import check_gap
from generation.on_policy import sample_rows
from settings.typed import require
from tokens.encoding import encode_prompt
from trainers.batches import Item
from trainers.value_head import VALUE_HEAD


def stop_ids(trainer: Any) -> list[int]:
    """Return the ids that end a turn of the policy: its tokenizer's and its own."""
    return models.stop_ids(trainer.tokenizer, trainer.placement.unwrapped(trainer.policy))


class Said(NamedTuple):
    """A response: ids with the end-of-turn token, "stop" or "length"; and where it comes from weights other than the
    policy's as it stands, their log-probability of each id.
    """

    ids: list[int]
    finish_reason: str
    logps: list[float] | None = None


def answers(trainer: Any, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, step: int = 0) -> list[Said]:
    """Answer each prompt with the policy as it stands; all ranks call it.

    step: the optimizer step that learns from the responses, which rollout.backend may then give; 0: nobody learns.
    """
    stop = stop_ids(trainer)
    if step and trainer.settings.rollout.backend == "vllm":
        return _by_engine(trainer, prompts, seeds, max_new_tokens, step, stop)
    placement, model = trainer.placement, trainer.placement.unwrapped(trainer.policy)
    with models.scoring(trainer.policy), placement.generating(trainer.policy):
        found = sample_rows(model, trainer.tokenizer, prompts, seeds, max_new_tokens, stop, placement.in_step)
    return [Said(*one) for one in found]


def _by_engine(
    trainer: Any, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, step: int, stop: list[int]
) -> list[Said]:
    """Answer with the engine, which is handed the weights first where that is due; they are checked then."""
    model, config = trainer.placement.unwrapped(trainer.policy), trainer.settings.rollout
    if trainer.responder is None:
        trainer.responder = _responder(trainer, model)
    responder = trainer.responder
    is_new = responder.is_due(step)
    if is_new:
        whole = export.merged(model)
        weights = ((name, one) for name, one in whole.state_dict().items() if not name.startswith(VALUE_HEAD))
        responder.hand_over(step, weights, whole.get_output_embeddings().weight)
    found = responder.answers(prompts, seeds, max_new_tokens, stop)
    if is_new and config.check_rows:
        with models.scoring(trainer.policy), trainer.placement.precision(trainer.policy):
            gap = responder.gap(model, prompts, found)
        check_gap(gap, config.max_logp_gap, "rollout.max_logp_gap", "raise the limit or use rollout.backend=hf")
    is_fresh = responder.fresh_step == step
    return [Said(one.ids, one.finish_reason, None if is_fresh else one.logps) for one in found]


def check_responder(trainer: Any) -> None:
    """Refuse rollout.backend=vllm where it cannot answer, or where nobody would ask it."""
    rollout, run, placement = trainer.settings.rollout, trainer.run_config, trainer.placement.name
    if rollout.backend == "hf":
        return
    require(
        trainer.answers_while_training(),
        f"rollout.backend={rollout.backend}: loss={trainer.settings.raw['loss']['name']} as it is set learns from the "
        "data's responses, and nobody would ask the engine. Leave rollout.backend out",
    )
    require(
        placement == "none",
        f"rollout.backend={rollout.backend} needs the whole policy in one process, and this is strategy={placement} on "
        f"{trainer.processes.world_size}: use rollout.backend=hf",
    )
    require(
        find_spec("vllm") is not None,
        f"rollout.backend={rollout.backend}: vLLM is not installed (./install.sh --vllm); use rollout.backend=hf",
    )
    require(
        run.save_every % rollout.refresh_every == 0,
        f"save_every={run.save_every}: the engine's weights are handed over every {rollout.refresh_every} steps "
        f"(rollout.refresh_every) and are not kept in checkpoints; a multiple of {rollout.refresh_every} works",
    )


def _responder(trainer: Any, model: Any) -> Any:
    """Start the engine."""
    from generation.on_policy_vllm import VllmResponder

    config = trainer.model_config
    dtype = models.resolve_dtype(config.policy_dtype, trainer.placement.device)
    longest = config.max_length + trainer.config.max_new_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    vocabulary, pad_id = trainer.vocab_size, trainer.tokenizer.pad_token_id
    return VllmResponder(trainer.settings.rollout, model, vocabulary, dtype, min(longest, limit), pad_id)


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
            kept = ([one for one in said.ids if one not in ends] for said in found)
            samples.append(self.run.run_dir, step, self.texts, [self.trainer.tokenizer.decode(ids) for ids in kept])


def due(every: int, step: int, last: int) -> bool:
    """Tell whether samples are taken after a step; the last step is one of them."""
    return bool(every) and (step % every == 0 or step == last)
