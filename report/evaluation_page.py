"""The readable side of task=evaluate: the files of task=evaluate in the run's folder."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from evaluation import comparisons, latency
from evaluation import harness as benchmarks
from evaluation.answer_files import answer_rows
from evaluation.bradley_terry import cells as strength_cells
from evaluation.matched import MATCHED
from evaluation.records import Evaluated, main_temperature
from evaluation.results import markdown, samples_cells, table, temperature_cells
from evaluation.win_rate import alpaca_eval_rows
from models import local_source
from report.gather import NUM_SAMPLES, Evaluation, advantages_of, curves_of, samples_of, tokens_of
from report.page import write_report
from report.tables import benchmarks_section, cells_section, latency_section, metric_sections
from settings.artifacts import write_json, write_jsonl, write_text
from settings.schema import EvaluationConfig, Settings
from teacher.cache import Reader
from teacher.quantities import Entry

TITLE = "Evaluation"
MATCHED_NOTE = (
    "Entropy of a model: each other one at the temperature at which its tokens are as uncertain, chosen on prompts "
    "that are scored nowhere. What is left there of a lead at one temperature was not sharpening."
)
STRENGTHS_NOTE = (
    "The higher score of a prompt, or the verdict, wins; a tie is half a win. 400 points are odds of 10 to 1."
)


def summary_text(table: str, results: Mapping[str, Any], timed: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return summary.md: the verdict, the table, then what there is of comparisons, benchmarks and latency."""
    parts = {
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
    """Write summary.md and report.html; samples.jsonl stands there already."""
    write_text(run_dir / "summary.md", summary_text(table, results, timed))
    evaluation = Evaluation(run_dir, results["seed"], results, {})
    models = results["models"]
    more = cells_section("temperatures", "Scores at every temperature", temperature_cells(results), MATCHED_NOTE)
    more += cells_section("strengths", "Bradley-Terry strengths", strength_cells(results), STRENGTHS_NOTE)
    more += metric_sections(models) + benchmarks_section(models) + latency_section(timed)
    write_report(
        run_dir,
        TITLE,
        curves_of([evaluation]),
        results,
        samples_of(evaluation),
        advantages_in(cache, next(iter(models.values()))["folder"]) if cache else advantages_found(evaluation),
        more,
    )


def advantages_found(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the advantages that a model learned from; none, with a note, where its cache is no longer there."""
    try:
        return advantages_of(evaluation)
    except (ValueError, OSError) as error:
        print(f"note: report.html shows no advantages: {str(error).splitlines()[0]}")
        return []


MAX_SAMPLES = 200  # responses a model in samples.jsonl


def write_results(settings: Settings, results: dict[str, Any], evaluated: dict[str, Evaluated]) -> None:
    """Write samples.jsonl, scores.json, results.md, summary.md, report.html and, last, results.json."""
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
    timed = {name: one.latency for name, one in evaluated.items() if one.latency}
    if timed:
        write_json(run_dir / "latency.json", timed)
    write_artifacts(run_dir, table(results), results, timed, settings.evaluation.advantages)
    write_json(run_dir / "results.json", results)
