"""Read the examples of a data set in full: facts, words, lengths before the cut, rows as training sees them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from dataloader import Example
from report.inspection import (
    Facts,
    Finding,
    LengthBias,
    facts_of,
    found,
    id_findings,
    length_bias_of,
    ranked,
)
from report.oddities import SpanIndex, content_digest, excerpt, near_findings, odd, oddities, special_texts
from settings.schema import DatasetConfig, ModelConfig
from settings.sections import InspectConfig
from templates import turn_end
from tokens.encoding import encode_example

UNCUT = 2**30  # tokens: longer than any row
OVERHEAD, PER_MESSAGE = 512, 64  # bytes that a template may add; a token is at least a byte, so a short text is whole


class Piece(NamedTuple):
    """A stretch of a row: kind is prompt (read), learned (supervised), or cut (not seen by training)."""

    kind: str
    text: str


class ShownRow(NamedTuple):
    """One sequence of a row, decoded."""

    where: str
    slot: str
    num_tokens: int
    num_learned: int
    pieces: list[Piece]
    note: str = ""


class Split(NamedTuple):
    """One split: its facts, the rows that are shown, and how many rows were read and dropped."""

    rows: list[Facts]
    shown: list[ShownRow]
    dropped: list[str]
    bias: LengthBias | None


class Inspection(NamedTuple):
    """All that task=inspect shows; findings stand from the worst to the least."""

    splits: dict[str, Split]
    findings: list[Finding]
    max_length: int
    max_prompt_length: int


class Reader:
    """Reads examples with their words; the tokenizer is asked again only where something was cut."""

    def __init__(self, tokenizer: Any, model: ModelConfig, datasets: Mapping[str, DatasetConfig]) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.uncut = replace(model, max_length=UNCUT, max_prompt_length=UNCUT - 1)
        self.supervise = {s: d.supervise for d in datasets.values() for s in (d.train, d.test) if s}
        self.special_tokens = {s: d.special_tokens for d in datasets.values() for s in (d.train, d.test) if s}
        self.special, self.end = special_texts(tokenizer), turn_end(tokenizer).id

    def facts(self, example: Example) -> Facts:
        """Return the facts of an example, words and lengths before the cut among them."""
        facts, conversation = facts_of(example, self.end, self.model.max_length), example.conversation
        whole = self.whole(example) if facts.cut or self.may_be_shortened(example) else None
        lengths = facts.lengths
        if whole is not None:
            known = (getattr(whole, slot) for slot in facts.slots)
            lengths = tuple(
                max(n, len(t.ids)) if t is not None else n for n, t in zip(facts.lengths, known, strict=True)
            )
        return facts._replace(
            prompt=content_digest(conversation.prompt),
            whole=lengths,
            shortened=whole is not None and len(whole.prompt) > len(example.prompt),
            oddities=odd(conversation, self.special),
            excerpt=excerpt(conversation),
        )

    def may_be_shortened(self, example: Example) -> bool:
        """Tell whether the prompt's text could be longer than the limit, by its bytes."""
        prompt = example.conversation.prompt
        size = sum(len(m["content"].encode("utf-8", "replace")) + PER_MESSAGE for m in prompt) + OVERHEAD
        return size > self.model.max_prompt_length

    def whole(self, example: Example) -> Example | None:
        """Tokenize a row's text without limits; only its prompt where it has no response."""
        conversation = example.conversation
        source = example.where.rpartition(", row ")[0]
        supervise, special = self.supervise.get(source, "last"), self.special_tokens.get(source, "keep")
        return encode_example(self.tokenizer, conversation, self.uncut, supervise, Counter(), special)

    def shown(self, example: Example) -> list[ShownRow]:
        """Decode the sequences of a row, the part that was cut at their end."""
        rows, whole = [], self.whole(example)
        for slot in ("chosen", "rejected", "response"):
            tokens = getattr(example, slot)
            if tokens is None:
                continue
            ids, mask = [int(i) for i in tokens.ids], [bool(on) for on in tokens.response]
            pieces = [Piece("learned" if on else "prompt", text) for on, text in self._runs(ids, mask)]
            full = getattr(whole, slot) if whole is not None else None
            tail, note = self._tail(example, whole, ids, full.ids if full is not None else [])
            pieces += [Piece("cut", self.tokenizer.decode(tail))] if tail else []
            rows.append(ShownRow(example.where, slot, len(ids), sum(mask), pieces, note))
        if not rows:
            text = self.tokenizer.decode([int(i) for i in example.prompt])
            rows.append(ShownRow(example.where, "prompt", len(example.prompt), 0, [Piece("prompt", text)]))
        return rows

    def _runs(self, ids: list[int], mask: list[bool]) -> Iterable[tuple[bool, str]]:
        start = 0
        for stop in range(1, len(ids) + 1):
            if stop == len(ids) or mask[stop] != mask[start]:
                yield mask[start], self.tokenizer.decode(ids[start:stop])
                start = stop

    def _tail(self, example: Example, whole: Example | None, kept: list[int], full: list[int]) -> tuple[list[int], str]:
        """Return the ids behind the cut, and what else is to be said: of ids that a generator wrote the rest is
        unknown.
        """
        if whole is None:
            return [], ""
        less = len(whole.prompt) - len(example.prompt)
        note = f"prompt shortened from {len(whole.prompt)} to {len(example.prompt)} tokens" if less > 0 else ""
        if len(kept) < self.model.max_length or (self.end is not None and kept[-1] == self.end):
            return [], note
        response = kept[len(example.prompt) :]
        rest = full[len(whole.prompt) :]
        if less <= 0 and full[: len(kept)] == kept:
            return full[len(kept) :], note
        if rest[: len(response)] == response:
            return rest[len(response) :], note
        return [], f"{note}, cut" if note else "cut"


def read_split(
    examples: Iterable[Example], reader: Reader, config: InspectConfig, wheres: list[str], index: SpanIndex, test: bool
) -> Split:
    """Go once through a split; `wheres` are the places of all rows that were asked for, as far as they are known."""
    rows: list[Facts] = []
    shown: list[ShownRow] = []
    is_cut_shown = False
    for number, example in enumerate(examples):
        facts = reader.facts(example)
        rows.append(facts)
        hit = bool(facts.cut or facts.shortened)
        if number < config.rows or (hit and not is_cut_shown):  # one that was cut is always among them
            shown += reader.shown(example)
            is_cut_shown |= hit
        prompt = example.conversation.prompt
        if test:
            index.add(facts, prompt)
        else:
            index.look_up(facts, prompt)
    kept = {row.where for row in rows}
    return Split(rows, shown, [where for where in dict.fromkeys(wheres) if where not in kept], length_bias_of(rows))


def inspect(
    examples: Mapping[str, Iterable[Example]],
    reader: Reader,
    config: InspectConfig,
    wheres: Mapping[str, list[str]],
) -> Inspection:
    """Return all findings about `train` and `test`; the test prompts come first, as training prompts are compared with
    them.
    """
    index = SpanIndex(config.ngram, config.near)
    test = read_split(examples["test"], reader, config, wheres["test"], index, True)
    index.close()
    train = read_split(examples["train"], reader, config, wheres["train"], index, False)
    model, findings = reader.model, id_findings(train.rows, test.rows, reader.model.max_length)
    trained = {row.prompt for row in train.rows}
    near = index.found(row.prompt for row in test.rows if row.prompt in trained)
    findings += near_findings(near, len(test.rows), config.ngram, config.near)
    for name, split in (("train", train), ("test", test)):
        findings += oddities(split.rows, name)
        total, advice = len(split.rows) + len(split.dropped), "a response is empty, or nothing of it fits; remove them"
        hits = [(where, "") for where in split.dropped]
        findings += found("rows dropped: nothing to learn", name, "middle", hits, total, "rows", advice)
    return Inspection({"train": train, "test": test}, ranked(findings), model.max_length, model.max_prompt_length)


# ---- numbers


def lengths_of(split: Split) -> list[int]:
    """Return the tokens of every sequence before anything was cut."""
    return [length for row in split.rows for length in row.whole]


def histogram(lengths: list[int], max_length: int, bins: int = 24) -> list[tuple[int, int, int]]:
    """Count lengths in bins (first, last, count) from 1 to the longest or max_length, with which a bin ends."""
    if not lengths:
        return []
    top = max(*lengths, max_length)
    within = max(1, round(bins * max_length / top))  # bins of what is not cut
    edges = sorted({i * max_length // within for i in range(within + 1)})
    while edges[-1] < top:
        edges.append(edges[-1] + max(1, max_length // within))
    counts = Counter(max(1, bisect_left(edges, length)) for length in lengths)
    return [(edges[i - 1] + 1, edges[i], counts[i]) for i in range(1, len(edges))]


def summary(split: Split) -> dict[str, Any]:
    """Return the numbers of a split."""
    rows, lengths = split.rows, sorted(lengths_of(split))
    tokens = sum(sum(row.lengths) for row in rows)
    return {
        "rows": len(rows),
        "dropped": len(split.dropped),
        "sequences": len(lengths),
        "tokens": tokens,
        "supervised_tokens": sum(sum(row.supervised) for row in rows),
        "prompts_shortened": sum(row.shortened for row in rows),
        "responses_cut": sum(row.cut for row in rows),
        "median_tokens": lengths[len(lengths) // 2] if lengths else 0,
        "longest_tokens": lengths[-1] if lengths else 0,
        "length_bias": split.bias._asdict() if split.bias else None,
    }


def as_json(seen: Inspection) -> dict[str, Any]:
    """Return what inspect.json holds."""
    splits = {
        name: {**summary(split), "histogram": histogram(lengths_of(split), seen.max_length)}
        for name, split in seen.splits.items()
    }
    findings = [_finding(finding) for finding in seen.findings]
    limits = {"max_length": seen.max_length, "max_prompt_length": seen.max_prompt_length}
    return {**limits, "splits": splits, "findings": findings}


def _finding(finding: Finding) -> dict[str, Any]:
    examples = [{"where": where, "text": words} for where, words in finding.examples]
    told = {"split": finding.split, "name": finding.name, "severity": finding.severity}
    numbers = {"count": finding.number, "of": finding.total, "unit": finding.unit, "share": finding.share}
    return {**told, **numbers, "advice": finding.advice, "examples": examples}
