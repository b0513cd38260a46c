"""What is compared around generation: the tokens that end a turn, and the generator's log-probabilities with the
trainer's.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import models
from dataloader import Tokens, collate
from functional import token_logps
from settings.schema import ModelConfig
from templates import turn_end


class Gap(NamedTuple):
    """|log p of the generator - log p of the trainer| over the tokens of some rows, in nats per token."""

    rows: int
    tokens: int
    mean: float
    max: float


@torch.inference_mode()
def logp_gap(
    model: Any, rows: Sequence[Tokens], logps: Sequence[list[float]], pad_id: int, vocab_size: int, batch_size: int
) -> Gap:
    """Score the responses as training does (models.response_logits) and compare with the generator's `logps` of
    each.
    """
    gaps: list[torch.Tensor] = []
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id)
        out = models.response_logits(model, batch.to(model.device), vocab_size)
        theirs = torch.tensor([x for row in logps[start : start + batch_size] for x in row])
        gaps.append((token_logps(out.logits, out.targets).cpu() - theirs).abs().double())
    every = torch.cat(gaps)
    return Gap(len(rows), len(every), float(every.mean()), float(every.max()))


def check_gap(
    gap: Gap,
    limit: float,
    key: str = "generation.max_logp_gap",
    advice: str = "The responses are kept; raise the limit to accept them",
) -> str:
    """Word the gap; ValueError if its mean is above the `limit` of a key, nats per token, or no number."""
    words = (
        f"generator and trainer differ by {gap.mean:.2e} nats per token (at most {gap.max:.2e}) "
        f"over {gap.tokens} tokens"
    )
    if not math.isfinite(gap.mean) or gap.mean > limit:
        raise ValueError(f"{words}, more than {key}={limit:g}: is it the same model and precision? {advice}")
    return words


def stop_notes(config: ModelConfig, tokenizer: Any, stop: list[int], teacher: str | None) -> list[str]:
    """Compare what ends a turn for the template, the tokenizer, the student's model and, where one is known, the
    teacher.

    Returns notes to print; ValueError if the teacher ends no turn with any of the student's tokens.
    """
    notes, own = [], models.stop_ids(tokenizer)
    written = turn_end(tokenizer)
    if own != stop:
        words = [tokenizer.convert_ids_to_tokens(ids) for ids in (own, stop)]
        notes.append(
            f"the tokenizer ends a turn with {words[0]}, the model also with others; any of {words[1]} ends a response"
        )
    if not written.in_template:
        end = tokenizer.convert_ids_to_tokens(written.id) if written.id is not None else "nothing"
        notes.append(f"the chat template writes no token after a turn; responses end with {end!r}")
    if teacher is None:
        return notes
    theirs_config = config.of_folder(teacher)
    their_tokenizer = models.load_tokenizer(theirs_config)
    theirs = models.stop_ids_of(theirs_config, their_tokenizer)
    ours = {(i, tokenizer.convert_ids_to_tokens(i)) for i in stop}
    other = {(i, their_tokenizer.convert_ids_to_tokens(i)) for i in theirs}
    if not ours & other:
        raise ValueError(
            f"student and teacher ({teacher}) end a turn with different tokens, {sorted(ours)} and {sorted(other)}: "
            "the "
            "teacher would score ends that it never writes. Set model.tokenizer_name_or_path so that both share a "
            "template"
        )
    if ours != other:
        notes.append(
            f"student and teacher end turns differently: {sorted(ours)} and {sorted(other)}; the student's end a "
            "response"
        )
    return notes
