"""Teachers that stand elsewhere: one server or two score sequences by their ids (cache.backend=server).

A laptop that has the tokenizer and the data builds the cache of a model that it could not hold. Before the first
sequence each server shows that it can do what is asked, that it has our tokenizer, and which model it is.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dataloader import Tokens, encode_prompt
from generation.server import Refused, Server, in_order
from settings.artifacts import write_json
from settings.teacher_sections import CacheConfig
from teacher.cache import Arrays
from teacher.protocol import (
    PATH,
    Body,
    TopK,
    gathered_logps_of,
    given_ids_request,
    given_logps_of,
    own_logps_of,
    top_k_of,
    top_k_request,
)
from teacher.quantities import Quantity
from templates import asks_the_date

AHEAD = 4  # sequences that are asked for and not yet written, as a multiple of cache.concurrency
ALIGNED = 0.05  # nats between two ways to ask one server; a row too early or late is off by several
PROBE_TOKENS = 64
PROBE_TEXT = (
    "The quick brown fox (aged 7) jumps over 12 lazy dogs; 3.14 * 2 = 6.28.\n\tdef f(x): return x**2  # naïve façade\n"
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 東京は晴れ。"
)
PROBE_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "  And in French?\n"},
]

Result = TypeVar("Result")


class Served(NamedTuple):
    """A model on a server: what it is to us, where it is, its name there, how many tokens it takes (None: not said)."""

    what: str
    server: Server
    model: str
    max_length: int | None

    @property
    def digest(self) -> str:
        """Return its identity in meta.json. Of the weights nothing is known here; served.json has probe values."""
        return f"served:{self.model}"

    def __str__(self) -> str:
        """Name it in messages."""
        return f"the {self.what} {self.model!r} at {self.server.base_url}"


class Probe(NamedTuple):
    """What tells one model from another under the same name: log-probabilities of fixed ids."""

    ids: list[int]
    logps: list[float]


# ---- who is there


def connected(config: CacheConfig) -> tuple[Served, ...]:
    """Find the teacher, and the reference teacher where there is one, each on its server."""
    assert config.base_url is not None
    found = [_served(config, "teacher", config.base_url, config.model_name, "")]
    if config.reference_base_url:
        name = config.reference_model_name
        found.append(_served(config, "reference teacher", config.reference_base_url, name, "reference_"))
    if len({(one.server.base_url, one.model) for one in found}) < len(found):
        raise ValueError(f"{found[0]} is its own reference: every advantage would be 0. Set cache.reference_base_url")
    return tuple(found)


def _served(config: CacheConfig, what: str, url: str, name: str | None, prefix: str) -> Served:
    root = url.rstrip("/").removesuffix("/v1")
    server = Server(root, config.timeout, config.retries, "cache", f"{prefix}base_url")
    listed = {str(entry.get("id")): entry for entry in server.call("/v1/models").get("data") or []}
    chosen = name or (next(iter(listed)) if len(listed) == 1 else None)
    if chosen not in listed:
        key = f"cache.{prefix}model_name"
        raise ValueError(f"{key}={name!r}: {root} serves {', '.join(listed) or 'nothing'}. Set {key} to one of them")
    return Served(what, server, str(chosen), listed[str(chosen)].get("max_model_len"))


# ---- requests


def asked(teacher: Served, body: Body, read: Callable[[Mapping[str, Any]], Result]) -> Result:
    """Ask a server and read its answer; ValueError names the server, what was wrong and the flag to set."""
    try:
        answer = teacher.server.call(PATH, body)
    except Refused as error:
        raise ValueError(f"{error} {remedy(error, body)}".rstrip()) from error
    try:
        return read(answer)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{teacher} answers in a form that is not known ({error!r}): {str(answer)[:200]}") from error
    except ValueError as error:
        raise ValueError(f"{teacher}: {error}") from error


def remedy(error: Refused, body: Body) -> str:
    """Say which flag of the server is missing, from what it said."""
    said, sampling = error.said.lower(), body["sampling_params"]
    given = sampling.get("prompt_logprob_token_ids")
    k = len(given[0]) if given else sampling["prompt_logprobs"]
    if error.code in (403, 404, 405, 501):
        return f"It does not offer {PATH}: start vLLM (0.32 or newer) with --enable-scale-out."
    if "v2 model runner" in said:
        return (
            "Start it with VLLM_USE_V2_MODEL_RUNNER=1 (which needs Triton), or set "
            "cache.given_ids=whole_vocabulary, which is slow."
        )
    if "max allowed" in said or "max_logprobs" in said:
        return f"Start it with --max-logprobs {k}."
    if "max_model_len" in said or "context length" in said:
        return f"Start it with --max-model-len {len(body['token_ids']) + 1} or more."
    return ""


def top_k_from(teacher: Served, row: Tokens, k: int, vocab_size: int) -> TopK:
    """Ask for the teacher's top k before each response token of a sequence."""
    body = top_k_request(teacher.model, row.ids, k)
    return asked(teacher, body, lambda answer: top_k_of(answer, row.ids, row.response, k, vocab_size))


def logps_from(teacher: Served, row: Tokens, wanted: np.ndarray, given_ids: str) -> np.ndarray:
    """Ask for the log-probabilities of wanted [L, K] before each response token, float32 [L, K].

    given_ids: binary (vLLM's own field), or whole_vocabulary: the softmax comes as JSON and is gathered here.
    """
    if given_ids == "whole_vocabulary":
        body = top_k_request(teacher.model, row.ids, -1)
        return asked(teacher, body, lambda answer: gathered_logps_of(answer, row.ids, row.response, wanted))
    body = given_ids_request(teacher.model, row.ids, row.response, wanted)
    return asked(teacher, body, lambda answer: given_logps_of(answer, row.ids, row.response, wanted.shape[1]))


# ---- before the first sequence


def check_length(teacher: Served, longest: int) -> None:
    """Refuse sequences that the server would refuse one by one: it generates a token behind each."""
    if teacher.max_length is not None and teacher.max_length < longest + 1:
        raise ValueError(
            f"{teacher} takes {teacher.max_length} tokens, the longest sequence has {longest} and one more has to be "
            f"generated: start the server with --max-model-len {longest + 1}, or lower model.max_length"
        )


def check_tokenizer(teacher: Served, tokenizer: Any) -> str:
    """Compare the server's tokenizer and template with ours by the ids of a text and a conversation.

    Return what was compared; ValueError shows the first difference. A server without /tokenize is not checked.
    """
    text = {"prompt": PROBE_TEXT, "add_special_tokens": False}
    ours = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    done = _compared(teacher, text, "tokenizer", tokenizer, ours)
    if asks_the_date(tokenizer):
        return f"{done}; template not checked, it writes the date"
    chat = {"messages": PROBE_CHAT, "add_generation_prompt": True}
    return f"{done}; {_compared(teacher, chat, 'chat template', tokenizer, encode_prompt(tokenizer, PROBE_CHAT))}"


def _compared(teacher: Served, body: Body, what: str, tokenizer: Any, ours: list[int]) -> str:
    try:
        theirs = teacher.server.call("/tokenize", {"model": teacher.model, **body}).get("tokens")
    except Refused as error:
        return f"{what} not checked (/tokenize answers HTTP {error.code})"
    if not isinstance(theirs, list):
        return f"{what} not checked (/tokenize gives no tokens)"
    bos = tokenizer.bos_token_id
    if ours != theirs and ours[:1] == [bos] and ours[1:] == theirs:  # a template without it; our ids have it
        return f"{what} equal by ids"
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        here = ours[at : at + 6]
        raise ValueError(
            f"{teacher} has another {what}: it makes {len(theirs)} ids of a probe, this run {len(ours)}, and they part "
            f"at {at}: {theirs[at : at + 6]} there, {here} = {tokenizer.decode(here)!r} here. Set "
            "model.tokenizer_name_or_path to the teacher's tokenizer, or start the server with its "
            f"{'--chat-template' if what == 'chat template' else '--tokenizer'}"
        )
    return f"{what} equal by ids"


def probe_row(tokenizer: Any) -> Tokens:
    """Return the fixed sequence that servers are tried with: a prompt, a response, a prompt again, a response."""
    ids = tokenizer(PROBE_TEXT, add_special_tokens=True)["input_ids"][:PROBE_TOKENS]
    return Tokens(ids, [i >= 8 and i not in (12, 13) for i in range(len(ids))])


def probed(teacher: Served, row: Tokens, k: int, vocab_size: int, given_ids: str | None) -> Probe:
    """Let a server show what is needed of it, and return the probe's log-probabilities.

    given_ids: how it will be asked for given ids, None if it will not. The same numbers come back on both ways.
    """

    def read(answer: Mapping[str, Any]) -> tuple[TopK, np.ndarray]:
        return top_k_of(answer, row.ids, row.response, k, vocab_size), own_logps_of(answer, row.ids)

    top, own = asked(teacher, top_k_request(teacher.model, row.ids, k), read)
    if given_ids is not None:
        gap = float(np.abs(logps_from(teacher, row, top.ids, given_ids) - top.logps).max())
        if gap > ALIGNED:
            raise ValueError(
                f"{teacher} gives its own top {k} other log-probabilities when it is asked for them by id: up to "
                f"{gap:.3f} nats apart. Its rows are not aligned as this version expects (cache.given_ids={given_ids})"
            )
    return Probe(list(row.ids), own.tolist())


def check_servers(
    teachers: Sequence[Served], config: CacheConfig, tokenizer: Any, longest: int
) -> dict[str, dict[str, Any]]:
    """Check all that can be checked before the first sequence; return what each model's probe gave, by role."""
    found: dict[str, dict[str, Any]] = {}
    row = probe_row(tokenizer)
    for teacher in teachers:
        check_length(teacher, max(longest, len(row.ids)))
        print(f"{teacher}: {check_tokenizer(teacher, tokenizer)}")
        way = config.given_ids if teacher is not teachers[0] else None
        probe = probed(teacher, row, config.top_k, len(tokenizer), way)
        found[teacher.what] = {"model": teacher.model, "url": teacher.server.base_url, **probe._asdict()}
    if len(found) == 2:
        one, other = (np.array(part["logps"]) for part in found.values())
        if np.array_equal(one, other):
            print("warning: both servers give the probe the same log-probabilities. Do they serve one model?")
    return found


def check_models(folder: Path, found: Mapping[str, Mapping[str, Any]], tolerance: float, has_entries: bool) -> None:
    """Write the probes' values into served.json, or compare with those there: a cache is one model's from end to end.

    ValueError where the mean difference is above `tolerance` nats, or where entries have no values beside them.
    """
    path = folder / "served.json"
    if not path.is_file():
        if has_entries:
            raise ValueError(f"{path} is missing, so nothing says which model began this cache: remove {folder}")
        write_json(path, found)
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    for what, now in found.items():
        before = stored.get(what, {})
        if before.get("ids") != now["ids"]:
            raise ValueError(f"{path} has the probe of another tokenizer for the {what}: remove {folder}")
        gap = float(np.abs(np.array(before["logps"]) - np.array(now["logps"])).mean())
        if gap > tolerance:
            raise ValueError(
                f"{folder} was begun with another {what} than {now['url']} serves as {now['model']!r}: the "
                f"log-probabilities of a probe differ by {gap:.4f} nats on average, cache.probe_tolerance={tolerance}. "
                "Serve the first model again, or take another exp_name"
            )


# ---- the work


class ServedScorer:
    """The quantity's arrays of a sequence from one server or two: the teacher's top k, then the reference at those."""

    def __init__(self, quantity: Quantity, teachers: Sequence[Served], config: CacheConfig, vocab_size: int) -> None:
        self.quantity, self.teachers, self.config, self.vocab_size = quantity, teachers, config, vocab_size

    def __call__(self, row: Tokens) -> Arrays:
        """Return the arrays of one sequence."""
        top = top_k_from(self.teachers[0], row, self.config.top_k, self.vocab_size)
        found = {"ids": top.ids, "values": top.logps, "tail": top.tail}
        if self.quantity.num_models == 1:
            return found
        reference = logps_from(self.teachers[1], row, top.ids, self.config.given_ids)
        return found | {"values": self.config.beta * (top.logps - reference), "teacher_logps": top.logps}

    def stream(self, todo: Sequence[Sequence[Tokens]]) -> Iterator[list[Arrays]]:
        """Yield the arrays of each batch in their order; sequences behind it are asked for meanwhile.

        Answers come in any order and are taken in this one, so that a cache has the same bytes however often it was
        killed.
        """
        concurrency = self.config.concurrency
        rows = (row for batch in todo for row in batch)
        found = in_order(rows, self, concurrency, AHEAD * concurrency)
        try:
            for batch in todo:
                yield list(islice(found, len(batch)))
        finally:
            for teacher in self.teachers:
                teacher.server.stopped.set()  # no thread asks again
