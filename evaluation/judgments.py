"""Judgments that other tools wrote: Arena-Hard's verdicts in two games, MT-bench's scores and pairs.

Formats: lmarena/arena-hard-auto, model_judgment/JUDGE/MODEL.jsonl; lm-sys/FastChat, model_judgment/JUDGE_single.jsonl
and JUDGE_pair.jsonl. What a judge did not decide is counted as skipped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.intervals import score_interval
from settings.artifacts import read_jsonl

STRONG = 3  # games that a verdict of much better counts for, as Arena-Hard counts them
RESAMPLES = 2_000
VERDICTS = {  # (points of A, games)
    **dict.fromkeys(("A>>B", "B<<A"), (1.0, STRONG)),
    **dict.fromkeys(("A>B", "B<A"), (1.0, 1)),
    **dict.fromkeys(("A=B", "B=A"), (0.5, 1)),
    **dict.fromkeys(("A<B", "B>A"), (0.0, 1)),
    **dict.fromkeys(("A<<B", "B>>A"), (0.0, STRONG)),
}
UNDECIDED = -1  # MT-bench's score where a judgment held none


class Judged(NamedTuple):
    """What one file's rows say of one model: key of a question -> what stands for it."""

    kind: str  # arena: [points, games]; score: the scores of its turns; pair: points
    judge: str
    opponent: str | None
    questions: dict[str, list[Any]]
    skipped: int


def arena_points(row: Mapping[str, Any]) -> tuple[float, int] | None:
    """Return (points of the model, games) of an Arena-Hard row; None unless both games were decided.

    The baseline is A in the first game and B in the second one; a verdict of much better counts STRONG times.
    """
    first, second = (VERDICTS.get((game or {}).get("score") or "") for game in row["games"])
    if first is None or second is None:
        return None
    return (1 - first[0]) * first[1] + second[0] * second[1], first[1] + second[1]


def pair_points(row: Mapping[str, Any], model: str) -> float | None:
    """Return the points of a model in an MT-bench pair: a win in both orders is one, disagreement is a tie."""
    winners = [row["g1_winner"], row["g2_winner"]]
    if "error" in winners:
        return None
    if winners[0] != winners[1] or winners[0] == "tie":
        return 0.5
    return float(row[winners[0]] == model)


def _named(judge: Any) -> str:
    return str(judge if isinstance(judge, str) else " ".join(map(str, judge)))


def read_judgments(file: Path) -> dict[tuple[str, str, str | None, str], Judged]:
    """Read one file: {(kind, judge, opponent, model): Judged}; ValueError for a row of nobody's form."""
    found: dict[tuple[str, str, str | None, str], Judged] = {}

    def add(kind: str, row: Mapping[str, Any], model: str, opponent: str | None, value: Any) -> None:
        key = (kind, _named(row["judge"]), opponent, model)
        old = found.get(key) or Judged(kind, key[1], opponent, {}, 0)
        if value is not None:
            old.questions.setdefault(str(row.get("uid", row.get("question_id"))), []).append(value)
        found[key] = old._replace(skipped=old.skipped + (value is None))

    for number, row in enumerate(read_jsonl(file), 1):
        try:
            if "games" in row:
                add("arena", row, str(row["model"]), row.get("baseline"), arena_points(row))
            elif "g1_winner" in row:
                for side, other in (("model_1", "model_2"), ("model_2", "model_1")):
                    add("pair", row, str(row[side]), str(row[other]), pair_points(row, row[side]))
            else:
                score = float(row["score"])
                add("score", row, str(row["model"]), None, None if score == UNDECIDED else score)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}, row {number}: no judgment of Arena-Hard (model, judge, games) or MT-bench (model, judge, "
                f"score; model_1, model_2, g1_winner, g2_winner): {type(error).__name__} {error}"
            ) from error
    return found


def games_rate(questions: Sequence[tuple[float, int]], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Return points by games over all questions, and the bootstrap interval over questions."""
    values = np.asarray(questions, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = [values[rng.integers(len(values), size=len(values))].sum(axis=0) for _ in range(RESAMPLES)]
    low, high = np.quantile([points / games for points, games in drawn], [0.025, 0.975])
    points, games = values.sum(axis=0)
    return float(points / games), (float(low), float(high))


def entry_of(judged: Judged) -> dict[str, Any] | None:
    """Return what a report shows of judgments: value with its interval over questions; None where none was decided."""
    if not judged.questions:
        return None
    rows = list(judged.questions.values())
    if judged.kind == "arena":
        value, ends = games_rate([(sum(p for p, _ in row), sum(g for _, g in row)) for row in rows])
    else:
        value, ends = float(np.mean(sum(rows, []))), score_interval([float(np.mean(row)) for row in rows])
    return {
        "kind": judged.kind,
        "by": judged.judge,
        "opponent": judged.opponent,
        "value": value,
        "ci95": list(ends),
        "n": len(rows),
        "skipped": judged.skipped,
    }


def judgments_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read every .jsonl below a folder: {model: [entry, ...]}, judges in the order of their files."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.rglob("*.jsonl")):
        for (_, _, _, model), judged in read_judgments(file).items():
            entry = entry_of(judged)
            if entry:
                found.setdefault(model, []).append(entry)
    return found
