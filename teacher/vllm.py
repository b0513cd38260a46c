"""Teachers in a vLLM engine of this process (cache.backend=vllm): one for log-probabilities, two for advantages.

Both teachers may not fit at once, so one engine follows the other: the first writes its top k of every sequence, in
float32, into run_dir/TOP_K, a cache like any other (killed, it goes on behind its last sequence); the second scores
those ids and the advantages go into run_dir/CACHE. Letters: L response tokens of a sequence, K entries, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from assets.sources import check_no_pickles, local_source
from dataloader import Tokens
from engine.processes import Processes
from generation.vllm import finished, missing, model_width, shut_down, started
from settings.artifacts import is_done
from settings.schema import Settings
from settings.teacher_sections import CacheConfig
from teacher import scoring
from teacher.cache import Arrays, Meta, Reader, Writer, begin, finish, stored_keys, wait_for
from teacher.protocol import check_finite, given_rows, response_positions, scores_at
from teacher.quantities import TOP_K
from teacher.served import ALIGNED
from teacher.writing import score_all


class EngineTeacher:
    """A frozen model in a vLLM engine: its K most probable ids before each response token, or those of given ids.

    given_ids: how it may be asked for given ids (cache.given_ids), None if it is not.
    """

    def __init__(self, source: str | None, settings: Settings, vocab_size: int, longest: int, given_ids: str | None):
        config, self.k, self.given_ids, self.vocab_size = settings.cache, settings.cache.top_k, given_ids, vocab_size
        why = missing(settings.model)
        if why or source is None:
            raise ValueError(f"cache.backend=vllm: {why}; use cache.backend=hf")
        width = model_width(source)
        if width != vocab_size:
            raise ValueError(
                f"cache.backend=vllm: the softmax of {source} has {width} entries, the tokenizer {vocab_size} tokens, "
                "and vLLM cannot leave the surplus out of its log-probabilities: use cache.backend=hf"
            )
        if self.k > width:
            raise ValueError(f"cache.top_k={self.k} is more than the vocabulary of {width}")
        whole = given_ids == "whole_vocabulary"
        # A whole softmax of each token is held in Python lists: of one sequence at a time.
        options = {"max_logprobs": -1, "max_num_seqs": 1} if whole else {"max_logprobs": self.k}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = models.resolve_dtype(settings.model.reference_dtype, device)
        # One token has to be generated behind the longest sequence; it is thrown away.
        self.llm = started(source, dtype, longest + 1, config.tensor_parallel, config.kv_cache_gb, **options)

    def __call__(self, rows: Sequence[Tokens]) -> list[Arrays]:
        """Return the arrays of quantity logprob of each row's response tokens: ids, values float32 [L, K], tail [L]."""
        outputs = self._asked(rows, lambda _: {"prompt_logprobs": self.k, "flat_logprobs": True})
        return [top_k_of(output.prompt_logprobs, row, self.k) for output, row in zip(outputs, rows, strict=True)]

    def logps(self, rows: Sequence[Tokens], wanted: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the log-probabilities of each row's wanted ids [L, K], float32 [L, K]."""
        if self.given_ids == "whole_vocabulary":
            outputs = self._asked(rows, lambda _: {"prompt_logprobs": -1, "flat_logprobs": True})
            read = partial(gathered_logps, vocab_size=self.vocab_size)
            return [read(o.prompt_logprobs, row, w) for o, row, w in zip(outputs, rows, wanted, strict=True)]

        def given(i: int) -> dict[str, Any]:
            table, start = given_rows(rows[i].ids, rows[i].response, wanted[i])
            return {"prompt_logprob_token_ids": table, "prompt_logprob_start": start}

        outputs = self._asked(rows, given)
        return [given_logps(output, row, self.k) for output, row in zip(outputs, rows, strict=True)]

    def check_given_ids(self, row: Tokens) -> None:
        """Let the engine show, on one sequence, that it can score given ids: the same numbers come back on both ways.

        ValueError says what to set where it cannot.
        """
        top = self([row])[0]
        try:
            found = self.logps([row], [top["ids"]])[0]
        except Exception as error:  # vLLM's own kinds: whatever it is, the way to ask is what failed
            raise ValueError(
                f"cache.backend=vllm cannot ask a teacher for given ids here (cache.given_ids={self.given_ids}): "
                f"{str(error) or type(error).__name__}. vLLM 0.32 or newer can where VLLM_USE_V2_MODEL_RUNNER=1 is "
                "set, which needs Triton and so a GPU; cache.given_ids=whole_vocabulary goes without it, slowly, and "
                "cache.backend=hf needs no vLLM"
            ) from error
        gap = float(np.abs(found - top["values"]).max())
        if gap > ALIGNED:
            raise ValueError(
                f"vLLM gives a teacher's own top {self.k} other log-probabilities when it is asked for them by id: up "
                f"to {gap:.3f} nats apart. Its rows are not aligned as this version expects "
                f"(cache.given_ids={self.given_ids}): use cache.backend=hf"
            )

    def _asked(self, rows: Sequence[Tokens], asked: Callable[[int], dict[str, Any]]) -> list[Any]:
        """Return the engine's output of every row, in their order."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY

        def request(i: int) -> tuple[str, list[int], Any]:
            params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, output_kind=kind, **asked(i))
            return str(i), rows[i].ids, params

        found = {int(output.request_id): output for output in finished(self.llm, deque(range(len(rows))), request)}
        return [found[i] for i in range(len(rows))]

    def close(self) -> None:
        """End the engine and free its memory."""
        shut_down(self.llm)
        del self.llm


# ---- what comes back


def top_k_of(flat: Any, row: Tokens, k: int) -> Arrays:
    """Return the top K of each response token and the mass outside. Each position lists its own token first, then the K
    by rank.
    """
    at = response_positions(row.ids, row.response)
    starts = np.asarray(flat.start_indices)[at][:, None] + 1 + np.arange(k)
    assert (np.asarray(flat.end_indices)[at] == starts[:, -1] + 1).all(), "vLLM's prompt log-probabilities changed"
    logps = np.asarray(flat.logprobs, dtype=np.float64)[starts]
    tail = np.clip(1.0 - np.exp(logps).sum(axis=1), 0.0, None)
    ids = np.asarray(flat.token_ids)[starts]
    return {"ids": ids, "values": logps.astype(np.float32), "tail": tail.astype(np.float32)}


def gathered_logps(flat: Any, row: Tokens, wanted: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the log-probabilities of wanted [L, K] from the whole vocabulary of every position, float32 [L, K]."""
    found = np.empty(wanted.shape, np.float32)
    for place, t in enumerate(response_positions(row.ids, row.response)):
        whole = slice(flat.start_indices[t] + 1, flat.end_indices[t])
        logps = np.full(vocab_size, np.nan, np.float32)
        logps[np.asarray(flat.token_ids[whole])] = flat.logprobs[whole]
        found[place] = logps[wanted[place]]
    check_finite(found)
    return found


def given_logps(output: Any, row: Tokens, k: int) -> np.ndarray:
    """Return the log-probabilities of given ids before each response token, float32 [L, K]."""
    table = getattr(output, "prompt_token_id_logprobs", None)
    if table is None:
        raise ValueError("the answer has no prompt_token_id_logprobs")
    return scores_at(np.asarray(table), row.ids, row.response, k)


# ---- two teachers, one after the other


def score_in_turn(
    settings: Settings, vocab_size: int, meta: Meta, batches: list[list[Tokens]], process: Processes
) -> None:
    """Write this process's share of the advantages: the teacher's top k of all sequences, then the reference there.

    A killed run asks either teacher only for the batches that are missing. `clean_up` removes the first one's answers.
    """
    config, folder = settings.cache, settings.run.run_dir / "CACHE"
    place = settings.run.run_dir / "TOP_K"
    first = replace(meta, quantity=TOP_K.name, reference_digest=None, beta=1.0, codec="none", mass=1.0)
    start = partial(_started, settings, vocab_size, batches)
    begin(place, first)
    if not is_done(place):
        _scored(config, place, first, batches, process, lambda: start(models.model_source(settings.model)), "top k")
        if process.is_main:
            finish(place, first, {t.key for batch in batches for t in batch})
        wait_for(lambda: is_done(place))
    top = Reader(place)

    def reference() -> EngineTeacher:
        assert config.reference is not None
        source = local_source(config.reference)
        check_no_pickles(source, settings.model)
        return start(source)

    _scored(config, folder, meta, batches, process, reference, "advantages", top)


def _started(settings: Settings, vocab_size: int, batches: list[list[Tokens]], source: str | None) -> EngineTeacher:
    """Start a teacher that has shown on the shortest sequence that it can be asked for given ids."""
    rows = [row for batch in batches for row in batch]
    longest, shortest = max(len(row.ids) for row in rows), min(rows, key=lambda row: (row.length, row.key))
    teacher = EngineTeacher(source, settings, vocab_size, longest, settings.cache.given_ids)
    try:
        teacher.check_given_ids(shortest)
    except ValueError:
        teacher.close()
        raise
    return teacher


def _scored(
    config: CacheConfig,
    folder: Path,
    meta: Meta,
    batches: list[list[Tokens]],
    process: Processes,
    start: Callable[[], EngineTeacher],
    what: str,
    top: Reader | None = None,
) -> None:
    """Let one engine score what a cache lacks; `top`: the ids that it is asked at, with the teacher's own values."""
    todo = scoring.left_to_do(batches, stored_keys(folder, meta), process.rank, process.world_size)
    if not todo:
        return
    teacher = start()
    scored = teacher if top is None else partial(_advantages, teacher, top, config.beta)
    writer = Writer(folder, meta, process.rank)
    try:
        score_all(todo, writer, scored, f"cache, {what}", process.is_main, config.flush_seconds)
    finally:
        writer.close()
        teacher.close()


def _advantages(teacher: EngineTeacher, top: Reader, beta: float, rows: list[Tokens]) -> list[Arrays]:
    """Return beta (log pi_teacher - log pi_reference) at the ids that the teacher gave (teacher/scoring.py)."""
    found = [top.get(row.ids, row.response) for row in rows]
    reference = teacher.logps(rows, [arrays["ids"] for arrays in found])
    return [
        arrays | {"values": beta * (arrays["values"] - logps), "teacher_logps": arrays["values"]}
        for arrays, logps in zip(found, reference, strict=True)
    ]
