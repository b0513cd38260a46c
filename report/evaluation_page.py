"""The readable side of task=evaluate: the files of task=evaluate in the run's folder."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from evaluation import comparisons, latency
from evaluation import harness as benchmarks
from evaluation.answer_files import answer_rows
from evaluation.bradley_terry import cells as strength_cells
from evaluation.costs import COST, cost_cells, own_cost
from evaluation.matched import MATCHED
from evaluation.records import Evaluated, main_temperature
from evaluation.results import markdown, samples_cells, table, temperature_cells
from evaluation.soundness import data_cells, findings
from evaluation.standing import NOTE, sentences, standing_cells
from evaluation.win_rate import alpaca_eval_rows
from models import local_source
from report.gather import NUM_SAMPLES, Evaluation, advantages_of, curves_of, samples_of, tokens_of
from report.markup import section, text
from report.outside import with_outside
from report.page import write_report
from report.tables import benchmarks_section, cells_section, html_table, latency_section, metric_sections
from settings.artifacts import read_json, write_json, write_jsonl, write_text
from settings.schema import EvaluationConfig, Settings
from teacher.cache import Reader
from teacher.quantities import Entry

TITLE = "Evaluation"
DATA = "data.json"  # what evaluation/soundness.py found
COST_NOTE = (
    "Summed over a model's own runs and those it came from: its start, generations, labels and selections. The "
    "training of its teachers, and responses that were scored inside of training, are not in it. Untimed: a "
    "run that left no record of its seconds."
)
MATCHED_NOTE = (
    "Entropy of a model: each other one at the temperature at which its tokens are as uncertain, chosen on prompts "
    "that are scored nowhere. What is left there of a lead at one temperature was not sharpening."
)
STRENGTHS_NOTE = (
    "The higher score of a prompt, or the verdict, wins; a tie is half a win. 400 points are odds of 10 to 1."
)


def summary_text(table: str, results: Mapping[str, Any], timed: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return summary.md: the verdict, the table, then what there is of comparisons, benchmarks and latency."""
    standing = markdown(standing_cells(results))
    parts = {
        "Win rates and benchmarks side by side": standing
        and standing + "".join(f"\n{one}\n" for one in sentences(results)),
        "Scores at every temperature": markdown(temperature_cells(results)),
        "Several responses to a prompt": markdown(samples_cells(results["models"])),
        "Differences on the same prompts": comparisons.table(results.get("comparisons") or []),
        "Differences on the same prompts, greedy": comparisons.table(results.get("greedy_comparisons") or []),
        "Differences on the same prompts, at matched entropy": comparisons.table(
            results.get("matched_comparisons") or []
        ),
        "Bradley-Terry strengths": markdown(strength_cells(results)),
        "lm-evaluation-harness": benchmarks.table(results["models"]),
        "Latency": latency.table(timed),
    }
    found = "".join(f"\n## {title}\n\n{part}" for title, part in parts.items() if part)
    judged = f"\n{table}" if table.count("|") > 3 * table.count("\n") else ""  # a table of names alone says nothing
    said = results.get("verdict")
    return f"# {TITLE}\n" + (f"\n{said}\n" if said else "") + f"{judged}{found}"


def check_advantages(config: EvaluationConfig) -> None:
    """Refuse an evaluation.advantages that is no finished cache of advantages, before a model loads."""
    if config.advantages is None:
        return
    quantity = Reader(config.advantages).meta.quantity
    if quantity != "advantage":
        raise ValueError(
            f"evaluation.advantages={config.advantages} caches {quantity}s: give one of task=cache "
            "cache.reference=FOLDER"
        )
    _reader_for(config.advantages, next(iter(config.models.values())))


def _reader_for(cache: str, model: str) -> tuple[Reader, Any]:
    """Open a cache with the tokenizer of a model; ValueError where they have other vocabularies."""
    reader = Reader(cache)
    tokenizer: Any = AutoTokenizer.from_pretrained(local_source(model), trust_remote_code=False)
    if reader.meta.vocab_size != len(tokenizer):
        raise ValueError(
            f"evaluation.advantages={cache} is over {reader.meta.vocab_size} tokens, the tokenizer of {model} has "
            f"{len(tokenizer)}"
        )
    return reader, tokenizer


def advantages_in(cache: str, model: str) -> list[dict[str, Any]]:
    """Return sequences of an advantage cache, decoded with the model's tokenizer, as the report takes them."""
    reader, tokenizer = _reader_for(cache, model)
    rows = []
    for ids, response in reader.sequences(NUM_SAMPLES):
        prompt = [token for token, on in zip(ids, response, strict=True) if not on]
        said = [token for token, on in zip(ids, response, strict=True) if on]
        tokens = tokens_of(tokenizer, said, Entry(**reader.get(ids, response)))
        rows.append({"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "tokens": tokens})
    return rows


def write_artifacts(
    run_dir: Path,
    table: str,
    results: dict[str, Any],
    timed: Mapping[str, Sequence[Mapping[str, Any]]],
    cache: str | None,
) -> None:
    """Write summary.md and report.html; samples.jsonl, cost.json and data.json stand there already.

    What other tools wrote into the folder stands beside our figures (report/outside.py).
    """
    results = with_outside(run_dir, results)
    write_text(run_dir / "summary.md", summary_text(table, results, timed))
    evaluation = Evaluation(run_dir, results["seed"], results, {})
    models = results["models"]
    spent = cells_section("spent", "What the models took", cost_cells(models), COST_NOTE)
    data = read_json(run_dir / DATA) or {"findings": [], "cells": []}
    who = cells_section("temperatures", "Scores at every temperature", temperature_cells(results), MATCHED_NOTE)
    who += cells_section("strengths", "Bradley-Terry strengths", strength_cells(results), STRENGTHS_NOTE)
    who += metric_sections(models, ("wins", "pairs", "samples")) + benchmarks_section(models)
    write_report(
        run_dir,
        TITLE,
        curves_of([evaluation]),
        results,
        samples_of(evaluation),
        advantages_in(cache, next(iter(models.values()))["folder"]) if cache else advantages_found(evaluation),
        {
            "who, first": cells_section("standing", "Side by side", standing_cells(results), NOTE),
            "who": who,
            "cost": own_section(own_cost(run_dir)) + spent + latency_section(timed),
            "changed": metric_sections(models, ("text",)),
            "data": held_out_section(data["findings"], data["cells"]),
        },
        {
            "who": sentences(results),
            "cost": [*said_of_costs(cost_cells(models)), *own_cost(run_dir)],
            "data": data["findings"],
        },
    )


def said_of_costs(cells: Sequence[Sequence[str]]) -> list[str]:
    """Say in a sentence how long each model was trained; empty for no cells."""
    return [f"Training: {'; '.join(f'{row[0]} {row[1]}' for row in cells[1:])}."] if cells else []


def own_section(said: Sequence[str]) -> str:
    """Write what the evaluation itself took; empty without its record."""
    return section("own", "This evaluation", "".join(f"<p>{text(one)}</p>" for one in said)) if said else ""


def held_out_section(findings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Write what was found of the held-out data, and how it is looked at more closely."""
    if not findings:
        return ""
    head, *rows = [[text(cell) for cell in row] for row in cells] or [[]]
    body = f"<ul>{''.join(f'<li>{text(one)}</li>' for one in findings)}</ul>"
    body += html_table("Held-out prompts in training rows", head, rows) if rows else ""
    note = "Rows themselves: launch.py task=inspect datasets=... ; a teacher's cache: task=audit."
    return section("held_out", "Held-out and training rows", f'{body}<p class="note">{text(note)}</p>')


def rewrite(run_dir: Path) -> None:
    """Write the pages of a finished evaluation again, with what other tools put into its folder since."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    results, timed = read_json(run_dir / "results.json"), read_json(run_dir / "latency.json") or {}
    write_artifacts(run_dir, table(results), results, timed, config["evaluation"].get("advantages"))


def advantages_found(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the advantages that a model learned from; none, with a note, where its cache is no longer there."""
    try:
        return advantages_of(evaluation)
    except (ValueError, OSError) as error:
        print(f"note: report.html shows no advantages: {str(error).splitlines()[0]}")
        return []


MAX_SAMPLES = 200  # responses a model in samples.jsonl


def write_results(
    settings: Settings, results: dict[str, Any], evaluated: dict[str, Evaluated], cost: Mapping[str, Any]
) -> None:
    """Write samples.jsonl, scores.json, results.md, summary.md, report.html and, last, results.json.

    cost: what the evaluation took, as evaluation.costs.own_cost reads it.
    """
    run_dir = settings.run.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    first = next(iter(evaluated.values()))
    temperatures = settings.evaluation.temperatures
    main = main_temperature(temperatures)
    if main is not None:
        samples = []
        for i, prompt in enumerate(first.prompts[:MAX_SAMPLES]):
            texts = {name: one.responses[main].texts[i] for name, one in evaluated.items()}
            scores = {
                name: one.responses[main].scores[i] for name, one in evaluated.items() if one.responses[main].scores
            }
            samples.append({"prompt": prompt, "temperature": main, "responses": texts, "scores": scores})
        write_jsonl(run_dir / "samples.jsonl", samples)
        (run_dir / "alpaca_eval").mkdir(exist_ok=True)
        for name, one in evaluated.items():
            rows = alpaca_eval_rows(one.prompts, one.responses[main].texts, name)
            write_json(run_dir / "alpaca_eval" / f"{name}.json", rows)
            metas = [conversation.meta for conversation in one.conversations]
            answers = answer_rows(name, metas, one.prompts, one.samples(main), time.time())
            if answers:
                (run_dir / "model_answer").mkdir(exist_ok=True)
                write_jsonl(run_dir / "model_answer" / f"{name}.jsonl", answers)
        every = {
            f"{temperature:g}": {name: one.scores(temperature) for name, one in evaluated.items()}
            for temperature in temperatures
        }
        matched = {name: one.matched_scores() for name, one in evaluated.items() if one.matched_scores()}
        if matched:
            every[MATCHED] = matched
        if first.majority_scores:
            every["majority"] = {name: one.majority_scores for name, one in evaluated.items()}
        write_json(run_dir / "scores.json", every, indent=None)
    write_text(run_dir / "results.md", table(results))
    write_json(run_dir / COST, cost)
    cells = data_cells(results["models"], first.conversations)
    write_json(run_dir / DATA, {"findings": findings(results, first.conversations, cells), "cells": cells})
    timed = {name: one.latency for name, one in evaluated.items() if one.latency}
    if timed:
        write_json(run_dir / "latency.json", timed)
    write_artifacts(run_dir, table(results), results, timed, settings.evaluation.advantages)
    write_json(run_dir / "results.json", results)
