"""Questions of several turns (MT-bench): a turn is asked when the model has answered the one before it.

Letters: Q questions of a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

from conversations import Conversation, Message, turn_text
from dataloader import encode_prompt

# Token ids, stop or length, sum of the tokens' entropies in nats (None of a server, which does not say).
Answered = tuple[list[int], str, float | None]
Sample = Callable[[list[list[int]]], list[Answered]]  # prompts as ids -> an answer to each


def later_turns(conversation: Conversation) -> list[str]:
    """Return what a question asks after its first turn."""
    turns = conversation.meta.get("turns") if "question_id" in conversation.meta else None
    return [turn_text(turn) for turn in turns[1:]] if isinstance(turns, list) else []


def messages_before_last(prompt: list[Message], later: Sequence[str], said: Sequence[str]) -> list[Message]:
    """Return the messages that the last of the answers `said` follows: the prompt, then answer and turn by turns."""
    messages = list(prompt)
    for answer, turn in zip(said[:-1], later, strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    return messages


def dialog(later: Sequence[str], said: Sequence[str]) -> str:
    """Write all that follows the first turn as one text, as a judge is shown it; the answer alone where it is one."""
    text = said[0]
    for turn, answer in zip(later, said[1:], strict=True):
        text += f"\n\n[User]\n{turn}\n\n[Assistant]\n{answer}"
    return text


def body_text(tokenizer: Any, answer: Sequence[Any]) -> str:
    """Decode a response without its end-of-turn token."""
    ids, reason = answer[0], answer[1]
    return str(tokenizer.decode(ids[:-1] if reason == "stop" else ids, skip_special_tokens=True))


def in_turns(
    sample: Sample, tokenizer: Any, prompts: list[list[int]], asked: Sequence[Conversation], longest: int
) -> list[list[Answered]]:
    """Return every question's answers [Q][turns]: all first turns at once, then those that have a second, and so on."""
    return go_on(sample, tokenizer, sample(prompts), asked, longest)


def go_on(
    sample: Sample, tokenizer: Any, first: Sequence[Answered], asked: Sequence[Conversation], longest: int
) -> list[list[Answered]]:
    """Return every question's answers [Q][turns] where the first of each is known.

    longest: tokens that a prompt may have; ValueError for a later one that has more: nothing is cut here.
    """
    later = [later_turns(conversation) for conversation in asked]
    answers = [[answer] for answer in first]
    for number in range(1, 1 + max(map(len, later), default=0)):
        going_on = [i for i, turns in enumerate(later) if len(turns) >= number]
        ids = []
        for i in going_on:
            said = [*(body_text(tokenizer, answer) for answer in answers[i]), ""]
            ids.append(encode_prompt(tokenizer, messages_before_last(asked[i].prompt, later[i], said)))
            if len(ids[-1]) > longest:
                raise ValueError(
                    f"turn {number + 1} of question {asked[i].meta.get('question_id')} has a prompt of {len(ids[-1])} "
                    f"tokens with what was said before: raise model.max_prompt_length={longest}"
                )
        for i, answer in zip(going_on, sample(ids), strict=True):
            answers[i].append(answer)
    return answers
