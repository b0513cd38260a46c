"""task=summarize: pool the evaluations of several seeds into one table with intervals, and write the report.

evaluation.models names the folders of task=evaluate, one a seed. Writes results.json, results.md and report.html.
Two intervals stand side by side: over prompts (the same models, other prompts) and over seeds (other data, other
initialization), which is the wider one and counts for a claim about a method.
"""

import json
from pathlib import Path
from typing import Any

from evaluation.intervals import paired_difference, score_interval, seed_interval
from report.gather import Evaluation, advantages_of, curves_of, read_evaluation, samples_of
from report.page import write_report
from settings.schema import Settings

# What the chain promises first; each pair is compared on the same prompts, where both models are there.
COMPARISONS = (
    ("teacher_dpo", "teacher_sft"),
    ("adpa_plus", "student_sft"),
    ("adpa_plus", "student_dpo"),
    ("adpa_plus", "student_dpo_nll"),
    ("adpa_plus", "dckd"),
    ("adpa_plus", "dckd_long"),
    ("adpa_plus", "adpa_plus_gamma0"),
    ("adpa", "student_sft"),
    ("dpo_st", "sft"),
    ("sft_1", "sft"),
    ("self_training", "sft"),
    ("sft_1", "self_training"),
    ("dpo_st", "sft_1"),
)


def pooled(evaluations: list[Evaluation], temperature: str, model: str) -> dict[str, Any]:
    """Return the mean over seeds of a model's score, its interval over prompts (ci95) and over seeds."""
    by_seed = {e.seed: e.scores[temperature][model] for e in evaluations}
    means = [sum(scores) / len(scores) for scores in by_seed.values()]
    everything = [score for scores in by_seed.values() for score in scores]
    across = seed_interval(means)
    return {
        "score": sum(means) / len(means),
        "ci95": list(score_interval(everything)),
        "ci95_over_seeds": list(across) if across else None,
        "n": len(everything),
        "seeds": list(by_seed),
        "per_seed": {str(seed): mean for seed, mean in zip(by_seed, means, strict=True)},
    }


def compared(evaluations: list[Evaluation], temperature: str, first: str, second: str) -> dict[str, Any]:
    """Return the difference of two models' scores on the same prompts, with both intervals."""
    pairs = [(e.scores[temperature][first], e.scores[temperature][second]) for e in evaluations]
    difference, interval = paired_difference([x for a, _ in pairs for x in a], [x for _, b in pairs for x in b])
    across = seed_interval([sum(a) / len(a) - sum(b) / len(b) for a, b in pairs])
    return {
        "first": first,
        "second": second,
        "difference": difference,
        "ci95": list(interval),
        "ci95_over_seeds": list(across) if across else None,
    }


def summarized(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Return what results.json holds: scores at temperature 1 on top, greedy beside them, and the comparisons."""
    names, temperatures = list(evaluations[0].results["models"]), list(evaluations[0].scores)
    for e in evaluations[1:]:
        if list(e.results["models"]) != names or list(e.scores) != temperatures:
            raise ValueError(
                f"{e.folder} and {evaluations[0].folder} judge other models or temperatures: they cannot be pooled"
            )
    main = "1" if "1" in temperatures else temperatures[0]
    models = {name: pooled(evaluations, main, name) for name in names}
    if "0" in temperatures:
        for name in names:
            models[name]["greedy"] = pooled(evaluations, "0", name)
    if "majority" in temperatures:
        for name in names:
            models[name]["majority"] = pooled(evaluations, "majority", name)
    pairs = [pair for pair in COMPARISONS if set(pair) <= set(names)]
    return {
        "models": models,
        "temperature": float(main),
        "comparisons": [compared(evaluations, main, *pair) for pair in pairs],
        "greedy_comparisons": [compared(evaluations, "0", *pair) for pair in pairs] if "0" in temperatures else [],
        "majority_comparisons": [compared(evaluations, "majority", *p) for p in pairs]
        if "majority" in temperatures
        else [],
    }


# ---- tables


def _span(interval: list[float] | None, digits: str = ".3f") -> str:
    return f"[{interval[0]:{digits}}, {interval[1]:{digits}}]" if interval else "-"


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown: per seed, pooled with both intervals, greedy; then the differences."""
    seeds = next(iter(results["models"].values()))["seeds"]
    several = len(seeds) > 1
    extra = [name for name in ("greedy", "majority") if name in next(iter(results["models"].values()))]
    sampled = f"temperature {results['temperature']:g}"
    head = ["model", *([f"seed {seed}" for seed in seeds] if several else []), sampled, "95 % over prompts"]
    head += ["95 % over seeds"] if several else []
    for name in extra:
        head += [name, "95 % over prompts"] + (["95 % over seeds"] if several else [])
    lines = [head, ["---"] * len(head)]
    for name, row in results["models"].items():
        cells = [name, *([f"{score:.3f}" for score in row["per_seed"].values()] if several else [])]
        for part in (row, *(row[name] for name in extra)):
            cells += [f"{part['score']:.3f}", _span(part["ci95"])] + (
                [_span(part["ci95_over_seeds"])] if several else []
            )
        lines.append(cells)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    titles = ((sampled, "comparisons"), ("greedy", "greedy_comparisons"), ("majority", "majority_comparisons"))
    for title, key in titles:
        rows = results.get(key, [])
        if rows:
            text += f"\nDifferences on the same prompts, {title}:\n\n"
        for row in rows:
            seeds_too = f", over seeds {_span(row['ci95_over_seeds'], '+.3f')}" if several else ""
            pair = f"{row['first']} - {row['second']}: {row['difference']:+.3f}"
            text += f"- {pair}, 95 % {_span(row['ci95'], '+.3f')}{seeds_too}\n"
    return text


# ---- the report


def run(settings: Settings) -> None:
    """Pool the evaluations and write table and report into the run's folder."""
    folders = [Path(folder).expanduser() for folder in settings.evaluation.models.values()]
    evaluations = [read_evaluation(folder) for folder in folders]
    results = summarized(evaluations)
    run_dir = settings.run.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (run_dir / "results.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    path = write_report(
        run_dir,
        "From a teacher to an aligned small student",
        curves_of(evaluations),
        results,
        samples_of(evaluations[0]),
        advantages_of(evaluations[0]),
    )
    print(path, flush=True)
