"""OpenAI-compatible backend: any server with /completions that takes token ids as a prompt.

vLLM's server gives token ids back (`return_token_ids`). Where a server gives only text it is refused, or, with
generation.retokenize=true, its text is tokenised: these rows are marked.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from backends.http import Server
from backends.replies import FORBIDDEN, Backend, Reply, cut, forbidden_ids, in_order, reply_seed
from backends.vllm import pause_ids, piece_of
from calculator_generation import Piece, reply_with_calculator
from dataloader import turn_end
from schema import GenerationConfig, ModelConfig

T = TypeVar("T")
MOST_STOPS = 4  # strings that the standard takes


def digest_of(generation: GenerationConfig) -> str:
    """Hash what is known of a served model: its name."""
    return hashlib.sha256(f"served {generation.model_name}".encode()).hexdigest()[:16]


def start(config: ModelConfig, generation: GenerationConfig, tokenizer: Any, stop: list[int], longest: int) -> Backend:
    """Return a function that asks the server for one batch, generation.concurrency requests at once."""
    assert generation.base_url is not None  # GenerationConfig asks for it
    server = Server(generation.base_url, generation.timeout, generation.retries)
    pauses = pause_ids(tokenizer, stop) if generation.calculator else []
    bias = _bias(tokenizer, stop)

    def ids_of(prompt: list[int], room: int, seed: int) -> list[int]:
        """Return the ids of one reply, its end included."""
        request = payload(generation, tokenizer, stop, prompt, room, seed) | {"logit_bias": bias}
        if not generation.retokenize:
            request["stop_token_ids"] = [*stop, *pauses]
        choice = choice_of(server, request)
        if generation.retokenize:
            return from_text(choice, tokenizer)[:room]
        return checked(choice, prompt, [*stop, *pauses], server.base_url)

    def batch(prompts: list[list[int]], seed: int, first: int) -> Iterator[Reply]:
        def ask(i: int) -> Reply:
            return cut(ids_of(prompts[i], generation.max_new_tokens, reply_seed(seed, i)), stop)

        return in_order(at_once(ask, range(first, len(prompts)), generation.concurrency, server.stopped), first)

    def speak(prompts: list[list[int]], rooms: list[int], seed: int) -> list[Piece]:
        def ask(i: int) -> Piece:
            return piece_of(ids_of(prompts[i], rooms[i], reply_seed(seed, i)), stop, pauses)

        said = dict(at_once(ask, range(len(prompts)), generation.concurrency, server.stopped))
        return [said[i] for i in range(len(prompts))]

    def calculating(prompts: list[list[int]], seed: int, first: int) -> list[Reply]:
        assert first == 0, "replies with the calculator are sampled as a whole batch"
        return reply_with_calculator(speak, tokenizer, prompts, generation.max_new_tokens, seed)

    return calculating if generation.calculator else batch


def payload(
    generation: GenerationConfig, tokenizer: Any, stop: list[int], prompt: list[int], room: int, seed: int
) -> dict[str, Any]:
    """Return the body of one request: the standard's fields, and vLLM's own where ids shall come back."""
    standard: dict[str, Any] = {
        "model": generation.model_name, "prompt": prompt, "max_tokens": room, "n": 1, "seed": seed,
        "temperature": generation.temperature, "top_p": generation.top_p,
    }  # fmt: skip
    if generation.retokenize:
        return standard | {"stop": [tokenizer.convert_ids_to_tokens(i) for i in stop[:MOST_STOPS]]}
    return standard | {
        "top_k": max(0, generation.top_k), "ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False,
        "add_special_tokens": False,
    }  # fmt: skip


def choice_of(server: Server, request: dict[str, Any]) -> dict[str, Any]:
    """Ask and return the one reply; ValueError if there is none, or none that ended by itself or by its length."""
    answer = server.post("/completions", request)
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"{server.base_url}/completions answers without choices: {str(answer)[:300]}")
    reason = choices[0].get("finish_reason")
    if reason not in ("stop", "length"):
        raise ValueError(
            f"{server.base_url} broke a reply off (finish_reason={reason!r}). What is written is kept: the same command "
            "goes on from there"
        )
    return choices[0]


def checked(choice: dict[str, Any], prompt: list[int], ends: Sequence[int], base_url: str) -> list[int]:
    """Return the ids that came back; ValueError without any, with another prompt, or with an end that is none of ours."""
    ids = choice.get("token_ids")
    if ids is None:
        raise ValueError(
            f"{base_url} gives no token ids back (vLLM's server does: return_token_ids). generation.retokenize=true "
            "tokenises its text instead, which may give other ids than were sampled, and marks the rows"
        )
    theirs = choice.get("prompt_token_ids") or prompt
    if theirs != prompt:
        raise ValueError(f"{base_url} changed the prompt's ids from {prompt[:8]}... to {theirs[:8]}...")
    if choice["finish_reason"] == "stop" and (not ids or ids[-1] not in ends):
        raise ValueError(f"{base_url} ended a reply at id {ids[-1:]}, which is none of the stop ids {list(ends)[:8]}")
    return ids


def from_text(choice: dict[str, Any], tokenizer: Any) -> list[int]:
    """Tokenise the text of a reply; one that ended gets the id that ends a turn."""
    text = choice.get("text")
    if not isinstance(text, str):
        raise ValueError(f"a reply has no text: {str(choice)[:300]}")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = turn_end(tokenizer).id
    return [*ids, end] if choice["finish_reason"] == "stop" and end is not None else ids


def at_once(
    ask: Callable[[int], T], numbers: Sequence[int], concurrency: int, stopped: threading.Event
) -> Iterator[tuple[int, T]]:
    """Yield (number, ask(number)) as each is there, `concurrency` at once; the first failure is raised.

    What is there by then is yielded before it. The threads are daemons: an interrupted run waits for no reply.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    there: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for number in numbers:
        todo.put(number)

    def work() -> None:
        while not stopped.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                there.put((number, ask(number)))
            except Exception as error:  # raised again below
                there.put((number, error))
                return

    for _ in range(min(concurrency, len(numbers))):
        threading.Thread(target=work, daemon=True).start()
    for _ in numbers:
        number, result = there.get()
        if isinstance(result, Exception):
            stopped.set()
            while not there.empty():
                other = there.get()
                if not isinstance(other[1], Exception):
                    yield other
            raise result
        yield number, result


def _bias(tokenizer: Any, stop: list[int]) -> dict[str, float]:
    """Return the bias that forbids special tokens that end no turn, by id as text."""
    forbidden = forbidden_ids(tokenizer, stop, len(tokenizer), len(tokenizer)).nonzero().flatten().tolist()
    return {str(i): FORBIDDEN for i in forbidden}
