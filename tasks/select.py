"""task=select: choose, by right or wrong, what to train on (task=label gives every response a score instead).

Reads a generations.jsonl with n responses to each question. Writes JSONL files that the loaders read back, with the
sampled token ids (nothing is tokenized a second time):

    SELECT/pairs_train.jsonl   make=pairs: a correct (chosen) with an incorrect (rejected) response to the same question
    SELECT/pairs_test.jsonl    make=pairs, holdout > 0: the pairs of other questions, for evaluation only
    SELECT/distinct.jsonl      make=distinct: correct responses that are unlike those kept before and the data set's own
    SELECT/counts.json         what was kept and dropped

Questions of the data sets' test split are left out and counted; generations sampled from a test split are refused.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from conversations import (
    Conversation,
    Row,
    check_one_tokenizer,
    conversation_of,
    format_of,
    key_of,
    to_conversation,
)
from rewards.verifiers import Verifier, resolve_verifier, surely_scored
from settings.artifacts import read_jsonl, write_json, write_jsonl
from settings.schema import DatasetConfig, Settings
from tokens.generations import pair_row
from tokens.sources import open_rows

VERSION = 2
CORRECT = 1.0  # a verifier's score from which a response is correct


class Question(NamedTuple):
    """The responses to one prompt that may be used, in the order in which they were sampled, no text twice."""

    key: str
    correct: list[Row]
    incorrect: list[Row]


# ---- reading


def read_generated(path: Path) -> list[Row]:
    """Read generations.jsonl; ValueError for a missing file, one of the test split, or a row of another kind."""
    if not path.is_file():
        raise ValueError(f"select.generations={path}: no such file; task=generate writes generations.jsonl")
    stored = path.parent / "config.yaml"
    config = yaml.safe_load(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    if (config or {}).get("generation", {}).get("split") == "test":
        raise ValueError(
            f"select.generations={path} answers the test split: training on it would void every evaluation"
        )
    rows = list(read_jsonl(path))
    for number, row in enumerate(rows, 1):
        missing = {"prompt", "prompt_ids", "response", "response_ids", "finish_reason"} - row.keys()
        if missing:
            raise ValueError(
                f"{path}, line {number}: no {', '.join(sorted(missing))}; was it written by task=generate?"
            )
    if not rows:
        raise ValueError(f"select.generations={path} has no rows")
    check_one_tokenizer({str(path): rows})
    return rows


def conversations_of(datasets: Mapping[str, DatasetConfig], split: str) -> Iterator[Conversation]:
    """Yield the rows of a split of every data set that has it; ValueError for one that the loader refuses, too."""
    for name, config in datasets.items():
        source = getattr(config, split)
        if source is None:
            continue
        rows = open_rows(source, f"datasets.{name}.{split}")
        numbers = range(rows.size())
        fmt = format_of(config.format, rows.first(), source) if numbers else config.format
        for number, row in enumerate(rows.tried(numbers), 1):
            try:
                if isinstance(row, ValueError):
                    raise row
                found = to_conversation(row, fmt, f"{source}, row {number}")
            except ValueError:
                if config.on_error == "refuse":
                    raise
                continue  # no run is trained or evaluated on it: the loader drops it, too
            yield found


def verified(rows: Iterable[Row], verifier: Verifier, held_out: set[str], counts: Counter[str]) -> list[Question]:
    """Sort the responses by question and correctness, in order of first appearance.

    Correct means that the verifier says so and that the response has ended. One that was cut is on neither side.
    """
    questions: dict[str, Question] = {}
    seen: set[tuple[str, str]] = set()
    left_out: set[str] = set()
    for row in rows:
        key = key_of(row["prompt"])
        if key in held_out:
            left_out.add(key)
            continue
        counts["responses"] += 1
        question = questions.setdefault(key, Question(key, [], []))
        if (key, row["response"]) in seen:
            counts["repeated responses dropped"] += 1
            continue
        seen.add((key, row["response"]))
        correct = surely_scored(verifier, conversation_of(row), row["response"]) >= CORRECT
        counts["different correct responses"] += correct
        if correct and row["finish_reason"] != "stop":
            counts["correct responses without an end dropped"] += 1
        elif row["response_ids"]:
            (question.correct if correct else question.incorrect).append(row)
    counts["questions"] = len(questions)
    counts["questions of the test split left out"] = len(left_out)
    counts["questions without a correct response"] = sum(not q.correct for q in questions.values())
    counts["questions without an incorrect response"] = sum(not q.incorrect for q in questions.values())
    return list(questions.values())


# ---- pairs


def draw_pairs(question: Question, limit: int, rng: random.Random) -> list[Row]:
    """Draw at most `limit` different pairs; a response is used again only after every other of its side was."""
    correct, incorrect = list(question.correct), list(question.incorrect)
    rng.shuffle(correct)
    rng.shuffle(incorrect)
    num_pairs = min(limit, len(correct) * len(incorrect))
    # Walk the table of all pairs along its diagonals: step k of round r takes (k, k + r), so no pair comes twice.
    long, short = max(len(correct), len(incorrect)), min(len(correct), len(incorrect))
    places = [(i, (i + shift) % short) for shift in range(short) for i in range(long)][:num_pairs]
    table = [(i, j) if len(correct) >= len(incorrect) else (j, i) for i, j in places]
    return [pair_row(correct[i], incorrect[j]) for i, j in table]


def by_prompt(question: Question) -> list[Question]:
    """Return the parts of a question whose responses stand behind the same ids: prompts that differ in white space are
    one question, and no pair is of two of them.
    """
    parts: dict[tuple[int, ...], Question] = {}
    for row in (*question.correct, *question.incorrect):
        parts.setdefault(tuple(row["prompt_ids"]), Question(question.key, [], []))
    for ids, part in parts.items():
        part.correct.extend(row for row in question.correct if tuple(row["prompt_ids"]) == ids)
        part.incorrect.extend(row for row in question.incorrect if tuple(row["prompt_ids"]) == ids)
    return [part for part in parts.values() if part.correct and part.incorrect]


def make_pairs(questions: list[Question], limit: int, holdout: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return pairs to train on and pairs of other questions (a share `holdout`, at least one) to evaluate on.

    Each question draws from a seed of its own, so it keeps its pairs whatever the other questions are.
    """
    draws = {q.key: (parts, random.Random(f"{seed} {q.key}")) for q in questions if (parts := by_prompt(q))}
    order = sorted(draws, key=lambda key: random.Random(f"holdout {seed} {key}").random())
    held_out = set(order[: min(len(order) - 1, max(1, round(holdout * len(order))))] if holdout and order else [])
    pairs = {
        key: [row for part in parts for row in draw_pairs(part, limit, rng)] for key, (parts, rng) in draws.items()
    }
    train = [row for key, rows in pairs.items() if key not in held_out for row in rows]
    return train, [row for key, rows in pairs.items() if key in held_out for row in rows]


# ---- distinct responses


def words(text: str) -> frozenset[str]:
    """Return the set of words and signs of a text."""
    return frozenset(text.split())


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets, |A and B| / |A or B|; 1 for two empty ones."""
    return len(one & other) / len(one | other) if one or other else 1.0


def keep_distinct(responses: list[Row], kept: list[frozenset[str]], max_similarity: float) -> list[Row]:
    """Return the responses that are less similar than max_similarity to every one kept before; `kept` grows by them."""
    fresh = []
    for response in responses:
        own = words(response["response"])
        if all(similarity(own, other) < max_similarity for other in kept):
            kept.append(own)
            fresh.append(response)
    return fresh


def make_distinct(
    questions: list[Question],
    originals: Mapping[str, list[str]],
    earlier: list[Row],
    max_similarity: float,
    counts: Counter[str],
) -> list[Row]:
    """Return earlier rows, then the correct responses that are unlike them, the originals and each other."""
    kept: dict[str, list[frozenset[str]]] = {key: [words(text) for text in texts] for key, texts in originals.items()}
    for row in earlier:
        kept.setdefault(key_of(row["prompt"]), []).append(words(row["response"]))
    fresh = [
        row
        for question in questions
        for row in keep_distinct(question.correct, kept.setdefault(question.key, []), max_similarity)
    ]
    counts["too similar responses dropped"] = sum(len(question.correct) for question in questions) - len(fresh)
    counts["rows of earlier rounds"] = len(earlier)
    return [*earlier, *fresh]


# ---- the task


def originals_of(settings: Settings) -> dict[str, list[str]]:
    """Return the data sets' own responses to each prompt of the train split."""
    found: dict[str, list[str]] = {}
    for conversation in conversations_of(settings.datasets, "train"):
        if conversation.response is not None:
            found.setdefault(key_of(conversation.prompt), []).append(conversation.response[0]["content"])
    return found


def run(settings: Settings) -> None:
    """Write the selected rows into run_dir/SELECT and print what was kept and dropped."""
    config = settings.select
    if not config.generations or not config.verifier:
        raise ValueError(
            "task=select needs select.generations=FILE and select.verifier=module:function, e.g. worlds.gsm8k:check"
        )
    rows = read_generated(Path(config.generations).expanduser())
    verifier = resolve_verifier(config.verifier)
    held_out = {key_of(c.prompt) for c in conversations_of(settings.datasets, "test")}
    counts: Counter[str] = Counter()
    questions = verified(rows, verifier, held_out, counts)
    folder = settings.run.run_dir / "SELECT"
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[Row]] = {}
    if config.make == "pairs":
        train, test = make_pairs(questions, config.pairs_per_prompt, config.holdout, settings.run.seed)
        files = {"pairs_train.jsonl": train} | ({"pairs_test.jsonl": test} if config.holdout else {})
    else:
        earlier = [row for path in config.earlier for row in read_generated(Path(path).expanduser())]
        check_one_tokenizer({config.generations: rows[:1], ", ".join(config.earlier): earlier})
        files = {
            "distinct.jsonl": make_distinct(questions, originals_of(settings), earlier, config.max_similarity, counts)
        }
    if not all(files.values()):
        raise ValueError(
            f"nothing to write of {config.generations}: {dict(counts)}. Sample more (generation.n), warmer, or from "
            "another model"
        )
    for name, selected in files.items():
        write_jsonl(folder / name, selected)
        counts[f"rows of {name}"] = len(selected)
    write_json(folder / "counts.json", counts)
    print("\n".join(f"{count:8} {what}" for what, count in counts.items()))
    print(f"{', '.join(files)} in {folder}", flush=True)
