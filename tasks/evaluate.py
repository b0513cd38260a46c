"""task=evaluate: judge several models on the same held-out prompts and pairs.

Writes into the run's folder (report/evaluation_page.py):

    results.json, results.md      metrics with 95 % intervals over prompts, comparisons; the table
    scores.json, samples.jsonl    every prompt's score, for paired comparisons later; responses side by side
    summary.md, report.html       all of it, to read
    latency.json                  with evaluation.latency

With several processes each asks every model for its share of the batches; rank 0 puts them together and writes. What
is answered stands in answers.jsonl until the end: a killed run goes on there.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import models
from dataloader import Example, collate, load_examples
from engine.meter import Meter
from engine.processes import Apart
from evaluation.costs import entry_of
from evaluation.harness import benchmark_metrics, check_benchmarks
from evaluation.intervals import score_interval
from evaluation.latency import check_latency, latency_rows
from evaluation.majority import majority_scores, majority_temperature, vote_settings
from evaluation.matched import Matched, matched_temperature, mean_entropy, split_off
from evaluation.pieces import Ledger, Piece, key_of
from evaluation.records import Evaluated, Responses, main_temperature, verified
from evaluation.results import results_of, table, verdicts_of
from evaluation.served import check_served, from_server, served_names, server_facts
from evaluation.turns import Answered, in_turns, later_turns
from functional import row_sums, token_logps
from generation.hf import sample_watched
from generation.interface import length_batches
from report.evaluation_page import check_advantages, write_results
from rewards.verifiers import Verifier, prompt_text, resolve_verifier, vote_of
from settings.parts import Parts
from settings.schema import EvaluationConfig, GenerationConfig, Settings


class HeldOut(NamedTuple):
    """What the models are judged on: prompts to answer, pairs to rank, prompts that choose matched temperatures."""

    prompts: list[Example]
    pairs: list[Example]
    validation: list[Example]


# ---- inputs


def check_request(config: EvaluationConfig) -> None:
    """Refuse what cannot be evaluated, before any model loads."""
    if any(temperature < 0 for temperature in config.temperatures):
        raise ValueError(f"evaluation.temperatures={config.temperatures}: none may be negative (0 is greedy)")
    if config.verifier and not config.temperatures:
        raise ValueError(
            "evaluation.verifier scores responses, but evaluation.temperatures is empty: give one, e.g. [1.0]"
        )
    if not (config.temperatures or config.reward_accuracy or config.latency or config.lm_eval):
        raise ValueError("nothing to evaluate: give evaluation.temperatures, or evaluation.reward_accuracy=true")
    if config.opponent and not (config.verifier or config.reward_model or config.judge):
        raise ValueError(
            f"evaluation.opponent={config.opponent!r} needs somebody who decides who wins: evaluation.verifier, "
            "evaluation.reward_model or "
            "evaluation.judge=true"
        )
    if config.reward_model and config.judge:
        raise ValueError("evaluation.reward_model and evaluation.judge=true both decide who wins: keep one")
    if (config.reward_model or config.judge) and not config.temperatures:
        raise ValueError(
            "evaluation.reward_model and evaluation.judge look at responses, but evaluation.temperatures is empty"
        )
    if config.majority and not any(config.temperatures):
        raise ValueError(
            f"evaluation.majority={config.majority} needs a temperature above 0 in evaluation.temperatures to sample at"
        )


def held_out(settings: Settings, tokenizer: Any) -> HeldOut:
    """Load the test split of every data set; n_eval_examples limits each of them.

    Rows with a prompt alone are the prompts to answer; where there are none, the prompts of all rows are.
    """
    run = settings.run
    rows: list[Example] = []
    for name, config in settings.datasets.items():
        rows += load_examples(
            {name: config},
            "test",
            tokenizer,
            settings.model,
            run.n_eval_examples,
            run.seed,
            run.tokens_dir,
            run.num_proc,
        )
    if not rows:
        raise ValueError("no held-out rows: set datasets.NAME.test to a file, a folder or hub_name:split")
    pairs = [row for row in rows if row.chosen is not None and row.rejected is not None]
    if settings.evaluation.reward_accuracy and not pairs:
        raise ValueError("evaluation.reward_accuracy=true needs held-out pairs: no test row has chosen and rejected")
    prompts = [row for row in rows if row.chosen is None and row.response is None] or rows
    if settings.evaluation.match_entropy is None:
        return HeldOut(prompts, pairs, [])
    scored, validation = split_off(len(prompts), settings.evaluation.match_prompts, run.seed)
    return HeldOut([prompts[i] for i in scored], pairs, [prompts[i] for i in validation])


# ---- one model


def batches_to_answer(prompts: list[Example], size: int) -> list[list[int]]:
    """Return the prompts of each batch by number; longest first, so batches are alike."""
    return length_batches([row.prompt for row in prompts], size)


def answer(asked: "Asked", rows: Sequence[Example], temperature: float, seed: int) -> list[list[Answered]]:
    """Answer each prompt of a batch, and the turns that follow it, from the whole distribution.

    With each answer comes the entropy that it was drawn with.
    """
    config, tokenizer = asked.settings.evaluation, asked.tokenizer
    generation: GenerationConfig = replace(
        asked.settings.generation,
        n=1,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        calculator=config.calculator,
    )
    if asked.is_served:
        sample = from_server(asked.settings, generation, tokenizer, models.stop_ids_of(asked.own, tokenizer), seed)
    else:
        model = asked.model()
        stop = models.stop_ids(tokenizer, model)

        def sample(ids: list[list[int]]) -> list[Answered]:
            return list(sample_watched(model, tokenizer, ids, generation, stop, len(tokenizer), seed))

    conversations = [row.conversation for row in rows]
    longest = asked.settings.model.max_prompt_length
    return in_turns(sample, tokenizer, [row.prompt for row in rows], conversations, longest)


def pair_batches(num_pairs: int, batch_size: int) -> list[range]:
    """Return the pairs of each batch by number, in their order."""
    return [range(start, min(start + batch_size, num_pairs)) for start in range(0, num_pairs, batch_size)]


@torch.no_grad()
def pair_logps(model: Any, tokenizer: Any, pairs: list[Example]) -> np.ndarray:
    """Return log p(chosen) and log p(rejected) of each pair of one batch, [P, 2] float64."""
    device = next(model.parameters()).device
    tokens = [row.chosen for row in pairs if row.chosen] + [row.rejected for row in pairs if row.rejected]
    sequences = collate(tokens, tokenizer.pad_token_id).to(device)
    logits, targets, rows = models.response_logits(model, sequences, len(tokenizer))
    sums = row_sums(token_logps(logits, targets), rows, len(tokens))
    return sums.double().cpu().numpy().reshape(2, len(pairs)).T


def rank_pairs(logps: np.ndarray, reference_logps: np.ndarray | None, reference: str | None) -> dict[str, Any]:
    """Return the share of pairs ranked right and the mean margin in nats, before any factor beta.

    logps [P, 2]. With a reference the reward is the log-ratio to it; without one the metrics are those of the plain
    log-probability, and are named so. An exact tie is not ranked right.
    """
    name = "reward" if reference_logps is not None else "logprob"
    rewards = logps - reference_logps if reference_logps is not None else logps
    margins = rewards[:, 0] - rewards[:, 1]
    right = (margins > 0).astype(float).tolist()
    metrics = {
        f"{name}_accuracy": float(np.mean(right)),
        f"{name}_accuracy_ci95": list(score_interval(right)),
        f"{name}_margin": float(margins.mean()),
        "num_pairs": len(right),
    }
    return {**metrics, "reference": reference} if reference else metrics


class Asked:
    """A model that is evaluated: its data, and its weights once a batch needs them."""

    def __init__(self, settings: Settings, name: str, device: torch.device) -> None:
        self.settings, self.name, self.device = settings, name, device
        self.is_served = name in served_names(settings)
        self.own = settings.model.of_folder(settings.evaluation.models[name])
        self.dtype = models.resolve_dtype(self.own.policy_dtype, device)
        self.tokenizer = models.load_tokenizer(self.own)
        self.data = held_out(settings, self.tokenizer)
        self.loaded: tuple[str, Any] = ("", None)  # one model at a time

    def model(self, source: str | None = None) -> Any:
        """Return the model, or another folder's in the same precision, on this process's device."""
        source = source or self.settings.evaluation.models[self.name]
        if self.loaded[0] != source:
            self.loaded = ("", None)
            model: Any = models.load_model(self.own.of_folder(source), dtype=self.dtype, trainable=False)
            self.loaded = (source, model.to(self.device))
        return self.loaded[1]

    @property
    def facts(self) -> list[Any]:
        """Return what decides the model's answers, beside prompts and sampling."""
        return [
            models.model_digest(self.settings.evaluation.models[self.name]),
            models.tokenizer_digest(self.tokenizer),
            models.stop_ids_of(self.own, self.tokenizer),
            str(self.dtype),
            self.device.type,
            *(server_facts(self.settings.generation) if self.is_served else []),
        ]


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


def evaluated(
    asked: Asked, work: Work, ledger: Ledger, verifier: Verifier | None, matched: Matched | None
) -> Evaluated:
    """Put a model's pieces together."""
    config, data, tokenizer = asked.settings.evaluation, asked.data, asked.tokenizer
    order = [i for batch in batches_to_answer(data.prompts, config.batch_size) for i in batch]

    def answered(temperature: float, k: int) -> Responses:
        batches = ledger.answers(work.passes[temperature, k])
        found = [[tuple(answer) for answer in answers] for batch in batches for answers in batch]
        samples = dict(zip(order, found, strict=True))
        judge = verifier if k < config.n_samples else None
        return verified([samples[i] for i in range(len(order))], tokenizer, data.prompts, judge, temperature == 0)

    conversations = [row.conversation for row in data.prompts]
    passes = {key: answered(*key) for key in work.passes}
    responses = {temperature: found for (temperature, k), found in passes.items() if k == 0}
    more = {t: [passes[t, k] for k in range(1, config.n_samples)] for t in responses if t > 0}
    votes: list[float] = []
    if config.majority and verifier is not None:
        voting = majority_temperature(config.temperatures)
        votes = majority_scores([passes[voting, k].texts for k in range(config.majority)], conversations, verifier)
    metrics: dict[str, Any] = {}
    if config.reward_accuracy:
        reference = config.reference.get(asked.name)
        logps = np.concatenate(ledger.answers(work.pairs))
        reference_logps = np.concatenate(ledger.answers(work.reference_pairs)) if reference else None
        metrics = rank_pairs(logps, reference_logps, reference)
    benchmarks = ledger.answers(work.benchmarks)[0] if work.benchmarks else {}
    prompts = [prompt_text(c.prompt) for c in conversations]
    timed = latency_rows(asked.settings, asked.own, asked.model(), tokenizer, data.prompts) if config.latency else []
    return Evaluated(prompts, conversations, responses, metrics, votes, timed, benchmarks, more, matched)


def run(settings: Settings) -> None:
    """Judge every model of evaluation.models and write the results into the run's folder."""
    config, meter = settings.evaluation, Meter()
    check_request(config)
    check_served(settings)
    verifier = resolve_verifier(config.verifier) if config.verifier else None
    if config.majority and verifier:
        vote_of(verifier)  # refuses a module without one
    check_benchmarks(config)
    check_advantages(config)
    process = Apart()
    check_latency(config, process.world_size)
    if settings.run.strategy not in ("auto", "none", "ddp"):
        raise ValueError(
            f"strategy={settings.run.strategy}: task=evaluate gives every process whole models of its own. "
            "Leave strategy=auto"
        )
    parts = Parts(settings.run.run_dir / "answers.jsonl", process.rank)
    ledger = Ledger(parts, process.rank, process.world_size)
    asked = {name: Asked(settings, name, process.device) for name in config.models}
    matched = matched_temperatures(asked, ledger, process.is_main)
    works: dict[str, Work] = {}
    for name, one in asked.items():
        works[name] = work_of(one, matched.get(name))
        ledger.share(works[name].every, f"asking {name}" if process.is_main else "")
        one.loaded = ("", None)
    if not process.is_main:
        return
    ledger.wait(piece for work in works.values() for piece in work.every)
    found = {name: evaluated(asked[name], works[name], ledger, verifier, matched.get(name)) for name in works}
    first = next(iter(works))
    for name in works:
        if found[name].prompts != found[first].prompts:
            raise ValueError(
                f"{name} and {first} kept different held-out prompts (another tokenizer drops other rows): "
                "raise model.max_prompt_length and model.max_length"
            )
    results = results_of(settings, found, verdicts_of(settings, found))
    cost = entry_of(found, settings.run.run_dir, meter.seconds, process.world_size, process.device.type)
    write_results(settings, results, found, cost)
    print(f"\n{table(results)}\n{settings.run.run_dir / 'results.json'}", flush=True)
    parts.remove()
