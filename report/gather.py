"""What a report shows beside its scores, gathered from run folders: curves, responses, advantages token by token."""

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import AutoTokenizer

from settings.artifacts import DONE, read_jsonl
from teacher.cache import Reader
from teacher.hub import cache_folder
from teacher.mixture import named, shares
from teacher.quantities import Entry
from tokens.generations import read_generations

NUM_SAMPLES = 12


class Evaluation(NamedTuple):
    """What task=evaluate wrote for one seed; scores: {temperature: {model: [score of each prompt]}}."""

    folder: Path
    seed: int
    results: dict[str, Any]
    scores: dict[str, dict[str, list[float]]]


def read_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation; ValueError if it is not whole."""
    for name in (DONE, "results.json", "scores.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} is no finished evaluation with a verifier: {name} is missing. Run task=evaluate there"
            )
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return Evaluation(folder, results["seed"], results, scores)


def curves_of(evaluations: list[Evaluation]) -> dict[str, Path]:
    """Return the metrics.jsonl beside each evaluated model, by seed_N/model."""
    found = {}
    for e in evaluations:
        for name, row in e.results["models"].items():
            file = Path(row["folder"]).parent / "metrics.jsonl"
            if file.is_file():
                found[f"seed_{e.seed}/{name}" if len(evaluations) > 1 else name] = file
    return found


def samples_of(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the first responses of every model, as the report takes them."""
    file = evaluation.folder / "samples.jsonl"
    rows = list(islice(read_jsonl(file), NUM_SAMPLES)) if file.is_file() else []
    return [
        {"prompt": row["prompt"], "model": model, "response": response, "score": row["scores"].get(model)}
        for row in rows
        for model, response in row["responses"].items()
    ]


def advantages_of(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return generated responses with each token's advantage and the teacher's top entries.

    They come from the cache that the last model with advantages learned from, and where it learned from several from
    each of them, which `whose` then names; none, if there is no such model.
    """
    for row in reversed(evaluation.results["models"].values()):
        folder = Path(row["folder"])
        stored = folder.parent / "config.yaml"
        loss = yaml.safe_load(stored.read_text(encoding="utf-8")).get("loss", {}) if stored.is_file() else {}
        if not loss.get("advantages"):
            continue
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        caches = caches_of(loss["advantages"], loss.get("advantage_weights"))
        every = max(1, caches[0][1].meta.num_sequences // NUM_SAMPLES)
        generations = read_generations(loss["generations"], None)[::every][:NUM_SAMPLES]
        return [
            {
                "prompt": g.prompt[-1]["content"],
                "whose": whose,
                "tokens": tokens_of(tokenizer, g.response_ids, Entry(**reader.get(g.tokens.ids, g.tokens.response))),
            }
            for g in generations
            for whose, reader in caches
        ]
    return []


def caches_of(advantages: Any, weights: Any) -> list[tuple[str, Reader]]:
    """Return the reader of each cache of loss.advantages; of several also its name and its share of their sum."""
    folders = named(advantages)
    found = shares(list(folders), weights, "loss.advantages")
    readers = {name: Reader(cache_folder(folder)) for name, folder in folders.items()}
    return [(f"cache {name}, weight {found[name]:.3g}" if name else "", reader) for name, reader in readers.items()]


def tokens_of(tokenizer: Any, response_ids: list[int], entry: Entry) -> list[dict[str, Any]]:
    """Return a response's tokens as the report takes them: text, own advantage, the teacher's top entries."""
    tokens = []
    for i, token in enumerate(response_ids):
        assert entry.teacher_logps is not None, "an advantage cache carries the aligned teacher's log-probs"
        there = entry.teacher_logps[i] > -math.inf  # the others are padding
        ids, values = entry.ids[i][there].tolist(), [float(v) for v in entry.values[i][there]]
        likely = [math.exp(float(v)) for v in entry.teacher_logps[i][there]]
        top = [[tokenizer.decode([a]), value, p] for a, value, p in zip(ids, values, likely, strict=True)]
        own = values[ids.index(token)] if token in ids else None
        tokens.append({"text": tokenizer.decode([token]), "advantage": own, "top": top})
    return tokens
