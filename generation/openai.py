"""OpenAI-compatible backend: any server with /completions that takes token ids as prompt, and gives token ids back.

vLLM's server does (`return_token_ids`). Where a server gives only text it is refused, or, with
generation.text_responses=tokenize, its text is tokenized: those rows are marked. Where it takes only text:
generation/text_prompts.py.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from generation.calculator_hooks import Piece, pause_ids, piece_of, response_with_calculator
from generation.interface import Answer, derived_seed, forbidden_ids
from generation.server import Server, in_parallel, served_model
from generation.text_prompts import UNCUT, TextPrompts
from settings.schema import Settings
from templates import turn_end
from tokens.encoding import encode_text


class OpenAIBackend:
    """An OpenAI-compatible server behind the interface of generation.responses; each request has a seed of its own."""

    def __init__(self, settings: Settings, tokenizer: Any, stop: list[int]) -> None:
        generation = settings.generation
        assert generation.base_url is not None
        self.generation, self.tokenizer, self.stop = generation, tokenizer, stop
        self.pauses = pause_ids(tokenizer, stop) if generation.calculator else []
        self.server = Server(generation.base_url, generation.timeout, generation.retries)
        self.model = served_model(self.server, generation.model_name)
        self.texts = TextPrompts(self.server, tokenizer, self.model) if generation.prompts_as == "text" else None
        forbidden = forbidden_ids(tokenizer, stop, len(tokenizer), len(tokenizer)).nonzero().flatten().tolist()
        self.bias = {str(i): -100 for i in forbidden}

    def payload(self, prompt: list[int], room: int, seed: int) -> dict[str, Any]:
        """Return the body of one request: the standard's fields, and vLLM's own where ids shall come back."""
        generation = self.generation
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": room,
            "n": 1,
            "seed": seed,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "logit_bias": self.bias,
        }
        if self.texts:
            body |= {"prompt": self.texts.text(prompt), **UNCUT}
        if generation.text_responses == "tokenize":
            return body | {"stop": [self.tokenizer.convert_ids_to_tokens(i) for i in self.stop[:4]]}  # 4 at most
        return body | {
            "top_k": max(0, generation.top_k),
            "stop_token_ids": [*self.stop, *self.pauses],
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }

    def ask(self, index: int, prompt: list[int], seed: int) -> Answer:
        """Answer one prompt, with a request after each pause for the calculator where there is one."""
        room = self.generation.max_new_tokens
        if self.generation.text_responses == "tokenize":
            return self._from_text(index, self.choice(prompt, room, seed))
        spoken: list[tuple[Piece, list[float] | None]] = []

        def speak(prompts: list[list[int]], rooms: list[int], turn: int) -> list[Piece]:
            spoken.append(self.piece(prompts[0], rooms[0], self.choice(prompts[0], rooms[0], turn)))
            return [spoken[-1][0]]

        if not self.pauses:
            speak([prompt], [room], seed)
            (ids, reason), logps = spoken[0]
            return Answer(index, ids, reason, logps)
        ((ids, reason),) = response_with_calculator(speak, self.tokenizer, [prompt], room, seed)
        # What the calculator wrote was not sampled: a response with a pause has no log-probabilities of its own.
        return Answer(
            index, ids, reason, spoken[0][1] if len(spoken) == 1 and len(spoken[0][0].ids) == len(ids) else None
        )

    def choice(self, prompt: list[int], room: int, seed: int) -> dict[str, Any]:
        """Ask for one response; one that the server broke off (finish_reason abort, when it ends) is asked for
        again.
        """
        reason = None
        for _ in range(self.generation.retries + 1):
            response = self.server.call("/completions", self.payload(prompt, room, seed))
            choices = response.get("choices")
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                raise ValueError(f"{self.server.base_url}/completions answers without choices: {str(response)[:300]}")
            reason = choices[0].get("finish_reason")
            if reason in ("stop", "length"):
                return choices[0]
            self.server.stopped.wait(1.0)
        raise ValueError(f"{self.server.base_url} ends a response with finish_reason={reason!r} each time")

    def piece(self, prompt: list[int], room: int, choice: dict[str, Any]) -> tuple[Piece, list[float] | None]:
        """Check what came back (our prompt's ids unchanged, no more ids than `room` and all of the tokenizer's, an end
        that is ours); with its log-probabilities, if any.
        """
        ids = choice.get("token_ids")
        if ids is None:
            raise ValueError(
                f"{self.server.base_url} gives no token ids back (return_token_ids of vLLM's server, from 0.10.2). "
                "generation.text_responses=tokenize makes ids from its text and marks the rows"
            )
        came = choice.get("prompt_token_ids")
        if came is not None and came != prompt:
            raise ValueError(f"the server changed the prompt's ids from {prompt[:8]}... to {came!r:.60}...")
        check_ids(ids, room, len(self.tokenizer))
        piece = piece_of(ids, self.stop, self.pauses)
        if choice["finish_reason"] == "stop" and piece.reason == "length":
            raise ValueError(f"the server ended a response at {ids[-1:]}, which is none of the stop ids {self.stop}")
        found = choice.get("logprobs")
        logps = found.get("token_logprobs") if isinstance(found, dict) else None
        return piece, checked_logps(logps, len(ids))[: len(piece.ids)] if logps else None

    def _from_text(self, index: int, choice: dict[str, Any]) -> Answer:
        if not isinstance(choice.get("text"), str):
            raise ValueError(f"{self.server.base_url} answers without a text: {str(choice)[:300]}")
        ids = encode_text(self.tokenizer, choice["text"])
        end = turn_end(self.tokenizer).id
        if choice["finish_reason"] == "stop" and end is not None:
            return Answer(index, [*ids, end], "stop", None, True)
        return Answer(index, ids, "length", None, True)

    def answers(self, prompts: Sequence[list[int]], wanted: Collection[int], seed: int) -> Iterator[Answer]:
        """Yield responses as they come, `generation.concurrency` requests at once; what is in is yielded before an
        error.
        """
        order = sorted(wanted, key=lambda i: (-len(prompts[i]), i))
        work = lambda i: self.ask(i, prompts[i], derived_seed(seed, i))  # noqa: E731
        yield from in_parallel(self.server, order, work, self.generation.concurrency)

    def close(self) -> None:
        """Let no thread ask again."""
        self.server.stopped.set()


def check_ids(ids: Any, room: int, vocab_size: int) -> None:
    """Refuse a response that is no list of the tokenizer's ids, or is longer than was asked for."""
    if not isinstance(ids, list) or len(ids) > room:
        raise ValueError(f"the server answers with {ids!r:.60}..., asked for at most {room} ids (max_tokens)")
    strange = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]
    if strange:
        raise ValueError(
            f"the server answers with the id {strange[0]!r}, the tokenizer has {vocab_size} tokens: its model has a "
            "padded vocabulary, which it samples from, or another tokenizer"
        )


def checked_logps(logps: Any, count: int) -> list[float]:
    """Return a response's log-probabilities; ValueError unless there is a number for each of its ids."""
    numbers = isinstance(logps, list) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in logps)
    if not numbers or len(logps) != count:
        raise ValueError(f"the server gives the log-probabilities {logps!r:.80} for {count} ids: not a number for each")
    return logps
