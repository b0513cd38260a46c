"""The readable side of task=evaluate: summary.md and report.html in the run's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from models import local_source
from report import write_report
from report_tables import benchmarks_section, latency_section, pairs_section, replies_section
from schema import EvaluationConfig
from tasks import benchmarks, comparisons, latency
from tasks.summarise import NUM_SAMPLES, Evaluation, advantages_of, curves_of, samples_of, tokens_of
from teacher_cache import Reader

TITLE = "Evaluation"


def summary_text(table: str, results: Mapping[str, Any], timed: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return summary.md: the table, then what there is of comparisons, benchmarks and latency."""
    parts = {
        "Differences on the same prompts": comparisons.table(results.get("comparisons") or []),
        "Differences on the same prompts, greedy": comparisons.table(results.get("greedy_comparisons") or []),
        "lm-evaluation-harness": benchmarks.table(results["models"]),
        "Latency": latency.table(timed),
    }
    found = "".join(f"\n## {title}\n\n{part}" for title, part in parts.items() if part)
    judged = f"\n{table}" if table.count("|") > 3 * table.count("\n") else ""  # a table of names alone says nothing
    return f"# {TITLE}\n{judged}{found}"


def check_advantages(config: EvaluationConfig) -> None:
    """Refuse an evaluation.advantages that is no finished cache of advantages, before a model loads."""
    if config.advantages is None:
        return
    quantity = Reader(config.advantages).meta.quantity
    if quantity != "advantage":
        raise ValueError(f"evaluation.advantages={config.advantages} caches {quantity}s: give one of task=cache cache.reference=FOLDER")
    _reader_for(config.advantages, next(iter(config.models.values())))


def _reader_for(cache: str, model: str) -> tuple[Reader, Any]:
    """Open a cache with the tokenizer of a model; ValueError where they have other vocabularies."""
    reader = Reader(cache)
    tokenizer: Any = AutoTokenizer.from_pretrained(local_source(model), trust_remote_code=False)
    if reader.meta.vocab_size != len(tokenizer):
        raise ValueError(f"evaluation.advantages={cache} is over {reader.meta.vocab_size} tokens, the tokenizer of {model} has {len(tokenizer)}")
    return reader, tokenizer


def advantages_in(cache: str, model: str) -> list[dict[str, Any]]:
    """Return sequences of an advantage cache, decoded with the model's tokenizer, as the report takes them."""
    reader, tokenizer = _reader_for(cache, model)
    rows = []
    for ids, response in reader.sequences(NUM_SAMPLES):
        prompt = [token for token, on in zip(ids, response, strict=True) if not on]
        said = [token for token, on in zip(ids, response, strict=True) if on]
        tokens = tokens_of(tokenizer, said, reader.get(ids, response))
        rows.append({"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "tokens": tokens})
    return rows


def write_artifacts(
    run_dir: Path, table: str, results: dict[str, Any], timed: Mapping[str, Sequence[Mapping[str, Any]]], cache: str | None
) -> None:
    """Write summary.md and report.html; samples.jsonl stands there already."""
    (run_dir / "summary.md").write_text(summary_text(table, results, timed), encoding="utf-8")
    evaluation = Evaluation(run_dir, results["seed"], results, {})
    models = results["models"]
    more = pairs_section(models) + replies_section(models) + benchmarks_section(models) + latency_section(timed)
    write_report(
        run_dir, TITLE, curves_of([evaluation]), results, samples_of(evaluation),
        advantages_in(cache, next(iter(models.values()))["folder"]) if cache else advantages_found(evaluation), more,
    )  # fmt: skip


def advantages_found(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the advantages that a model learnt from; none, with a note, where its cache is no longer there."""
    try:
        return advantages_of(evaluation)
    except (ValueError, OSError) as error:
        print(f"note: report.html shows no advantages: {str(error).splitlines()[0]}")
        return []
