"""What is known of a model after it was asked: its responses by temperature, and its metrics."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from conversations import Conversation, Message
from dataloader import Example
from evaluation.matched import Matched, mean_entropy
from evaluation.turns import Answered, body_text, dialog, later_turns, messages_before_last
from rewards.verifiers import Verifier, surely_scored

Exchange = tuple[list[Message], str, bool]  # the messages before a response, the response, whether it ended


class Responses(NamedTuple):
    """One response to each held-out prompt, in their order; scores are empty without a verifier.

    Where questions have several turns, a text is all that was said after the first one (evaluation/turns.py).
    """

    texts: list[str]
    num_tokens: list[int]
    ended: list[bool]
    scores: list[float]
    # Mean over the tokens of the distributions they were drawn from, nats; None: greedy, or a server's.
    entropy: float | None = None
    turns: list[list[str]] = []  # the answer to every turn of each question; empty where all have one

    def last_exchanges(self, prompts: Sequence[list[Message]], turns: Sequence[Sequence[str]]) -> list[Exchange]:
        """Return what the last answer to each prompt follows, that answer, and whether it ended.

        turns: what is asked after the prompt, of each.
        """
        said = self.turns or [[text] for text in self.texts]
        asked = [messages_before_last(*row) for row in zip(prompts, turns, said, strict=True)]
        return list(zip(asked, [answers[-1] for answers in said], self.ended, strict=True))


class Evaluated(NamedTuple):
    """All that is known of one model: its responses by temperature, and its metrics on the pairs."""

    prompts: list[str]
    conversations: list[Conversation]
    responses: dict[float, Responses]
    pair_metrics: dict[str, Any]
    majority_scores: list[float] = []  # of the most frequent answer to each prompt, where it was asked for
    latency: list[dict[str, Any]] = []  # a row a backend and batch size
    benchmarks: dict[str, Any] = {}  # metrics of lm-evaluation-harness by task
    more: dict[float, list[Responses]] = {}  # further responses to every prompt, with evaluation.n_samples
    matched: Matched | None = None  # the temperature of evaluation.match_entropy

    def samples(self, temperature: float) -> list[Responses]:
        """Return all responses at a temperature, one list a sample."""
        return [self.responses[temperature], *self.more.get(temperature, [])]

    def scores(self, temperature: float | None) -> list[float]:
        """Return each prompt's score at a temperature, the mean over its samples; empty without any."""
        if temperature not in self.responses or not self.responses[temperature].scores:
            return []
        of_samples = [responses.scores for responses in self.samples(temperature)]
        return [sum(row) / len(row) for row in zip(*of_samples, strict=True)]

    def matched_scores(self) -> list[float]:
        """Return each prompt's score at matched entropy; empty without a temperature."""
        return self.scores(self.matched.temperature) if self.matched else []


def main_temperature(temperatures: Sequence[float]) -> float | None:
    """Return the temperature of the top-level score: 1 where it was asked for, else the first; None without any."""
    return 1.0 if 1.0 in temperatures else next(iter(temperatures), None)


def verified(
    samples: list[list[Answered]], tokenizer: Any, prompts: Sequence[Example], verifier: Verifier | None, greedy: bool
) -> Responses:
    """Decode the answers, without their end-of-turn tokens, and score them beside their prompts."""
    turns = [[body_text(tokenizer, answer) for answer in answers] for answers in samples]
    texts = [dialog(later_turns(row.conversation), said) for row, said in zip(prompts, turns, strict=True)]
    scores = []
    if verifier is not None:
        scores = [surely_scored(verifier, row.conversation, text) for row, text in zip(prompts, texts, strict=True)]
    lengths = [sum(len(ids) for ids, _, _ in answers) for answers in samples]
    ended = [all(reason == "stop" for _, reason, _ in answers) for answers in samples]
    every = [answer for answers in samples for answer in answers]
    drawn = [(ids, reason, nats) for ids, reason, nats in every if nats is not None]
    entropy = None if greedy or len(drawn) < len(every) else mean_entropy(drawn)
    several = any(len(said) > 1 for said in turns)
    return Responses(texts, lengths, ended, scores, entropy, turns if several else [])
