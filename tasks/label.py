"""task=label: give every response a score (task=select chooses by right or wrong what to train on instead).

A verifier, a reward model or a judge scores. Reads generations.jsonl or plain rows {"prompt", "response"}. Writes

    LABEL/scores.jsonl    one score a row: a killed run goes on there
    LABEL/labeled.jsonl   every row with its `reward`; or with a `label`; or pairs of a prompt's best and worst response
    LABEL/summary.json    what was left out

With several processes each has the reward model on its device and scores its share of the batches; rank 0 writes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import models
from conversations import (
    Conversation,
    check_one_tokenizer,
    conversation_of,
    find_format,
    to_conversation,
)
from engine.processes import Apart
from generation.interface import length_batches
from rewards.judge import SCORE_PLACES, Judge, read_template
from rewards.reward_model import RewardModel
from rewards.verifiers import code_of, prompt_text, resolve_verifier, scored
from settings.artifacts import write_json, write_jsonl
from settings.parts import Parts, share_of, wait_for
from settings.schema import LabelConfig, Settings
from settings.terminal import clean
from tokens.generations import pair_row
from tokens.sources import read_rows

VERSION = 4


class Response(NamedTuple):
    """A row that can be scored: its number in the file, the row as it was read, and the conversation it holds."""

    number: int
    row: dict[str, Any]
    conversation: Conversation

    @property
    def text(self) -> str:
        """Return the response's text."""
        assert self.conversation.response is not None
        return self.conversation.response[0]["content"]

    @property
    def ended(self) -> bool:
        """Tell whether the response came to its end, as far as the row says."""
        return self.row.get("finish_reason", "stop") == "stop"

    def key(self, source: str) -> str:
        """Name what was scored and by whom: a score on disk belongs to that, whatever its place in the file."""
        facts = [source, self.conversation.prompt, self.text, self.ended, self.conversation.meta]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read_responses(config: LabelConfig, counts: Counter[str]) -> list[Response]:
    """Read the rows; one that holds no response is an error or, with on_error=skip, counted."""
    assert config.responses is not None
    rows, found = read_rows(config.responses, "label.responses"), []
    check_one_tokenizer({config.responses: rows})
    for number, row in enumerate(rows):
        where = f"{config.responses}, row {number + 1}"
        try:
            # a generated row carries the meta data of the row that it answers, where a reference answer travels
            conversation = (
                conversation_of(row) if "response_ids" in row else to_conversation(row, find_format(row, where), where)
            )
            if conversation.response is None:
                raise ValueError(f"{where}: has no response to score")
        except ValueError as error:
            _skip_or_raise(config, counts, "rows that could not be read", error)
            continue
        found.append(Response(number, row, conversation))
    if not found:
        raise ValueError(f"label.responses={config.responses}: none of {len(rows)} rows holds a response")
    return found


def _skip_or_raise(config: LabelConfig, counts: Counter[str], what: str, error: Exception) -> None:
    if config.on_error == "fail":
        raise ValueError(f"{error}. (label.on_error=skip leaves such rows out and counts them)") from error
    counts[what] += 1
    print(f"skipped: {clean(str(error))}")


# ---- scores


def scores_of(
    settings: Settings, responses: list[Response], folder: Path, counts: Counter[str]
) -> Iterator[tuple[Response, float]]:
    """Yield every response that a verifier or a judge gives a score."""
    config = settings.label
    if config.verifier:
        verifier = resolve_verifier(config.verifier, "label.verifier")
        for response in responses:
            try:
                value = scored(verifier, response.conversation, response.text)
            except Exception as error:
                where = f"row {response.number + 1} ({response.text[:120]!r})"
                shown = f"label.verifier={config.verifier} failed on {where}: {error!r}"
                _skip_or_raise(config, counts, "responses on which the verifier failed", ValueError(shown))
                continue
            yield response, value
        return
    judge = Judge(settings.judge, folder / "judged.jsonl", config.on_error)
    answers = judge.asked([judge.score_question(prompt_text(r.conversation.prompt), r.text) for r in responses])
    counts["responses without a verdict"] += sum(answer is None for answer in answers)
    yield from ((response, answer) for response, answer in zip(responses, answers, strict=True) if answer is not None)


def rewards_of(
    settings: Settings, responses: list[Response], known: set[int], process: Apart
) -> Iterator[tuple[Response, float]]:
    """Yield this process's share of the responses with the reward model's score, batch by batch, but for `known`.

    The batches are those of all responses, whoever scores them and whatever a killed run has left: other neighbors mean
    other padding, and other last bits.
    """
    config = settings.label
    assert config.reward_model is not None
    model = RewardModel(settings, config.reward_model, "label.reward_model")
    rows = [model.tokens(r.conversation.prompt, r.text, r.ended) for r in responses]
    batches = share_of(length_batches([row.ids for row in rows], config.batch_size), process.rank, process.world_size)
    for batch in tqdm(batches, desc="reward", mininterval=1, disable=not process.is_main):
        if known.issuperset(batch):
            continue
        for i, value in zip(batch, model.batch_scores([rows[i] for i in batch]), strict=True):
            if i not in known:
                yield responses[i], value


def all_scores(
    settings: Settings, responses: list[Response], folder: Path, counts: Counter[str], process: Apart
) -> dict[int, float]:
    """Return the score of each row by its number; those on disk are taken, new ones appended as they come.

    A process other than the first gets what it knows; the first waits for all of a reward model's.
    """
    parts = Parts(folder / "scores.jsonl", process.rank)
    found = [(file, row["key"], row["score"]) for file, row in parts.rows()]
    known: dict[str, float] = {key: score for _, key, score in found}
    source = source_of(settings)
    keys = {response.number: response.key(source) for response in responses}
    # of other processes' files nobody can tell what is of an earlier run: they may be writing already
    earlier = {key for file, key, _ in found if file in (parts.own, parts.path)}
    counts["scores taken from an earlier run"] = sum(key in earlier for key in keys.values())
    unique = list({keys[response.number]: response for response in reversed(responses)}.values())[::-1]
    there = {i for i, response in enumerate(unique) if keys[response.number] in known}
    new: Iterator[tuple[Response, float]] = iter(())
    if settings.label.reward_model and len(there) < len(unique):
        new = rewards_of(settings, unique, there, process)
    elif len(there) < len(unique):
        new = scores_of(settings, [r for i, r in enumerate(unique) if i not in there], folder, counts)
    for response, value in new:
        known[keys[response.number]] = value
        parts.append({"key": keys[response.number], "score": value})
    if process.is_main and settings.label.reward_model:
        wait_for(lambda: {*keys.values()} <= {row["key"] for _, row in parts.rows()})
        known = merged_scores(parts, [keys[response.number] for response in unique])
    return {number: known[key] for number, key in keys.items() if key in known}


def merged_scores(parts: Parts, order: list[str]) -> dict[str, float]:
    """Put the scores of all processes into one file, a row a key: those of other rows first, then in `order`."""
    rows = {row["key"]: row for _, row in parts.rows()}
    wanted = set(order)
    write_jsonl(parts.path, [*(row for key, row in rows.items() if key not in wanted), *(rows[key] for key in order)])
    parts.remove_others()
    return {key: row["score"] for key, row in rows.items()}


def source_of(settings: Settings) -> str:
    """Name who scores, by content where there is one."""
    config = settings.label
    if config.reward_model:
        model = settings.model
        reading = [model.max_length, model.max_prompt_length, model.template_date, model.policy_dtype]
        return f"reward model {models.model_digest(config.reward_model)} {reading}"
    if config.verifier:
        return f"verifier {config.verifier} {code_of(resolve_verifier(config.verifier, 'label.verifier'))}"
    judge = settings.judge
    template = read_template(judge.score_template, SCORE_PLACES, "judge.score_template")
    return f"judge {[judge.model_name or judge.base_url, judge.temperature, judge.max_tokens, template]}"


# ---- rows


def rewarded(responses: list[Response], scores: dict[int, float]) -> list[dict[str, Any]]:
    """Return the rows as they were, with `reward`."""
    return [{**response.row, "reward": scores[response.number]} for response in responses if response.number in scores]


def labeled(responses: list[Response], scores: dict[int, float], threshold: float) -> list[dict[str, Any]]:
    """Return the rows as they were, with `reward` and `label`: true from the threshold on."""
    return [{**row, "label": row["reward"] >= threshold} for row in rewarded(responses, scores)]


def best_against_worst(
    responses: list[Response], scores: dict[int, float], margin: float, counts: Counter[str]
) -> list[dict[str, Any]]:
    """Return a pair for each prompt whose best and worst responses lie more than `margin` apart.

    Of equals the first is taken.
    """
    groups: dict[str, list[Response]] = {}
    for response in responses:
        if response.number in scores:
            # the prompt to the letter: responses to code that differs in its indentation answer two prompts
            exact = json.dumps([response.conversation.prompt, response.row.get("prompt_ids")])
            groups.setdefault(exact, []).append(response)
    pairs = []
    for group in groups.values():
        best = max(group, key=lambda r: (scores[r.number], -r.number))
        worst = min(group, key=lambda r: (scores[r.number], r.number))
        if scores[best.number] - scores[worst.number] <= margin:
            counts["prompts with one response" if len(group) == 1 else "prompts whose responses tie"] += 1
            continue
        rewards = {"chosen_reward": scores[best.number], "rejected_reward": scores[worst.number]}
        if "response_ids" in best.row:
            pairs.append({**pair_row(best.row, worst.row), **rewards})
        else:
            asked = best.conversation.prompt
            prompt = asked[0]["content"] if [message["role"] for message in asked] == ["user"] else asked
            pairs.append({"prompt": prompt, "chosen": best.text, "rejected": worst.text, **rewards})
    return pairs


def run(settings: Settings) -> None:
    """Score the responses and write LABEL/labeled.jsonl."""
    config, counts, process = settings.label, Counter[str](), Apart()
    config.check_request()
    if process.world_size > 1 and not config.reward_model:
        raise ValueError(
            "task=label runs in one process where a verifier or a judge scores (a judge's requests go out together, "
            "judge.concurrency): start it with `python launch.py`, without accelerate launch"
        )
    responses = read_responses(config, counts)
    folder = settings.run.run_dir / "LABEL"
    folder.mkdir(parents=True, exist_ok=True)
    scores = all_scores(settings, responses, folder, counts, process)
    if not process.is_main:
        return
    if config.make == "pairs":
        rows = best_against_worst(responses, scores, config.margin, counts)
    elif config.make == "binary":
        rows = labeled(responses, scores, config.threshold)
    else:
        rows = rewarded(responses, scores)
    if not rows:
        raise ValueError(
            f"nothing to write of {config.responses}: {dict(counts)}. Sample more responses (generation.n), or warmer "
            "ones"
        )
    write_jsonl(folder / "labeled.jsonl", rows)
    values = list(scores.values())
    summary = {
        "responses": len(responses),
        "scored": len(values),
        "rows": len(rows),
        "mean_score": sum(values) / max(1, len(values)),
        **counts,
    }
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{value:10.4g} {what}" for what, value in summary.items()))
    print(f"{folder / 'labeled.jsonl'}", flush=True)
