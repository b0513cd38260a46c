"""Answers in the files of Arena-Hard and MT-bench: model_answer/NAME.jsonl, which their own judging reads.

Written where questions have an id: MT-bench's and Arena-Hard 0.1's `question_id` with `turns`, Arena-Hard 2's `uid`.
Formats: lm-sys/FastChat, fastchat/llm_judge; lmarena/arena-hard-auto.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.records import Responses

CODE = re.compile(r"```[^`]*```")
HEADERS = re.compile(r"^(#{1,6})\s", re.M)
ORDERED, UNORDERED = re.compile(r"^\s*\d+\.\s", re.M), re.compile(r"^\s*[-*+]\s", re.M)
BOLD = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}


def form_of(meta: Mapping[str, Any]) -> str | None:
    """Tell whose question a row is by its columns: mt_bench, arena_hard_01, arena_hard_2; None for nobody's."""
    turns = meta.get("turns")
    if "question_id" in meta and isinstance(turns, list) and turns:
        return "arena_hard_01" if isinstance(turns[0], Mapping) else "mt_bench"
    return "arena_hard_2" if "uid" in meta else None


def style_of(text: str, num_tokens: int) -> dict[str, Any]:
    """Return what Arena-Hard's style control reads of an answer; marks inside of code are not counted."""
    plain = CODE.sub("", text)
    levels = [len(marks) for marks in HEADERS.findall(plain)]
    return {
        "token_len": num_tokens,
        "header_count": {f"h{level}": levels.count(level) for level in range(1, 7)},
        "list_count": {"ordered": len(ORDERED.findall(plain)), "unordered": len(UNORDERED.findall(plain))},
        "bold_count": {mark: len(found.findall(plain)) for mark, found in BOLD.items()},
    }


def answer_row(
    meta: Mapping[str, Any], prompt: str, name: str, choices: Sequence[Sequence[str]], num_tokens: int, now: float
) -> dict[str, Any]:
    """Return a row of an answer file; choices: of every sample its answers, turn by turn.

    num_tokens: of the first sample, in the model's own tokens (Arena-Hard counts in GPT's). now: seconds since 1970.
    """
    form = form_of(meta)
    named = hashlib.sha256(repr((meta.get("question_id", meta.get("uid")), name, choices)).encode()).hexdigest()[:22]
    if form == "arena_hard_2":
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": choices[0][0]}}]
        style = style_of(choices[0][0], num_tokens)
        return {"uid": meta["uid"], "ans_id": named, "model": name, "messages": said, "tstamp": now, "metadata": style}
    objects = form == "arena_hard_01"
    row = {
        "question_id": meta["question_id"],
        "answer_id": named,
        "model_id": name,
        "choices": [
            {"index": i, "turns": [{"content": text} for text in turns] if objects else list(turns)}
            for i, turns in enumerate(choices)
        ],
        "tstamp": now,
    }
    if objects and len(choices) == len(choices[0]) == 1:
        row["conv_metadata"] = style_of(choices[0][0], num_tokens)
    return row


def answer_rows(
    name: str, metas: Sequence[Mapping[str, Any]], prompts: Sequence[str], samples: Sequence[Responses], now: float
) -> list[dict[str, Any]]:
    """Return the rows of a model's answer file; empty where no question has an id. samples: one Responses a sample."""
    said = [responses.turns or [[text] for text in responses.texts] for responses in samples]
    return [
        answer_row(meta, prompt, name, [turns[i] for turns in said], samples[0].num_tokens[i], now)
        for i, (meta, prompt) in enumerate(zip(metas, prompts, strict=True))
        if form_of(meta)
    ]
