"""The pieces of work of an evaluation: batches of prompts to answer, at a temperature, and of pairs to rank."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import models
from dataloader import Example
from evaluation.asked import Asked, answer, pair_logps
from evaluation.harness import benchmark_metrics
from evaluation.majority import majority_temperature, vote_settings
from evaluation.matched import Matched, matched_temperature, mean_entropy
from evaluation.pieces import Ledger, Piece, key_of
from evaluation.records import main_temperature
from evaluation.turns import later_turns
from generation.interface import length_batches
from settings.schema import EvaluationConfig


def batches_to_answer(prompts: list[Example], size: int) -> list[list[int]]:
    """Return the prompts of each batch by number; longest first, so batches are alike."""
    return length_batches([row.prompt for row in prompts], size)


def pair_batches(num_pairs: int, batch_size: int) -> list[range]:
    """Return the pairs of each batch by number, in their order."""
    return [range(start, min(start + batch_size, num_pairs)) for start in range(0, num_pairs, batch_size)]


class Work(NamedTuple):
    """The pieces of one model; a pass is every prompt once, at a temperature, as the k-th vote (0: the main pass)."""

    passes: dict[tuple[float, int], list[Piece]]
    benchmarks: list[Piece]
    pairs: list[Piece]
    reference_pairs: list[Piece]

    @property
    def every(self) -> list[Piece]:
        """Return all pieces, those of one model together."""
        answers = [piece for pieces in self.passes.values() for piece in pieces]
        return [*answers, *self.benchmarks, *self.pairs, *self.reference_pairs]


def answer_pieces(asked: Asked, prompts: list[Example], temperature: float, k: int, facts: list[Any]) -> list[Piece]:
    """Return a piece for each batch of prompts, answered at a temperature for the k-th time."""
    config, pieces = asked.settings.evaluation, []
    seed = vote_settings(asked.settings, k).run.seed
    for number, batch in enumerate(batches_to_answer(prompts, config.batch_size)):
        rows = [prompts[i] for i in batch]
        own = seed * 1_000_003 + number * config.batch_size
        sampling = [temperature, own, config.max_new_tokens, config.calculator]
        turns = [later_turns(row.conversation) for row in rows]
        key = key_of("answers and entropies", facts, [row.prompt for row in rows], turns, sampling)
        pieces.append(Piece(key, partial(answer, asked, rows, temperature, own)))
    return pieces


def matched_temperatures(asked: dict[str, Asked], ledger: Ledger, show: bool) -> dict[str, Matched]:
    """Return the temperature of each model whose token entropy is the reference's; empty without match_entropy.

    A model's search is one piece: its trials follow each other.
    """
    config = next(iter(asked.values())).settings.evaluation
    reference, main = config.match_entropy, main_temperature(config.temperatures)
    if reference is None or main is None:
        return {}

    def entropy_of(one: Asked, temperature: float) -> float:
        pieces = answer_pieces(one, one.data.validation, temperature, 0, [])
        return mean_entropy([answer for piece in pieces for answers in piece.work() for answer in answers])

    def shared(names: Sequence[str], key: Sequence[Any], work: Callable[[Asked], Any]) -> list[Any]:
        pieces = []
        for name in names:
            one = asked[name]
            decisive = [config.max_new_tokens, config.calculator, config.batch_size, one.settings.run.seed]
            prompts = [row.prompt for row in one.data.validation]
            pieces.append(Piece(key_of(*key, one.facts, prompts, decisive), partial(work, one)))
        for name, piece in zip(names, pieces, strict=True):
            ledger.share([piece], f"matching {name}" if show else "")
            asked[name].loaded = ("", None)
        ledger.wait(pieces)
        return ledger.answers(pieces)

    target = shared([reference], ["entropy", main], lambda one: entropy_of(one, main))[0]
    others = [name for name in asked if name != reference]
    found = shared(others, ["match", target], lambda one: matched_temperature(partial(entropy_of, one), target))
    return {reference: Matched(main, target, target, [])} | {
        name: Matched(*fields) for name, fields in zip(others, found, strict=True)
    }


def work_of(asked: Asked, matched: Matched | None) -> Work:
    """Return what one model is asked for."""
    settings, config, data, facts = asked.settings, asked.settings.evaluation, asked.data, asked.facts
    passes = {
        (temperature, k): answer_pieces(asked, data.prompts, temperature, k, facts)
        for temperature, k in _passes(config, matched.temperature if matched else None)
    }
    benchmarks = []
    if config.lm_eval:
        key = key_of("lm_eval", facts, settings.run.seed, settings.raw["evaluation"], settings.raw["model"])
        benchmarks = [Piece(key, lambda: benchmark_metrics(settings, asked.model(), asked.tokenizer))]
    reference = config.reference.get(asked.name)
    own_pairs = _pair_pieces(asked, config.models[asked.name], facts) if config.reward_accuracy else []
    theirs = _pair_pieces(asked, reference, facts) if config.reward_accuracy and reference else []
    return Work(passes, benchmarks, own_pairs, theirs)


def _passes(config: EvaluationConfig, matched: float | None) -> list[tuple[float, int]]:
    """Return (temperature, k) of every pass over the prompts, each once; a sample votes, too."""
    temperatures = [*config.temperatures, *([] if matched is None else [matched])]
    found = [(t, k) for t in temperatures for k in range(config.n_samples if t > 0 else 1)]
    votes = range(1, config.majority or 0) if config.verifier else range(0)
    return list(dict.fromkeys(found + [(majority_temperature(config.temperatures), k) for k in votes]))


def _pair_pieces(asked: Asked, source: str, facts: list[Any]) -> list[Piece]:
    """Return a piece for each batch of pairs, whose log-probabilities the model of `source` gives."""
    pairs, pieces = asked.data.pairs, []
    for batch in pair_batches(len(pairs), asked.settings.model.eval_batch_size):
        rows = [pairs[i] for i in batch]
        tokens = [[t.ids, t.response] for row in rows for t in (row.chosen, row.rejected) if t is not None]

        def logps(rows: list[Example] = rows) -> list[list[float]]:
            return pair_logps(asked.model(source), asked.tokenizer, rows).tolist()

        pieces.append(Piece(key_of("pairs", models.model_digest(source), facts, tokens), logps))
    return pieces
