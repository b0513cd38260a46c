"""The list of metrics: what results, tables, report pages, summaries over seeds and sweeps show of a model or a run.

To add one: compute it (e.g. in text_statistics.py) and name it here. Everything else reads this list.
A key with dots is a path into a model's entry of results.json: `judged.win_rate` is entry["judged"]["win_rate"].
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from evaluation.intervals import Interval, seed_interval

MORE, LESS, NEITHER = "more", "less", "neither"
BOUNDS = {"share": (0.0, 1.0)}  # by unit: what no value can leave, so no interval may
DIGITS = {"share": 3, "nats": 3, "number": 3, "tokens": 1, "words": 1, "count": 0}


class Metric(NamedTuple):
    """A number that a model, or a training run, gets."""

    key: str  # where it stands in a model's entry, or its name in metrics.jsonl
    label: str
    unit: str  # one of DIGITS
    better: str  # more | less | neither
    group: str  # which section of the report shows it: score, wins, pairs, text; training: a sweep's columns
    interval: str | None = None  # where its 95 % interval over prompts stands, by key
    pool: str = "seeds"  # over seeds: their mean; "prompts": the scores of all prompts, which scores.json has
    headline: bool = True  # stands in the short tables and in sweeps, too


METRICS = (
    Metric("score", "score", "share", MORE, "score", "ci95", "prompts"),
    Metric("win_rate", "win rate", "share", MORE, "wins", "against.win_rate_ci95"),
    Metric("judged.win_rate", "judged win rate", "share", MORE, "wins", "judged.win_rate_ci95"),
    Metric(
        "judged.length_controlled_win_rate",
        "judged at equal length",
        "share",
        MORE,
        "wins",
        "judged.length_controlled_ci95",
    ),
    Metric("judged.mean_reward", "mean reward", "number", MORE, "wins", headline=False),
    Metric("reward_accuracy", "reward accuracy", "share", MORE, "pairs", "reward_accuracy_ci95"),
    Metric("reward_margin", "reward margin, nats", "nats", MORE, "pairs"),
    Metric("logprob_accuracy", "log-prob accuracy", "share", MORE, "pairs", "logprob_accuracy_ci95"),
    Metric("logprob_margin", "log-prob margin, nats", "nats", MORE, "pairs"),
    Metric("num_pairs", "pairs", "number", NEITHER, "pairs", headline=False),
    *(
        Metric(
            f"samples.pass_at.{k}", f"pass@{k}", "share", MORE, "samples", f"samples.pass_at_ci95.{k}", headline=False
        )
        for k in (2**i for i in range(1, 11))
    ),
    Metric(
        "samples.distinct_right",
        "right ones differ",
        "share",
        MORE,
        "samples",
        "samples.distinct_right_ci95",
        headline=False,
    ),
    Metric(
        "samples.distance_right",
        "distance of right ones",
        "share",
        MORE,
        "samples",
        "samples.distance_right_ci95",
        headline=False,
    ),
    Metric("samples.diverse_prompts", "prompts with two right", "count", NEITHER, "samples", headline=False),
    Metric("match.temperature", "matched temperature", "number", NEITHER, "score", headline=False),
    Metric("generated_tokens", "generated to learn from", "count", NEITHER, "text"),
    Metric("scored_responses", "checked to learn from", "count", NEITHER, "text"),
    Metric("token_entropy", "token entropy, nats", "nats", NEITHER, "text"),
    Metric("mean_response_tokens", "tokens", "tokens", NEITHER, "text"),
    Metric("p50_response_tokens", "tokens p50", "tokens", NEITHER, "text", headline=False),
    Metric("p95_response_tokens", "tokens p95", "tokens", NEITHER, "text", headline=False),
    Metric("mean_response_words", "words", "words", NEITHER, "text", headline=False),
    Metric("eot_rate", "ended", "share", MORE, "text"),
    Metric("refusal_rate", "refused", "share", NEITHER, "text", "refusal_rate_ci95"),
    Metric("repeated_4grams", "repeated 4-grams", "share", LESS, "text"),
    Metric("loop_rate", "loops", "share", LESS, "text", "loop_rate_ci95"),
    Metric("empty_rate", "empty", "share", LESS, "text", headline=False),
)
TRAINING = (  # the last value that a run wrote of it into metrics.jsonl
    Metric("rewards_eval/accuracies", "held-out reward accuracy", "share", MORE, "training"),
    Metric("loss/eval", "held-out loss", "number", LESS, "training"),
    Metric("rewards_train/accuracies", "training reward accuracy", "share", MORE, "training"),
    Metric("loss/train", "training loss", "number", LESS, "training"),
)
PASSES = ("greedy", "majority", "matched")  # entries below a model's own: the same metrics, decoded in another way


def at(entry: Mapping[str, Any], key: str | None) -> Any:
    """Return what stands at a dotted key of an entry, None where there is nothing."""
    found: Any = entry
    for part in key.split(".") if key else ():
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if key else None


def put(entry: dict[str, Any], key: str, value: Any) -> None:
    """Write a value at a dotted key."""
    *parents, last = key.split(".")
    for part in parents:
        entry = entry.setdefault(part, {})
    entry[last] = value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Tell whether value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def present(entries: Sequence[Mapping[str, Any]], group: str | None = None) -> list[Metric]:
    """Return the metrics of a group, or of all, that at least one entry has."""
    return [
        metric
        for metric in METRICS
        if group in (None, metric.group) and any(is_number(at(entry, metric.key)) for entry in entries)
    ]


def values_in(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (key, value) of every headline metric of a model's entry; a pass goes before its key: `greedy.score`."""
    for prefix in ("", *(f"{name}." for name in PASSES)):
        for metric in METRICS:
            value = at(entry, prefix + metric.key)
            if metric.headline and is_number(value):
                yield prefix + metric.key, float(value)


def metric_of(key: str) -> Metric:
    """Return the metric of a key, whichever pass goes before it."""
    head, _, rest = key.partition(".")
    name = rest if head in PASSES else key
    found = next((metric for metric in (*TRAINING, *METRICS) if metric.key == name), None)
    assert found is not None, f"{key} is no metric of evaluation/metrics.py"
    return found


def interval_over_seeds(unit: str, means: Sequence[float], every: Sequence[float] = ()) -> Interval | None:
    """Return the interval of the mean over seeds; it stays where values of the unit lie.

    A verifier may give other numbers than shares. So bounds count where all means, and the prompts' scores that they
    are of (`every`), lie within them.
    """
    bounds = BOUNDS.get(unit)
    inside = bounds is not None and all(bounds[0] <= value <= bounds[1] for value in (*means, *every))
    return seed_interval(means, bounds if inside else None)
