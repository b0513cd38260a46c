"""Rows of any format, turned into conversations (lists of role/content messages).

Nothing here knows tokens, or where rows come from (tokens/sources.py). A format is found from the columns unless the
config names it (`datasets.NAME.format`).
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Message = dict[str, str]
Row = dict[str, Any]
ROLE = re.compile(r"[\w .:-]{1,40}")
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


class Conversation(NamedTuple):
    """A prompt and what may follow it. Each response is a list of messages that continues the prompt."""

    prompt: list[Message]
    chosen: list[Message] | None
    rejected: list[Message] | None
    response: list[Message] | None
    meta: dict[str, Any]


# ---- formats: what the columns are called. A new one is a parser here, its line in PARSERS, and `format:` in YAML


def format_of(name: str, row: Row, where: str) -> str:
    """Return the format that a data set names, or with `auto` the one that its first row shows."""
    if name == "auto":
        return find_format(row, where)
    if name not in PARSERS:
        raise ValueError(f"{where}: format={name!r} is not known; choose one of auto, {', '.join(PARSERS)}")
    return name


def find_format(row: Row, where: str) -> str:
    """Name the format of a row from its columns; ValueError if they are nobody's."""
    if "prompt_ids" in row and ("response_ids" in row or "chosen_ids" in row):
        return "generation"
    if {"history", "human_ref_A", "human_ref_B", "labels"} <= row.keys():
        return "shp"
    chosen = row.get("chosen") or row.get("rejected")  # an empty side is the parser's to refuse: it names it
    if isinstance(chosen, str) and "prompt" not in row and chosen.startswith(HUMAN.rstrip(" ")):
        return "hh"
    if isinstance(row.get("conversations"), list) and not isinstance(row.get("messages"), list):
        return "sharegpt"
    if isinstance(row.get("messages"), list) or isinstance(chosen, list):
        return "messages"
    if "prompt" in row and (chosen is None or isinstance(chosen, str) or "response" in row or "chosen" not in row):
        return "strings"
    if "question_id" in row and isinstance(row.get("turns"), list):
        return "questions"
    if isinstance(row.get("instruction"), str) and ("output" in row or "chosen" in row):
        return "alpaca"
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return "gsm8k"
    raise ValueError(
        f"{where}: cannot tell the format from the columns {sorted(row)}. Known: `messages`; `chosen` and `rejected` "
        "lists of role/content; `prompt` with `response` (or `completion`, `teacher_response`), or with `chosen` "
        "and `rejected`; `prompt` alone; `question` with `answer`; ShareGPT's `conversations` of from/value; Alpaca's "
        f"`instruction`, `input`, `output`; `question_id` with `turns`. Other columns need a parser "
        f"and its name in format: {', '.join(PARSERS)} are there"
    )


def to_conversation(row: Row, fmt: str, where: str) -> Conversation:
    """Turn a row of a known format into a conversation; ValueError names `where` (source and row)."""
    try:
        return PARSERS[fmt](row)
    except KeyError as error:
        columns = ", ".join(map(str, row))
        raise ValueError(f"{where}: not a row of format {fmt!r}: no column {error}; it has {columns}") from error
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{where}: not a row of format {fmt!r} ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _text(content: Any, what: str) -> str:
    """Return a content as text: a string, or OpenAI's list of parts with their texts joined; nothing else is text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        return "".join(_part_text(part, what) for part in content)
    raise ValueError(f"{what} must be a text, this is {_told(content)}: remove the row or give it one")


def _told(content: Any) -> str:
    return "None (null)" if content is None else f"{content!r:.80}"


def _part_text(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"{what} has a part that is no text, {part!r:.80}: only parts of type 'text' can be read")


def _checked(messages: Any, what: str = "messages") -> list[Message]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{what} must be a text or a non-empty list of role/content objects, this is {_told(messages)}: remove "
            "the row or give it one"
        )
    return [_message(message, f"{what}[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, what: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{what} must be an object with role and content, this is {message!r:.80}: correct the row")
    content = message["content"]
    calls = message.get("tool_calls") or message.get("function_call")
    if calls:  # what is not written would be missing from what is learned, and its result would come from nowhere
        raise ValueError(
            f"{what} calls a tool, {calls!r:.80}, and calls are not part of any text here: remove the row, or write "
            "the call into content as the model is to write it"
        )
    if not isinstance(message["role"], str):
        raise ValueError(f"{what}.role must be a text, this is {message['role']!r:.80}: correct the row")
    if not ROLE.fullmatch(message["role"]):  # a template writes it as it is, so it could begin other turns
        raise ValueError(f"{what}.role must be a word such as user, this is {message['role']!r:.80}: correct the row")
    return {"role": message["role"], "content": "" if content is None else _text(content, f"{what}.content")}


def _split_last(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, its role is {messages[-1]['role']!r}")
    return messages[:-1], messages[-1:]


def _difference(one: list[Message], other: list[Message]) -> str:
    """Say where two prompts part."""
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} messages before the response"
    for i, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        if ours["role"] != theirs["role"]:
            return f"message {i} is the {ours['role']}'s and the {theirs['role']}'s"
        if ours["content"] != theirs["content"]:
            start = max(0, len(os.path.commonprefix([ours["content"], theirs["content"]])) - 10)
            told = [text["content"][start : start + 40] for text in (ours, theirs)]
            return f"message {i} reads {told[0]!r} and {told[1]!r} from character {start} on"
    return "they are alike"


def _response(row: Row, column: str) -> list[Message]:
    return [{"role": "assistant", "content": _text(row[column], column)}]


HEAVY = frozenset(  # columns that a parser takes apart; all others are meta data
    "messages chosen rejected prompt response teacher_response completion conversations instruction input output "
    "history prompt_ids response_ids chosen_ids rejected_ids tokenizer_digest".split()
)


def _meta(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in HEAVY}


def _from_messages(row: Row) -> Conversation:
    if row.get("chosen") is not None or ("chosen" in row and row.get("messages") is None):
        prompt, chosen = _split_last(_checked(row["chosen"], "chosen"))
        other, rejected = _split_last(_checked(row["rejected"], "rejected"))
        if prompt != other:
            raise ValueError(f"chosen and rejected answer different prompts: {_difference(prompt, other)}")
        return Conversation(_with_prompt(row, prompt), chosen, rejected, None, _meta(row))
    messages = _checked(row["messages"])
    if messages[-1]["role"] != "assistant":
        return Conversation(messages, None, None, None, _meta(row))
    prompt, response = _split_last(messages)
    return Conversation(prompt, None, None, response, _meta(row))


def _with_prompt(row: Row, held: list[Message]) -> list[Message]:
    """Put the column `prompt` before the messages that both sides begin with, unless they hold it already.

    TRL's explicit prompt stands there alone; in other files it is a copy, or as a text a name of the first message.
    """
    given = row.get("prompt") if held else row["prompt"]
    if held and (not given or (isinstance(given, str) and held[0]["role"] in ("system", "user"))):
        return held
    prompt = _checked(given, "prompt")
    start = 1 if held and held[0]["role"] == "system" else 0
    if held[: len(prompt)] == prompt or held[start : start + len(prompt)] == prompt:
        return held
    twice = next((message for message in prompt if message in held), None)
    if twice is not None and held[0]["role"] in ("system", "user"):
        raise ValueError(
            f"prompt and chosen both hold the message {twice!r:.80}, and chosen does not begin with prompt: give the "
            "messages before the response in one of them"
        )
    return prompt + held


def _from_strings(row: Row) -> Conversation:
    prompt = _checked(row["prompt"], "prompt")
    if "chosen" in row:
        return Conversation(prompt, _response(row, "chosen"), _response(row, "rejected"), None, _meta(row))
    column = next((name for name in RESPONSES if row.get(name) is not None), "response")
    response = None if row.get(column) is None else _completion(row[column], column)
    return Conversation(prompt, None, None, response, _meta(row))


RESPONSES = ("response", "completion", "teacher_response")  # the first that a row has is its response


def _completion(value: Any, column: str) -> list[Message]:
    """Take a response as a text, or as TRL's list of one assistant's message."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]):
        return [{"role": "assistant", "content": _text(value, column)}]
    before, response = _split_last(_checked(value, column))
    if before:
        raise ValueError(f"{column} must be one message of the assistant, it has {len(value)}: use `messages`")
    return response


# ShareGPT's names of who speaks, as its files and the tools that read them spell them
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "bot", "model", "assistant"), "assistant"),
    "system": "system",
}


def _speaker_turn(turn: Any, what: str) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ValueError(f"{what} must have `from` and `value`, this is {turn!r:.80}")
    if turn["from"] not in SPEAKERS:
        raise ValueError(f"{what}.from is {turn['from']!r}, known are {', '.join(SPEAKERS)}: remove the row")
    return {"role": SPEAKERS[turn["from"]], "content": _text(turn["value"], f"{what}.value")}


def _from_sharegpt(row: Row) -> Conversation:
    """Take ShareGPT's conversations of from/value, with `system`, and `chosen` and `rejected` of a pair beside them."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations must be a non-empty list of from/value, this is {turns!r:.80}: remove the row")
    messages = [_speaker_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    meta = {key: value for key, value in _meta(row).items() if key != "system"}
    if row.get("chosen") is not None:
        chosen, rejected = ([_speaker_turn(row[side], side)] for side in ("chosen", "rejected"))
        return Conversation(messages, chosen, rejected, None, meta)
    if messages[-1]["role"] != "assistant":
        return Conversation(messages, None, None, None, meta)
    return Conversation(messages[:-1], None, None, messages[-1:], meta)


def _from_alpaca(row: Row) -> Conversation:
    """Take Alpaca's instruction, a line break and its input as the prompt; `system` and `history` come before it."""
    asked = [_text(row["instruction"], "instruction")]
    asked += [_text(row["input"], "input")] if row.get("input") else []
    messages = [{"role": "system", "content": _text(row["system"], "system")}] if row.get("system") else []
    for i, turn in enumerate(row.get("history") or []):
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": _text(text, f"history[{i}]")})
    messages.append({"role": "user", "content": "\n".join(asked)})
    meta = {key: value for key, value in _meta(row).items() if key != "system"}
    if "chosen" in row:
        return Conversation(messages, _response(row, "chosen"), _response(row, "rejected"), None, meta)
    return Conversation(messages, None, None, None if row["output"] is None else _response(row, "output"), meta)


def parse_hh(text: str) -> list[Message]:
    """Split "\\n\\nHuman: ... \\n\\nAssistant: ..." into messages."""
    messages: list[Message] = []
    for chunk in (
        text.replace(ASSISTANT.rstrip(" "), "\0assistant\0").replace(HUMAN.rstrip(" "), "\0user\0").split("\0")
    ):
        if chunk in ("assistant", "user"):
            messages.append({"role": chunk, "content": ""})
        elif messages:
            messages[-1]["content"] = chunk.strip()
        elif chunk.strip():
            raise ValueError(f"an hh text must begin with {HUMAN!r}, this one begins with {chunk[:40]!r}")
    return messages


def _from_hh(row: Row) -> Conversation:
    both = {column: parse_hh(_text(row[column], column)) for column in ("chosen", "rejected")}
    return _from_messages(both)


def _from_shp(row: Row) -> Conversation:
    first, second = _response(row, "human_ref_A"), _response(row, "human_ref_B")
    chosen, rejected = (first, second) if int(row["labels"]) == 1 else (second, first)
    return Conversation(_checked(row["history"], "history"), chosen, rejected, None, _meta(row))


def _from_gsm8k(row: Row) -> Conversation:
    """Take the question as the prompt and the whole solution as the response; the number after #### goes to meta."""
    answer = _text(row["answer"], "answer")
    _, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise ValueError(f"a gsm8k answer ends with '#### number', this one with {answer[-60:]!r}")
    rest = {k: v for k, v in row.items() if k != "question"}
    return Conversation(
        _checked(row["question"], "question"),
        None,
        None,
        _response(row, "answer"),
        _meta({**rest, "answer": final.strip()}),
    )


def turn_text(turn: Any, what: str = "turns") -> str:
    """Return a turn of a question file as text: MT-bench has strings, Arena-Hard objects with `content`."""
    return _text(turn["content"] if isinstance(turn, dict) and "content" in turn else turn, what)


def _from_questions(row: Row) -> Conversation:
    """Take the first of a question's turns as the prompt; its meta keeps all `turns`, as the others are asked later.

    The files of MT-bench and Arena-Hard 0.1; those of Arena-Hard 2 are `uid` and `prompt`.
    """
    if not isinstance(row["turns"], list) or not row["turns"]:
        raise ValueError(f"turns must be a non-empty list, this is {row['turns']!r:.80}: remove the row")
    texts = [turn_text(turn, f"turns[{i}]") for i, turn in enumerate(row["turns"])]
    return Conversation(_checked(texts[0]), None, None, None, _meta(row))


def _from_generation(row: Row) -> Conversation:
    """Take a row with ids; its meta is that of the data row which it answers, and its own columns."""
    own = {k: v for k, v in _meta(row).items() if k != "meta"}
    meta, prompt = {**(row.get("meta") or {}), **own}, _checked(row["prompt"], "prompt")
    if "chosen_ids" in row:
        return Conversation(prompt, _response(row, "chosen"), _response(row, "rejected"), None, meta)
    return Conversation(prompt, None, None, _response(row, "response"), meta)


PARSERS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _from_messages,
    "strings": _from_strings,
    "hh": _from_hh,
    "shp": _from_shp,
    "gsm8k": _from_gsm8k,
    "questions": _from_questions,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "generation": _from_generation,
}


# ---- rows with token ids

WAY_OUT = (
    "Sample again with task=generate and this model's tokenizer. Or remove prompt_ids and the other columns of ids: a "
    "data set's text is then tokenized anew"
)


def tokenizer_of(row: Row, where: str) -> str:
    """Return the digest of the tokenizer that made a row's ids; ValueError if the row does not say.

    Decoding the ids and comparing texts would be no proof: templates and end tokens do not show in a response's text.
    """
    if not row.get("tokenizer_digest"):
        raise ValueError(f"{where}: has token ids and no tokenizer_digest, so nobody knows what they mean. {WAY_OUT}")
    return row["tokenizer_digest"]


def check_one_tokenizer(files: Mapping[str, Iterable[Row]]) -> None:
    """Refuse files whose rows have ids of several tokenizers, or of an unknown one.

    Whoever computes with the ids compares the digest with his own tokenizer's.
    """
    first: tuple[str, str] | None = None
    for source, rows in files.items():
        for number, row in enumerate(rows, 1):
            if "prompt_ids" not in row:
                continue
            where = f"{source}, row {number}"
            digest = tokenizer_of(row, where)
            first = first or (digest, where)
            if digest != first[0]:
                raise ValueError(
                    f"{where}: its ids are of another tokenizer (digest {digest}) than those of {first[1]} "
                    f"({first[0]}). Keep the responses of different tokenizers apart"
                )


def key_of(prompt: list[Message]) -> str:
    """Return what makes two prompts the same: roles and words, whatever the white space."""
    return json.dumps([[message["role"], " ".join(message["content"].split())] for message in prompt])


def conversation_of(row: Row) -> Conversation:
    """Return a generated row as a conversation whose meta is that of the data row it answers."""
    return Conversation(
        row["prompt"], None, None, [{"role": "assistant", "content": row["response"]}], row.get("meta") or {}
    )
