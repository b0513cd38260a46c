"""What a scoring server is asked and how its answers are read: vLLM's token-in, token-out endpoint, as pure functions.

Row t of an answer belongs to the distribution that predicts token t of the sequence. Everything that comes back is
checked: ids, number of rows, K, finite values. Letters: L response tokens of a sequence, K ids a token, V vocabulary.
"""

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PATH = "/inference/v1/generate"  # beside /v1, not in it
IMPOSSIBLE = -9000.0  # vLLM writes -9999 for minus infinity
ROUNDING = 1e-5  # by which a log-probability may be above 0
MASS = 1.01  # probabilities of a row sum to at most this: servers round each

Body = dict[str, Any]


class TopK(NamedTuple):
    """The K most probable ids before each response token: ids [L, K], logps float32 [L, K], the mass outside [L]."""

    ids: np.ndarray
    logps: np.ndarray
    tail: np.ndarray


# ---- requests


def top_k_request(model: str, ids: Sequence[int], k: int) -> Body:
    """Ask for the k most probable ids of every position; k = -1 asks for the whole vocabulary.

    One token has to be generated; it is thrown away.
    """
    sampling = {"temperature": 0, "max_tokens": 1, "detokenize": False, "prompt_logprobs": k}
    return {"model": model, "token_ids": list(ids), "return_token_ids": True, "sampling_params": sampling}


def given_ids_request(model: str, ids: Sequence[int], response: Sequence[bool], wanted: np.ndarray) -> Body:
    """Ask for the log-probabilities of wanted [L, K] before each response token; other positions are padded with -1."""
    rows, start = given_rows(ids, response, wanted)
    sampling: Body = {"temperature": 0, "max_tokens": 1, "detokenize": False}
    sampling |= {"prompt_logprob_token_ids": rows.tolist(), "prompt_logprob_start": start}
    return {"model": model, "token_ids": list(ids), "return_token_ids": True, "sampling_params": sampling}


def given_rows(ids: Sequence[int], response: Sequence[bool], wanted: np.ndarray) -> tuple[np.ndarray, int]:
    """Return wanted [L, K] as vLLM takes it: a row a token from the first of the response on, those of other tokens
    filled with -1; and the position that the first row predicts from.
    """
    at = response_positions(ids, response)
    rows = np.full((len(ids) - int(at[0]), wanted.shape[1]), -1, dtype=np.int64)
    rows[at - at[0]] = wanted
    return rows, int(at[0]) - 1


def response_positions(ids: Sequence[int], response: Sequence[bool]) -> np.ndarray:
    """Return the places of the response tokens [L]; ValueError if nothing stands before the first."""
    at = np.flatnonzero(np.asarray(response, dtype=bool))
    if len(ids) != len(response) or not len(at) or at[0] == 0:
        raise ValueError(f"a sequence of {len(ids)} tokens has no response behind a prompt: nothing to ask for")
    return at


# ---- answers


def checked_rows(answer: Mapping[str, Any], ids: Sequence[int]) -> list[Mapping[str, Any]]:
    """Return the rows of prompt_logprobs, one a token; ValueError if the ids are not ours or rows are missing."""
    _check_ids(answer, ids)
    rows = answer.get("prompt_logprobs")
    if rows is None:
        raise ValueError("the answer has no prompt_logprobs: the server ignores that field of sampling_params")
    if len(rows) != len(ids):
        raise ValueError(f"prompt_logprobs has {len(rows)} rows for {len(ids)} tokens")
    return rows


def top_k_of(answer: Mapping[str, Any], ids: Sequence[int], response: Sequence[bool], k: int, vocab_size: int) -> TopK:
    """Read the top k before each response token, by rank. A row has K entries, and one more where the token itself is
    not among them.
    """
    rows, at = checked_rows(answer, ids), response_positions(ids, response)
    _check_own(rows, ids, at.tolist())
    found = [_ranked(rows[t], ids[t], k, t) for t in at]
    top = np.array([[entry[1] for entry in row] for row in found], dtype=np.int64)
    logps = np.array([[entry[2] for entry in row] for row in found], dtype=np.float64)
    if top.min() < 0 or top.max() >= vocab_size:
        raise ValueError(
            f"id {top.max() if top.max() >= vocab_size else top.min()} is among the top {k}, and the tokenizer has "
            f"{vocab_size} tokens: the server's model has a padded vocabulary with mass on the padding, or another "
            "tokenizer"
        )
    check_finite(logps)
    mass = np.exp(logps).sum(axis=1)
    if mass.max() > MASS:
        raise ValueError(
            f"the probabilities before token {at[mass.argmax()]} sum to {mass.max():.3g}: what the server gives are no "
            "log-probabilities of one softmax"
        )
    tail = np.clip(1.0 - mass, 0.0, None)
    return TopK(top, logps.astype(np.float32), tail.astype(np.float32))


def _ranked(row: Mapping[str, Any] | None, own: int, k: int, place: int) -> list[tuple[int, int, float]]:
    """Return the k entries (rank, id, log-probability) of a row by rank, whatever order they came in."""
    entries = [(int(e["rank"]), int(i), float(e["logprob"])) for i, e in (row or {}).items() if (e["rank"] or 0) >= 1]
    kept = sorted(entry for entry in entries if entry[0] <= k)
    if len(kept) == k + 1:  # a tie at the border: the token itself, which every row has, stands outside
        kept = [entry for entry in kept if entry[1] != own]
    if len(kept) != k:
        raise ValueError(
            f"{len(kept)} of the {k} most probable ids came back before token {place}: the server gives fewer "
            "than cache.top_k (start it with --max-logprobs of at least that)"
        )
    return kept


def given_logps_of(answer: Mapping[str, Any], ids: Sequence[int], response: Sequence[bool], k: int) -> np.ndarray:
    """Read the log-probabilities of given ids before each response token, float32 [L, K], from base64 .npy."""
    _check_ids(answer, ids)
    text = answer.get("prompt_token_id_logprobs")
    if text is None:
        raise ValueError(
            "the answer has no prompt_token_id_logprobs: the server ignores prompt_logprob_token_ids, which vLLM 0.32 "
            "has with VLLM_USE_V2_MODEL_RUNNER=1. cache.given_ids=whole_vocabulary goes without it, slowly"
        )
    try:
        table = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, TypeError) as error:
        raise ValueError(f"prompt_token_id_logprobs is no .npy file in base64 ({error})") from error
    return scores_at(table, ids, response, k)


def scores_at(table: np.ndarray, ids: Sequence[int], response: Sequence[bool], k: int) -> np.ndarray:
    """Take the rows of the response tokens, float32 [L, K], out of vLLM's answer to given_rows."""
    at = response_positions(ids, response)
    shape = (len(ids) - int(at[0]), k)
    if table.shape != shape or table.dtype != np.float32:
        raise ValueError(f"prompt_token_id_logprobs is {table.dtype} {table.shape}, asked for float32 {shape}")
    found = table[at - at[0]]
    check_finite(found)
    return found


def gathered_logps_of(
    answer: Mapping[str, Any], ids: Sequence[int], response: Sequence[bool], wanted: np.ndarray
) -> np.ndarray:
    """Read the log-probabilities of wanted [L, K] from an answer with the whole vocabulary, float32 [L, K]."""
    rows, at = checked_rows(answer, ids), response_positions(ids, response)
    found = np.empty(wanted.shape, dtype=np.float32)
    for place, (t, row_ids) in enumerate(zip(at, wanted, strict=True)):
        row = rows[t] or {}
        missing = next((i for i in row_ids if str(i) not in row), None)
        if missing is not None:
            raise ValueError(
                f"id {missing} is missing among the {len(row)} entries before token {t}: that is not the whole "
                "vocabulary (start the server with --max-logprobs -1)"
            )
        found[place] = [row[str(i)]["logprob"] for i in row_ids]
    check_finite(found)
    return found


def own_logps_of(answer: Mapping[str, Any], ids: Sequence[int]) -> np.ndarray:
    """Read the log-probability of every token but the first, float64 [len(ids) - 1]; each row has its own token."""
    rows = checked_rows(answer, ids)
    _check_own(rows, ids, range(1, len(ids)))
    found = np.array([rows[t][str(ids[t])]["logprob"] for t in range(1, len(ids))], dtype=np.float64)
    check_finite(found)
    return found


def _check_own(rows: Sequence[Mapping[str, Any] | None], ids: Sequence[int], places: Sequence[int]) -> None:
    """Refuse a row without the token that it predicts, which each row has: it is another token's."""
    missing = next((t for t in places if str(ids[t]) not in (rows[t] or {})), None)
    if missing is not None:
        raise ValueError(f"the row of token {missing} lacks the token itself (id {ids[missing]})")


def _check_ids(answer: Mapping[str, Any], ids: Sequence[int]) -> None:
    came = answer.get("prompt_token_ids")
    if came is None:
        raise ValueError("the answer has no prompt_token_ids: the server ignores return_token_ids")
    if list(came) != list(ids):
        first = next((i for i, (a, b) in enumerate(zip(came, ids, strict=False)) if a != b), min(len(came), len(ids)))
        raise ValueError(
            f"the server scored other ids than were sent: {len(came)} of {len(ids)}, the first difference at {first}: "
            f"{list(came)[first : first + 4]} instead of {list(ids)[first : first + 4]}"
        )


def check_finite(logps: np.ndarray) -> None:
    """Refuse what is no log-probability: NaN, infinite, vLLM's stand-in for minus infinity, or above 0."""
    bad = ~np.isfinite(logps) | (logps < IMPOSSIBLE) | (logps > ROUNDING)
    if bad.any():
        value = float(logps[bad][0])
        why = "not finite" if not math.isfinite(value) or value < IMPOSSIBLE else "above 0"
        raise ValueError(f"{int(bad.sum())} of {bad.size} log-probabilities are {why}, the first is {value}")
