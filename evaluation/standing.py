"""Win rates and benchmarks in one table, and what they say together: a judge's win that a benchmark pays for.

Beside our own figures stand those of other tools, which results hold at `outside` of each model (report/outside.py).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evaluation.metrics import METRICS, Metric, at, is_number

KEYS = ("score", "win_rate", "judged.win_rate", "judged.length_controlled_win_rate", "judged.mean_reward")
TWO_SIDED = 1.96  # standard errors of a 95 % interval
MOST_NAMED = 3  # models that a sentence lists
FALLS, RISES, LEVEL = "falls", "rises", "level"


class Change(NamedTuple):
    """A benchmark of a model beside that of the one it is compared with; error: the difference's standard error."""

    task: str
    metric: str
    value: float
    other: float
    error: float | None
    kind: str  # falls | rises | level; level, too, where the library has no error


def base_of(results: Mapping[str, Any]) -> str | None:
    """Return the model that the others are compared with: the opponent, else the first one."""
    return results.get("opponent") or next(iter(results["models"]), None)


def change_of(task: str, metric: str, own: Mapping[str, Any], base: Mapping[str, Any]) -> Change:
    """Compare two models on a benchmark as if on other rows: the library keeps no scores of single rows.

    So the standard errors add, and a difference on the same rows is told later than it could be.
    """
    value, other = own["value"], base["value"]
    if own["stderr"] is None or base["stderr"] is None:
        return Change(task, metric, value, other, None, LEVEL)
    error = math.hypot(own["stderr"], base["stderr"])
    difference = (other - value) if own.get("higher_is_better") is False else (value - other)
    kind = LEVEL if abs(difference) <= TWO_SIDED * error else RISES if difference > 0 else FALLS
    return Change(task, metric, value, other, error, kind)


def changes_of(results: Mapping[str, Any], name: str) -> list[Change]:
    """Return a model's benchmarks beside those of the base; empty for the base itself, and without any."""
    base = base_of(results)
    if base is None or name == base:
        return []
    own, others = (results["models"][one].get("lm_eval") or {} for one in (name, base))
    return [
        change_of(task, metric, one, others[task]["metrics"][metric])
        for task, found in own.items()
        for metric, one in found["metrics"].items()
        if metric in (others.get(task) or {"metrics": {}})["metrics"]
    ]


def won(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return (wins over | loses to | is level with, by whom) of a model; None where nobody judged it."""
    judged = entry.get("judged") or entry.get("against")
    if not judged:
        return None
    low, high = judged["win_rate_ci95"]
    kind = "wins over" if low > 0.5 else "loses to" if high < 0.5 else "is level with"
    return kind, f"{judged['by']}, {judged['win_rate']:.3f} [{low:.3f}, {high:.3f}]"


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Say of every model whose benchmarks changed what it won and what it paid; then who changed nothing, in one."""
    said, level = [], []
    for name, entry in results["models"].items():
        changes, judged = changes_of(results, name), won(entry)
        told = [change for change in changes if change.kind != LEVEL]
        level += [name] if changes and not told else []
        before = f"{name} {judged[0]} {results['opponent']} ({judged[1]}) and" if judged else name
        for task, metric, value, other, error, kind in told:
            figures = f"{value:.3f} against {other:.3f} (difference {value - other:+.3f}, standard error {error:.3f})"
            said.append(f"{before} {kind} in {task} {metric}: {figures}.")
    if level:
        names = " or ".join(level) if len(level) <= MOST_NAMED else f"any of the {len(level)} others"
        said.append(f"No benchmark tells {names} from {base_of(results)}.")
    return said


def _columns(results: Mapping[str, Any]) -> list[tuple[str, Metric]]:
    found = {metric.key: metric for metric in METRICS}
    opponent = results.get("opponent")
    heads = []
    for key in KEYS:
        metric = found[key]
        if any(is_number(at(entry, key)) for entry in results["models"].values()):
            over = f" over {opponent}" if metric.group == "wins" and key != "judged.mean_reward" else ""
            heads.append((f"{metric.label}{over}", metric))
    return heads


def interval_text(value: Any, ends: Sequence[float] | None) -> str:
    """Write a value with its interval; a dash where there is none."""
    if not is_number(value):
        return "-"
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def outside_labels(results: Mapping[str, Any]) -> list[str]:
    """Return what other tools judged, each once, in the order of the models."""
    return list(dict.fromkeys(o["label"] for e in results["models"].values() for o in e.get("outside") or []))


def standing_cells(results: Mapping[str, Any]) -> list[list[str]]:
    """Return models x (score, win rates, other tools' figures, benchmarks) as rows of cells, the heads first.

    A benchmark's cell has its standard error, and a mark where it is told from the base's. Empty unless somebody
    decided who wins, or a benchmark was run.
    """
    models, columns, labels = results["models"], _columns(results), outside_labels(results)
    tasks = list(
        dict.fromkeys(
            (task, metric)
            for entry in models.values()
            for task, found in (entry.get("lm_eval") or {}).items()
            for metric in found["metrics"]
        )
    )
    if not (labels or tasks or len(columns) > 1):
        return []
    rows = [["model", *(head for head, _ in columns), *labels, *(f"{task} {metric}" for task, metric in tasks)]]
    marks = {FALLS: " ▼", RISES: " ▲", LEVEL: ""}
    for name, entry in models.items():
        kinds = {(change.task, change.metric): change.kind for change in changes_of(results, name)}
        row = [name, *(interval_text(at(entry, m.key), at(entry, m.interval)) for _, m in columns)]
        outside = {one["label"]: one for one in entry.get("outside") or []}
        row += [interval_text(outside.get(x, {}).get("value"), outside.get(x, {}).get("ci95")) for x in labels]
        for task, metric in tasks:
            one = at(entry, "lm_eval") and entry["lm_eval"].get(task, {"metrics": {}})["metrics"].get(metric)
            error = f" ± {one['stderr']:.3f}" if one and one["stderr"] is not None else ""
            row.append(f"{one['value']:.3f}{error}{marks[kinds.get((task, metric), LEVEL)]}" if one else "-")
        rows.append(row)
    return rows


NOTE = (
    "Win rates: 95 % over prompts, a tie counts half. Benchmarks: ± one standard error; ▼ falls and ▲ rises against "
    "the opponent (else the first model) by more than 1.96 standard errors of the difference. Other tools judge by "
    "their own rules."
)
