"""Majority of n: several sampled responses to each prompt vote, and the answer that most agree with is scored."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from conversations import Conversation
from evaluation.intervals import score_interval
from rewards.verifiers import majority_response, surely_scored, vote_of
from settings.schema import EvaluationConfig, Settings


def majority_temperature(temperatures: Sequence[float]) -> float:
    """Return the temperature at which votes are sampled: 1 where it was asked for, else the first above 0."""
    sampled = [temperature for temperature in temperatures if temperature > 0]
    return 1.0 if 1.0 in sampled else sampled[0]


def vote_settings(settings: Settings, k: int) -> Settings:
    """Return the settings of the k-th pass over the prompts: another seed, nothing else."""
    return replace(settings, run=replace(settings.run, seed=settings.run.seed + 10_007 * k))


def majority_scores(
    passes: list[list[str]], conversations: list[Conversation], verifier: Callable[..., float]
) -> list[float]:
    """Score, for each prompt, the response whose answer is the most frequent one over the passes."""
    vote = vote_of(verifier)
    return [
        surely_scored(verifier, conversation, majority_response(list(texts), vote))
        for conversation, texts in zip(conversations, zip(*passes, strict=True), strict=True)
    ]


def majority_metrics(config: EvaluationConfig, scores: list[float]) -> dict[str, Any]:
    """Return what results.json says of the majority: accuracy with its interval over prompts, votes, temperature."""
    return {
        "votes": config.majority,
        "temperature": majority_temperature(config.temperatures),
        "score": sum(scores) / len(scores),
        "ci95": list(score_interval(scores)),
        "n": len(scores),
    }
