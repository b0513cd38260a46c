"""From rows to token ids to batches.

Letters: B rows, T tokens of a padded row, N response tokens of a whole batch (flat, row after row), K teacher entries.
A sequence is tokenized once, here; its ids then travel to the cache, the generator and the losses.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from conversations import (
    WAY_OUT,
    Conversation,
    Message,
    format_of,
    read_rows,
    to_conversation,
    tokenizer_of,
)
from settings.artifacts import read_jsonl
from settings.schema import DatasetConfig, ModelConfig
from templates import adds_bos, render, tokenizer_digest, turn_end


class Tokens(NamedTuple):
    """One tokenized conversation: ids, and True where a token is supervised (the end of turn included)."""

    ids: list[int]
    response: list[bool]


class Example(NamedTuple):
    """A tokenized row: the prompt's ids (generation prompt included), the sequences that continue it, and its place."""

    prompt: list[int]
    chosen: Tokens | None
    rejected: Tokens | None
    response: Tokens | None
    conversation: Conversation
    where: str = ""


class Sequences(NamedTuple):
    """Right-padded rows: ids [B, T] int64, attention [B, T] bool, response [B, T] bool (supervised tokens)."""

    ids: Tensor
    attention: Tensor
    response: Tensor


class TopK(NamedTuple):
    """A teacher's entries, flat over the response tokens of a batch: ids [N, K] int64, values [N, K] float32.

    `teacher_logps` [N, K] comes with advantages only: the aligned teacher's log-probabilities at the same ids.
    `spans` [N] and `span_logps` [M] come from a teacher with another tokenizer only: which of the batch's M spans of
    several tokens a token is in (-1: none), and the teacher's log-probability of each.
    """

    ids: Tensor
    values: Tensor
    teacher_logps: Tensor | None = None
    spans: Tensor | None = None
    span_logps: Tensor | None = None


class Generation(NamedTuple):
    """A row of generations.jsonl."""

    prompt_ids: list[int]
    response_ids: list[int]
    prompt: list[Message]
    response: str
    finish_reason: str
    meta: dict[str, Any]

    @property
    def tokens(self) -> Tokens:
        """Return the whole sequence with the generated part supervised."""
        return Tokens(
            self.prompt_ids + self.response_ids,
            [False] * len(self.prompt_ids) + [True] * len(self.response_ids),
        )


def read_generations(path: str | Path, tokenizer: Any | None) -> list[Generation]:
    """Read generations.jsonl; ValueError names the file and what is wrong with it.

    Ids of another tokenizer than the given one are refused. None takes them unseen: to show them, not to compute.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; task=generate writes generations.jsonl")
    own, found = tokenizer_digest(tokenizer) if tokenizer is not None else "", []
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        try:
            generation = Generation(
                row["prompt_ids"],
                row["response_ids"],
                row["prompt"],
                row["response"],
                row["finish_reason"],
                row.get("meta", {}),
            )
        except KeyError as error:
            raise ValueError(f"{where}: the row has no {error}; was it written by task=generate?") from error
        if tokenizer is not None:
            check_ids(row, where, tokenizer, own)
        found.append(generation)
    return found


# ---- whose ids they are


def check_ids(row: dict[str, Any], where: str, tokenizer: Any, own: str) -> None:
    """Refuse a row whose ids another tokenizer or template wrote: here they would be other text. `own`: our digest."""
    theirs = tokenizer_of(row, where)
    if theirs == own:
        return
    name = "chosen" if "chosen_ids" in row else "response"
    raise ValueError(
        f"{where}: its ids are of another tokenizer or chat template (digest {theirs}, this model's is {own}).\n"
        f"  the row's text begins      {str(row.get(name))[:60]!r}\n"
        f"  its ids begin, decoded here {tokenizer.decode(row[f'{name}_ids'][:20])[:60]!r}\n{WAY_OUT}"
    )


# ---- tokens of one conversation


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Tokenize a prompt with the generation prompt and exactly one begin-of-sequence token where there is one."""
    ids = _encode(tokenizer, render(tokenizer, messages, True))
    bos = tokenizer.bos_token_id
    if adds_bos(tokenizer) and ids[:1] != [bos]:
        ids = [bos, *ids]
    if bos is not None and ids[:2] == [bos, bos]:
        raise ValueError(
            f"the chat template puts two {tokenizer.bos_token!r} at the start of "
            f"{render(tokenizer, messages, True)[:80]!r}"
        )
    return ids


def encode_turn(tokenizer: Any, before: list[Message], turn: Message, counts: Counter[str]) -> list[int]:
    """Tokenize an assistant's turn after `before`, up to and including its end-of-turn token.

    The turn is cut out of the jointly tokenized text; where a token would straddle the seam between prompt and
    response it is tokenized apart, as a generator would see it, and counted under 'seam tokenized apart'.
    """
    head, full = render(tokenizer, before, True), render(tokenizer, [*before, turn], False)
    if not full.startswith(head):
        raise ValueError(
            "the chat template does not keep the prompt as a prefix of the conversation:\n"
            f"  prompt ends with      {head[-60:]!r}\n  conversation has there {full[: len(head)][-60:]!r}"
        )
    head_ids, full_ids = _encode(tokenizer, head), _encode(tokenizer, full)
    if full_ids[: len(head_ids)] == head_ids:
        ids = full_ids[len(head_ids) :]
    else:
        counts["seam tokenized apart"] += 1
        ids = _encode(tokenizer, full[len(head) :])
    end = turn_end(tokenizer)
    if end.id is None:
        return ids
    if end.in_template and end.id in ids:  # what the template writes after it (a newline) is nobody's token
        return ids[: len(ids) - ids[::-1].index(end.id)]
    return [*ids, end.id]


def fit_prompt(
    tokenizer: Any, messages: list[Message], limit: int, counts: Counter[str]
) -> tuple[list[Message], list[int]]:
    """Shorten a prompt to `limit` tokens: drop the oldest turns, then cut the left of the newest one."""
    ids = encode_prompt(tokenizer, messages)
    if len(ids) <= limit:
        return messages, ids
    counts["prompt shortened"] += 1
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    while len(ids) > limit and len(turns) > 2:
        turns = turns[2:]
        ids = encode_prompt(tokenizer, system + turns)
    if len(ids) > limit:
        keep_bos = ids[:1] if adds_bos(tokenizer) else []
        ids = keep_bos + ids[len(ids) - limit + len(keep_bos) :]
    return system + turns, ids


def encode_response(
    tokenizer: Any,
    prompt: list[Message],
    prompt_ids: list[int],
    response: list[Message],
    config: ModelConfig,
    supervise: str,
    counts: Counter[str],
) -> Tokens | None:
    """Return prompt and response as Tokens, cut on the right to max_length; None if nothing is supervised."""
    if supervise == "all":
        ids, mask = _all_turns(tokenizer, [*prompt, *response], counts)
        counts["response cut"] += any(mask[config.max_length :])
        ids, mask = ids[: config.max_length], mask[: config.max_length]
    else:
        if not response[0]["content"].strip():
            return None
        turn = encode_turn(tokenizer, prompt, response[0], counts)
        room = config.max_length - len(prompt_ids)
        counts["response cut"] += len(turn) > room
        ids = prompt_ids + turn[:room]
        mask = [False] * len(prompt_ids) + [True] * len(turn[:room])
    return Tokens(ids, mask) if any(mask) else None


def _all_turns(tokenizer: Any, messages: list[Message], counts: Counter[str]) -> tuple[list[int], list[bool]]:
    """Supervise every assistant turn, each tokenized after what stands before it."""
    ids: list[int] = []
    mask: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt_ids = encode_prompt(tokenizer, messages[:i])
        if prompt_ids[: len(ids)] != ids:
            shown = tokenizer.decode(prompt_ids[: len(ids)][-20:])
            raise ValueError(
                "supervise=all needs a template that leaves earlier turns unchanged; this one rewrites them near "
                f"{shown!r}. Use supervise=last"
            )
        turn = encode_turn(tokenizer, messages[:i], message, counts)
        mask += [False] * (len(prompt_ids) - len(ids)) + [True] * len(turn)
        ids = prompt_ids + turn
    return ids, mask


def encode_example(
    tokenizer: Any, conversation: Conversation, config: ModelConfig, supervise: str, counts: Counter[str]
) -> Example | None:
    """Tokenize one conversation; None (counted) if a response that it has keeps no supervised token."""
    prompt, prompt_ids = fit_prompt(tokenizer, conversation.prompt, config.max_prompt_length, counts)
    encoded: list[Tokens | None] = []
    for response in (conversation.chosen, conversation.rejected, conversation.response):
        tokens = None
        if response is not None:
            tokens = encode_response(tokenizer, prompt, prompt_ids, response, config, supervise, counts)
            if tokens is None:
                counts["dropped: no supervised token"] += 1
                return None
        encoded.append(tokens)
    return Example(prompt_ids, encoded[0], encoded[1], encoded[2], conversation)


def _from_ids(
    row: dict[str, Any], conversation: Conversation, config: ModelConfig, counts: Counter[str]
) -> Example | None:
    """Take the ids that a generator wrote instead of tokenizing its text again."""
    prompt, room = row["prompt_ids"], max(0, config.max_length - len(row["prompt_ids"]))
    found: dict[str, Tokens] = {}
    for name in ("chosen", "rejected") if "chosen_ids" in row else ("response",):
        ids = row[f"{name}_ids"][:room]
        counts["response cut"] += len(ids) < len(row[f"{name}_ids"])
        if not ids:
            counts["dropped: no supervised token"] += 1
            return None
        found[name] = Tokens(prompt + ids, [False] * len(prompt) + [True] * len(ids))
    return Example(prompt, found.get("chosen"), found.get("rejected"), found.get("response"), conversation)


# ---- data sets


class Source(NamedTuple):
    """A row before it is tokenized, and where it stands."""

    row: dict[str, Any]
    format: str
    supervise: str
    where: str


def load_examples(
    datasets: Mapping[str, DatasetConfig],
    split: str,
    tokenizer: Any,
    model: ModelConfig,
    limit: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """Read, tokenize and mix the `split` of every data set; what was dropped or cut is counted and printed.

    Weights mix the train split. `limit` keeps the first rows of a shuffle by `seed`. Raises ValueError for a missing
    source, a bad row, or if no row keeps a supervised token.
    """
    if not datasets:
        raise ValueError("no data: add datasets=[NAME], e.g. datasets=[local] datasets.local.train=my.jsonl")
    rows: list[Source] = []
    for name, config in datasets.items():
        source = getattr(config, split)
        if source is None:
            if split == "test":
                continue
            raise ValueError(f"datasets.{name}.{split} is not set: give a file, a folder or hub_name:split")
        own = read_rows(source, f"datasets.{name}.{split}")
        if not own:
            raise ValueError(f"datasets.{name}.{split}={source} has no rows")
        fmt = format_of(config.format, own[0], source)
        picked = drawn_rows(len(own), config, split, seed, name)
        rows += [Source(own[i], fmt, config.supervise, f"{source}, row {i + 1}") for i in picked]
    if limit is not None and limit < len(rows):
        kept = np.random.default_rng(seed).permutation(len(rows))[:limit]
        rows = [rows[i] for i in sorted(kept)]
    return _encode_rows(rows, split, tokenizer, model)


def drawn_rows(count: int, config: DatasetConfig, split: str, seed: int, name: str) -> list[int]:
    """Return which of a data set's `count` rows are used, by number: all of the test split, each once.

    Of the train split round(weight x count), whole repeats first and the rest drawn by `seed`; none is a ValueError.
    """
    if split != "train":  # a repeated row would narrow the intervals of an evaluation
        return list(range(count))
    repeats, rest = divmod(round(config.weight * count), count)
    if not repeats and not rest:
        raise ValueError(
            f"datasets.{name}.weight={config.weight:g} takes none of {count} rows: give at least {1 / count:.2g}, or "
            f"leave {name} out of datasets="
        )
    order = np.random.default_rng(seed).permutation(count) if config.weight % 1 else np.arange(count)
    return list(range(count)) * repeats + sorted(order[:rest].tolist())


def _encode_rows(rows: list[Source], split: str, tokenizer: Any, model: ModelConfig) -> list[Example]:
    counts: Counter[str] = Counter()
    examples: list[Example] = []
    dropped: list[tuple[str, Conversation]] = []
    own = tokenizer_digest(tokenizer) if any(source.format == "generation" for source in rows) else ""
    for row, fmt, supervise, where in rows:
        conversation = to_conversation(row, fmt, where)
        if fmt == "generation":
            check_ids(row, where, tokenizer, own)
            example = _from_ids(row, conversation, model, counts)
        else:
            try:
                example = encode_example(tokenizer, conversation, model, supervise, counts)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        if example is not None:
            examples.append(example._replace(where=where))
        else:
            dropped.append((where, conversation))
    report = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if n)
    report += f"; the first one dropped: {dropped[0][0]}" if dropped else ""
    if rows:
        print(f"{split}: {len(examples)} of {len(rows)} rows" + (f" ({report})" if report else ""), flush=True)
    if rows and not examples:
        where, conversation = dropped[0]
        response = conversation.chosen or conversation.response or [{"content": ""}]
        raise ValueError(
            f"no {split} row keeps a supervised token ({report}). Its prompt ends with "
            f"{conversation.prompt[-1]['content'][-60:]!r} and its response begins with "
            f"{response[0]['content'][:60]!r}. Are the responses empty, or is model.max_length={model.max_length} too "
            f"short for prompts of up to {model.max_prompt_length} tokens?"
        )
    return examples


def collate(rows: Sequence[Tokens], pad_id: int) -> Sequences:
    """Pad rows on the right: ids [B, T], attention [B, T], response [B, T]."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention = torch.zeros(len(rows), longest, dtype=torch.bool)
    response = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        attention[i, : len(row.ids)] = True
        response[i, : len(row.ids)] = torch.tensor(row.response)
    return Sequences(ids, attention, response)


def unsupervised(tokens: Tokens) -> Tokens:
    """Return the sequence with nothing supervised: it fills a batch and counts nowhere."""
    return Tokens(tokens.ids, [False] * len(tokens.ids))


# ---- order


def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch, a function of (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()


def local_micro_batches(batch: list[int], micro_size: int, micro_steps: int, rank: int, world: int) -> list[list[int]]:
    """Deal a global batch to `micro_steps` micro-batches of this rank.

    Every rank gets the same number of micro-batches, so that all take the same branches; some may be empty.
    """
    own = batch[rank::world]
    return [own[i * micro_size : (i + 1) * micro_size] for i in range(micro_steps)]
