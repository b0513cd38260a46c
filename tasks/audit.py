"""task=audit: hold a cache against its teachers, asked again in full; audit.json, audit.md, audit.html, a verdict."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import models
from dataloader import Sequences, Tokens, collate, load_examples
from engine.placement import Replicated
from engine.processes import Apart
from forward.chunks import whole
from forward.responses import response_logits
from functional import gather_logps
from report.audit_page import write_audit
from settings.schema import Settings
from teacher.audit import (
    Figures,
    Stored,
    first_difference,
    sign_errors,
    signs_summary,
    stored_of,
    summary,
    token_figures,
    worst_tokens,
)
from teacher.cache import Reader, content_key
from teacher.precision import teacher_logits
from teacher.verdict import missed_bars, path_error, verdict_line
from tokens.generations import generated_sequences

VERSION = 1
CHUNK_ELEMENTS = 2**23  # of one [n, V] in float32: 32 MiB, and about ten of them are held
ROOT_ERROR = 1 / 512  # half a step of a codec that rounds 256 sqrt(p)
NUM_TOP = 8  # entries shown of a token
WEIGHTS_KNOWN = ("hf", "vllm")  # backends whose caches carry the digests of their teachers' weights
CONTEXT = 40  # tokens shown before one


class Truth(NamedTuple):
    """What the float32 teachers say of one sequence: figures [L] each, exact log-probabilities and advantages at the
    stored ids [L, K], and the most probable ids with their log-probabilities [L, NUM_TOP].
    """

    figures: dict[str, np.ndarray]
    exact: Tensor
    advantages: Tensor | None
    top_ids: np.ndarray
    top_logps: np.ndarray


def run(settings: Settings) -> None:
    """Ask again on a sample, sum up, write the files and print the verdict."""
    config, process = settings.audit, Apart()
    if process.world_size > 1:
        raise ValueError("task=audit runs in one process: start it with `python launch.py`")
    tokenizer = models.load_tokenizer(settings.model)
    reader = _reader(settings, tokenizer)
    rows = [Tokens(*row) for row in reader.sequences(config.n_sequences)]
    entries = [stored_of(reader.get(*row), process.device) for row in rows]
    dtype = models.resolve_dtype(settings.model.reference_dtype, process.device, on_gpu=torch.float32)
    truths = _truths(settings, process, reader, tokenizer, rows, entries, dtype)
    figures = {name: np.concatenate([t.figures[name] for t in truths]) for name in truths[0].figures}
    positions = np.concatenate([np.arange(1, len(stored.ids) + 1) for stored in entries])
    found = summary(figures, positions)
    for name in config.precisions:
        found.setdefault("precisions", {})[name] = _at_precision(
            settings, process, reader, tokenizer, rows, entries, truths, getattr(torch, name)
        )
    audit: dict[str, Any] = {
        "cache": {"folder": str(reader.folder), **reader.meta.__dict__},
        "num_sequences": len(rows),
        "student": _student_words(settings),
        "truth": str(dtype).removeprefix("torch."),
        "identity": _identity(settings, reader, tokenizer),
        "allowed_error": config.max_error or path_error([reader.meta.precision, str(dtype)]),
        "figures": found,
        "drift": _drift(settings, reader, tokenizer, rows),
        "worst": _worst(tokenizer, rows, entries, truths, worst_tokens(figures, config.worst)),
    }
    missed = missed_bars(audit, config)
    audit["missed"], audit["verdict"] = missed, verdict_line(missed)
    write_audit(settings.run.run_dir, audit)
    print(audit["verdict"])


def _reader(settings: Settings, tokenizer: Any) -> Reader:
    config = settings.audit
    assert config.cache is not None  # settings/tasks.py refuses it
    reader = Reader(config.cache, decode=tokenizer.decode)
    meta = reader.meta
    if meta.quantity not in ("logprob", "advantage"):
        raise ValueError(
            f"audit.cache={config.cache} holds {meta.quantity}: task=audit compares distributions, of quantity logprob "
            "or advantage"
        )
    if meta.vocab_size != len(tokenizer):
        raise ValueError(
            f"audit.cache={config.cache} is over {meta.vocab_size} tokens, the tokenizer of this run has "
            f"{len(tokenizer)}: name the cache's teacher with model=..."
        )
    if meta.quantity == "advantage" and settings.cache.reference is None:
        raise ValueError("audit.cache holds advantages: name their second teacher with cache.reference=FOLDER")
    return reader


def _student_words(settings: Settings) -> str | None:
    if settings.audit.student:
        return f"the student {settings.audit.student}"
    if settings.cache.reference:
        return f"a stand-in for a student, the reference teacher {settings.cache.reference}"
    return None


# ---- asking


def _loaded(settings: Settings, process: Apart, source: str | None, dtype: torch.dtype) -> Any:
    placement = Replicated(process, settings.model)
    return placement.place_frozen(models.load_model(settings.model, source=source, dtype=dtype, trainable=False))


def _batch(row: Tokens, tokenizer: Any, process: Apart) -> Sequences:
    return collate([row], tokenizer.pad_token_id).to(process.device)


def _truths(
    settings: Settings,
    process: Apart,
    reader: Reader,
    tokenizer: Any,
    rows: Sequence[Tokens],
    entries: Sequence[Stored],
    dtype: torch.dtype,
) -> list[Truth]:
    """Ask the teachers, and who learns, about each sequence."""
    config, vocab_size = settings.audit, len(tokenizer)
    teacher = _loaded(settings, process, None, dtype)
    reference = _loaded(settings, process, settings.cache.reference, dtype) if settings.cache.reference else None
    student = _loaded(settings, process, config.student, torch.float32) if config.student else None
    if student is not None and student.get_input_embeddings().weight.shape[0] < vocab_size:
        raise ValueError(f"audit.student={config.student} has a smaller vocabulary than the cache's {vocab_size}")
    found = []
    for row, stored in zip(rows, entries, strict=True):
        batch = _batch(row, tokenizer, process)
        with torch.inference_mode():
            asked = whole(teacher_logits(teacher, batch, vocab_size).logits)
            other = None if reference is None else whole(teacher_logits(reference, batch, vocab_size).logits)
            own = other if student is None else whole(response_logits(student, batch, vocab_size).logits)
            found.append(_truth(asked, other, own, stored, reader.meta.beta, root_error(reader)))
    return found


def root_error(reader: Reader) -> float | None:
    """Return what the cache's codec may change of a probability's root; None: it holds float16 log-probabilities."""
    return None if getattr(reader.meta, "codec", "none") == "none" else ROOT_ERROR


def _truth(
    teacher: Tensor, reference: Tensor | None, student: Tensor | None, stored: Stored, beta: float, root: float | None
) -> Truth:
    """Make the figures of one sequence from logits [L, V], a few tokens at a time."""
    step = max(1, CHUNK_ELEMENTS // teacher.shape[-1])
    parts = []
    for start in range(0, len(teacher), step):
        rows = slice(start, start + step)
        logps, other, own = (
            None if x is None else x[rows].float().log_softmax(-1) for x in (teacher, reference, student)
        )
        assert logps is not None
        some = stored.part(start, start + step)
        figures = token_figures(logps, some, own, other, beta, root)
        top = logps.topk(min(NUM_TOP, logps.shape[-1]), dim=-1)
        exact = logps.gather(-1, some.ids)
        advantages = None if other is None else beta * (exact - other.gather(-1, some.ids))
        parts.append((figures, exact, advantages, top.indices, top.values))
    joined = {name: torch.cat([part[0][name] for part in parts]).cpu().numpy() for name in parts[0][0]}
    advantages = None if reference is None else torch.cat([part[2] for part in parts if part[2] is not None])
    exact, ids, values = (torch.cat([part[i] for part in parts]) for i in (1, 3, 4))  # type: ignore[misc]
    return Truth(joined, exact, advantages, ids.cpu().numpy(), values.cpu().numpy())


def _at_precision(
    settings: Settings,
    process: Apart,
    reader: Reader,
    tokenizer: Any,
    rows: Sequence[Tokens],
    entries: Sequence[Stored],
    truths: Sequence[Truth],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Ask the teachers in a narrower precision, and compare with the truth at the stored ids."""
    both = reader.meta.quantity == "advantage"
    found: list[list[Tensor]] = []
    try:
        for source in (None, settings.cache.reference)[: 1 + both]:
            model = _loaded(settings, process, source, dtype)
            found.append(
                [
                    _at_ids(model, _batch(r, tokenizer, process), e, tokenizer)
                    for r, e in zip(rows, entries, strict=True)
                ]
            )
            del model
    except (RuntimeError, ValueError) as error:  # a kernel that this machine lacks, or numbers beyond the range
        return {"not_possible": str(error).splitlines()[0]}
    gaps = [
        torch.where(stored.kept, (asked - truth.exact).abs(), 0.0)
        for stored, asked, truth in zip(entries, found[0], truths, strict=True)
    ]
    weighted = [(gap * truth.exact.exp()).sum(-1) for gap, truth in zip(gaps, truths, strict=True)]
    summed: dict[str, Any] = {
        "max_logp_error": float(max(gap.max() for gap in gaps)),
        "weighted_logp_error": float(torch.cat(weighted).mean()),
    }
    if not both:
        return summed
    signs: list[Figures] = []
    for stored, truth, one, other in zip(entries, truths, *found, strict=True):
        assert truth.advantages is not None
        signs.append(sign_errors(reader.meta.beta * (one - other), truth.advantages, truth.exact, stored.kept))
    figures = {name: torch.cat([part[name] for part in signs]).cpu().numpy() for name in signs[0]}
    return summed | signs_summary(figures, float(sum(stored.kept.sum() for stored in entries)))


@torch.inference_mode()
def _at_ids(model: Any, batch: Sequences, stored: Stored, tokenizer: Any) -> Tensor:
    return gather_logps(teacher_logits(model, batch, len(tokenizer)).logits, stored.ids)


# ---- identity and drift


def _identity(settings: Settings, reader: Reader, tokenizer: Any) -> dict[str, dict[str, str | None]]:
    """Pair what made the cache with what was asked; whom a server held, or a file is of, no digest of weights says."""
    reference = settings.cache.reference if reader.meta.quantity == "advantage" else None
    asked: dict[str, str | None] = {
        "tokenizer_digest": models.tokenizer_digest(tokenizer),
        "template_digest": models.template_digest(tokenizer),
    }
    if reader.meta.backend in WEIGHTS_KNOWN:
        asked["teacher_digest"] = models.config_digest(settings.model)
        asked["reference_digest"] = models.model_digest(reference) if reference else None
    return {key: {"cache": getattr(reader.meta, key), "asked": value} for key, value in asked.items()}


def _drift(settings: Settings, reader: Reader, tokenizer: Any, rows: Sequence[Tokens]) -> dict[str, Any]:
    """Tokenize the sample's text again, and look this run's own data up; the first difference of each is shown."""
    parted = []
    for number, row in enumerate(rows):
        text = tokenizer.decode(row.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False).input_ids
        place = first_difference(row.ids, again)
        if place is not None:
            parted.append((number, place, row, again))
    found: dict[str, Any] = {"sequences": len(rows), "retokenized_otherwise": len(parted)}
    if parted:
        number, place, row, again = parted[0]
        around = slice(max(0, place - 8), place + 8)
        found["first"] = {
            "sequence": number,
            "position": place,
            "in_response": bool(row.response[place]) if place < len(row.response) else True,
            "stored": tokenizer.convert_ids_to_tokens(row.ids[around]),
            "again": tokenizer.convert_ids_to_tokens(again[around]),
        }
    asked = _asked_for(settings, tokenizer)
    if asked:
        missing = [t for t in asked if not reader.holds(content_key(t.ids, t.response))]
        found["coverage"] = {"rows": len(asked), "held": len(asked) - len(missing)}
        if missing:
            found["coverage"]["first"] = reader.explain(list(missing[0].ids), list(missing[0].response))
    return found


def _asked_for(settings: Settings, tokenizer: Any) -> list[Tokens]:
    """Return what this run's data would look up, where it names any."""
    config = settings.cache
    if config.generations:
        run = settings.run
        generated = generated_sequences(config.generations, tokenizer, run.tokens_dir, run.num_proc)
        return [tokens for tokens in generated if tokens.num_supervised]
    if not settings.datasets:
        return []
    limit = settings.run.n_examples if config.split == "train" else settings.run.n_eval_examples
    examples = load_examples(settings.datasets, config.split, tokenizer, settings.model, limit, settings.run.seed)
    return [t for e in examples for name in config.responses if (t := getattr(e, name)) is not None]


# ---- worst tokens


def _worst(
    tokenizer: Any,
    rows: Sequence[Tokens],
    entries: Sequence[Stored],
    truths: Sequence[Truth],
    chosen: list[tuple[int, str]],
) -> list[dict[str, Any]]:
    """Describe tokens by their place among all tokens of the sample: text, context, stored and exact entries."""
    ends = np.cumsum([len(stored.ids) for stored in entries])
    found = []
    for place, reason in chosen:
        number = int(np.searchsorted(ends, place, side="right"))
        inside = place - int(ends[number] - len(entries[number].ids))
        row, stored, truth = rows[number], entries[number], truths[number]
        at = [i for i, on in enumerate(row.response) if on][inside]
        ranked = stored.logps[inside].masked_fill(~stored.kept[inside], -torch.inf).argsort(descending=True)
        order = ranked[stored.kept[inside][ranked]][:NUM_TOP].tolist()
        show = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        exact = zip(truth.top_ids[inside], truth.top_logps[inside], strict=True)
        found.append(
            {
                "reason": reason,
                "sequence": number,
                "position": inside + 1,
                "token": show([row.ids[at]]),
                "before": show(list(row.ids[max(0, at - CONTEXT) : at])),
                "figures": {name: float(values[inside]) for name, values in truth.figures.items()},
                "stored": [_entry(show, stored, truth, inside, j) for j in order],
                "exact": [{"token": show([int(i)]), "logp": float(value)} for i, value in exact],
            }
        )
    return found


def _entry(show: Callable[[list[int]], str], stored: Stored, truth: Truth, token: int, j: int) -> dict[str, Any]:
    """Describe an entry beside what the teachers say at its id."""
    found: dict[str, Any] = {
        "token": show([int(stored.ids[token, j])]),
        "logp": float(stored.logps[token, j]),
        "exact": float(truth.exact[token, j]),
    }
    if stored.advantages is not None and truth.advantages is not None:
        found["advantage"] = float(stored.advantages[token, j])
        found["exact_advantage"] = float(truth.advantages[token, j])
    return found
