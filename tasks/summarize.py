"""task=summarize: pool evaluations of the same models, one a seed (task=report compares the runs of a sweep instead).

evaluation.models names the folders of task=evaluate. Writes results.json, results.md and report.html.
Two intervals stand side by side. Over prompts: the same models, other prompts. Over seeds: other data, another
initialization; it is the wider one and counts for a claim about a method.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.intervals import paired_difference, score_interval, seed_interval
from evaluation.markdown import markdown, span
from evaluation.matched import MATCHED
from evaluation.metrics import DIGITS, METRICS, PASSES, at, interval_over_seeds, is_number, present, put
from evaluation.verdict import pooled_verdict
from report.gather import Evaluation, advantages_of, curves_of, read_evaluation, samples_of
from report.page import write_report
from report.tables import metric_sections
from settings.artifacts import write_json, write_text
from settings.schema import Settings
from settings.typed import nearest

OTHERS = "other_temperatures"  # of a model's entry, as task=evaluate writes it


def pooled(evaluations: list[Evaluation], temperature: str, model: str, decoded: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the table and the report show of a model over seeds: every metric that all seeds have.

    The score is that of all prompts, with its interval over prompts (ci95). Any metric has an interval over seeds.
    `decoded` leads to the entry below the model's own that these scores belong to: greedy, majority, another
    temperature.
    """
    by_seed = {e.seed: e.scores[temperature][model] for e in evaluations}
    means = [sum(scores) / len(scores) for scores in by_seed.values()]
    everything = [score for scores in by_seed.values() for score in scores]
    across = interval_over_seeds(METRICS[0].unit, means, everything)
    entries = [e.results["models"][model] for e in evaluations]
    for name in decoded:
        entries = [entry.get(name) or {} for entry in entries]
    found = pooled_metrics(entries)
    return found | {
        "score": sum(means) / len(means),
        "ci95": list(score_interval(everything)),
        "ci95_over_seeds": list(across) if across else None,
        "n": len(everything),
        "seeds": list(by_seed),
        "per_seed": {str(seed): mean for seed, mean in zip(by_seed, means, strict=True)},
    }


def pooled_metrics(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and interval over seeds of each metric that every seed's entry has; one seed keeps its own intervals.

    The means stand where an evaluation has its values, the intervals under `over_seeds`, by the metric's key.
    """
    found: dict[str, Any] = {"over_seeds": {}}
    for metric in METRICS:
        values = [at(entry, metric.key) for entry in entries]
        if metric.pool != "seeds" or not all(map(is_number, values)):
            continue
        put(found, metric.key, sum(values) / len(values))
        across = interval_over_seeds(metric.unit, values)
        if across:
            found["over_seeds"][metric.key] = list(across)
        elif metric.interval and at(entries[0], metric.interval):
            put(found, metric.interval, at(entries[0], metric.interval))
    return found


def compared(evaluations: list[Evaluation], temperature: str, first: str, second: str) -> dict[str, Any]:
    """Return the difference of two models' scores on the same prompts, with both intervals."""
    pairs = [(e.scores[temperature][first], e.scores[temperature][second]) for e in evaluations]
    difference, interval = paired_difference([x for a, _ in pairs for x in a], [x for _, b in pairs for x in b])
    shares = all(0 <= score <= 1 for pair in pairs for scores in pair for score in scores)
    means = [sum(a) / len(a) - sum(b) / len(b) for a, b in pairs]
    across = seed_interval(means, (-1.0, 1.0) if shares else None)
    return {
        "first": first,
        "second": second,
        "difference": difference,
        "ci95": list(interval),
        "ci95_over_seeds": list(across) if across else None,
    }


def pairs_of(comparisons: list[list[str]], names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of evaluation.comparisons both of whose models are there; ValueError where neither is."""
    for pair in comparisons:
        if not set(pair) & set(names):
            raise ValueError(
                f"evaluation.comparisons holds {pair}, and neither is an evaluated model.{nearest(pair[0], names)}"
            )
    return [(first, second) for first, second in comparisons if {first, second} <= set(names)]


def summarized(evaluations: list[Evaluation], comparisons: list[list[str]]) -> dict[str, Any]:
    """Return what results.json holds: scores at temperature 1 on top, greedy beside them, and the comparisons."""
    names, temperatures = list(evaluations[0].results["models"]), list(evaluations[0].scores)
    for e in evaluations[1:]:
        if list(e.results["models"]) != names or list(e.scores) != temperatures:
            raise ValueError(
                f"{e.folder} and {evaluations[0].folder} hold other models or temperatures: they cannot be pooled"
            )
    main = "1" if "1" in temperatures else temperatures[0]
    models = {name: pooled(evaluations, main, name) | {"temperature": float(main)} for name in names}
    keys = {"greedy": "0", "majority": "majority", MATCHED: MATCHED}
    for decoded, key in keys.items():
        for name in scored_in_all(evaluations, key):
            models[name][decoded] = pooled(evaluations, key, name, (decoded,))
    others = [key for key in temperatures if key not in (main, *keys.values())]
    for name in names if others else ():
        models[name][OTHERS] = {key: pooled(evaluations, key, name, (OTHERS, key)) for key in others}
    pairs = pairs_of(comparisons, names)

    def differences(key: str) -> list[dict[str, Any]]:
        there = set(scored_in_all(evaluations, key))
        return [compared(evaluations, key, *pair) for pair in pairs if set(pair) <= there]

    results = {
        "models": models,
        "temperature": float(main),
        "comparisons": differences(main),
        **{f"{decoded}_comparisons": differences(key) for decoded, key in keys.items()},
        "other_comparisons": {key: differences(key) for key in others},
    }
    return {"verdict": pooled_verdict(results), **results}


def scored_in_all(evaluations: list[Evaluation], key: str) -> list[str]:
    """Return the models that have scores of this pass in every evaluation, in their order.

    At matched entropy a model may have none: no temperature gave the entropy.
    """
    first, *others = (e.scores.get(key, {}) for e in evaluations)
    return [name for name in first if all(name in scores for scores in others)]


# ---- tables


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown: the verdict, the scores, the differences, then every other metric."""
    said = results.get("verdict")
    return (
        (f"{said}\n\n" if said else "")
        + scores_table(results)
        + differences_text(results)
        + metrics_table(results["models"])
    )


def scores_table(results: dict[str, Any]) -> str:
    """Return the scores by seed and pooled with both intervals, sampled and in every other way of decoding."""
    first = next(iter(results["models"].values()))
    several = len(first["seeds"]) > 1
    others = list(first.get(OTHERS, {}))
    extra = [name for name in PASSES if any(name in row for row in results["models"].values())]
    head = ["model", *([f"seed {seed}" for seed in first["seeds"]] if several else [])]
    for words in (f"temperature {results['temperature']:g}", *(f"temperature {key}" for key in others), *extra):
        head += [words, "95 % over prompts"] + (["95 % over seeds"] if several else [])
    rows = [head]
    for name, row in results["models"].items():
        cells = [name, *([f"{score:.3f}" for score in row["per_seed"].values()] if several else [])]
        for part in (row, *(row[OTHERS][key] for key in others), *(row.get(name) for name in extra)):
            cells += [f"{part['score']:.3f}", span(part["ci95"])] if part else ["-", "-"]
            cells += [span(part and part["ci95_over_seeds"])] if several else []
        rows.append(cells)
    return markdown(rows)


def differences_text(results: dict[str, Any]) -> str:
    """Return the differences on the same prompts as lists, sampled and in every other way of decoding."""
    text = ""
    named = {f"temperature {results['temperature']:g}": results.get("comparisons", [])}
    named |= {f"temperature {key}": rows for key, rows in results.get("other_comparisons", {}).items()}
    named |= {name: results.get(f"{name}_comparisons", []) for name in PASSES}
    for title, rows in named.items():
        if rows:
            text += f"\nDifferences on the same prompts, {title}:\n\n"
        for row in rows:
            seeds = f", over seeds {span(row['ci95_over_seeds'], '+.3f')}" if row["ci95_over_seeds"] else ""
            pair = f"{row['first']} - {row['second']}: {row['difference']:+.3f}"
            text += f"- {pair}, 95 % {span(row['ci95'], '+.3f')}{seeds}\n"
    return text


def metrics_table(models: dict[str, dict[str, Any]]) -> str:
    """Return the other headline metrics, sampled, as means over seeds with their interval; empty without any."""
    metrics = [metric for metric in present(list(models.values())) if metric.headline and metric.pool == "seeds"]
    if not metrics:
        return ""
    rows = [["model", *(metric.label for metric in metrics)]]
    for name, entry in models.items():
        cells = [name]
        for metric in metrics:
            value, digits = at(entry, metric.key), f".{DIGITS[metric.unit]}f"
            ends = entry["over_seeds"].get(metric.key)
            cells.append("-" if value is None else f"{value:{digits}}" + (f" {span(ends, digits)}" if ends else ""))
        rows.append(cells)
    several = any(entry["over_seeds"] for entry in models.values())
    return f"\nOther metrics{', mean [95 % over seeds]' if several else ''}:\n\n{markdown(rows)}"


# ---- the report


def run(settings: Settings) -> None:
    """Pool the evaluations and write table and report into the run's folder."""
    folders = [Path(folder).expanduser() for folder in settings.evaluation.models.values()]
    evaluations = [read_evaluation(folder) for folder in folders]
    results = summarized(evaluations, settings.evaluation.comparisons)
    run_dir = settings.run.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "results.json", results)
    write_text(run_dir / "results.md", table(results))
    print(table(results))
    path = write_report(
        run_dir,
        "Summary over seeds",
        curves_of(evaluations),
        results,
        samples_of(evaluations[0]),
        advantages_of(evaluations[0]),
        {"who": metric_sections(results["models"])},
    )
    print(path, flush=True)
