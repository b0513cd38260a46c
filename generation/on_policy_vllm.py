"""A vLLM engine beside a policy that trains: it is handed the weights and answers prompts, each by a seed of its own.

The engine starts from the policy's architecture alone, without weights. Ties are undone in it: its last layer is a
matrix of its own, because an engine on a CPU lays out a copy of it that would stay as it was.
"""

import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.checks import Gap, logp_gap
from generation.interface import Answer, cut
from generation.vllm import Request, bias_against, finished, sampling_params, shut_down, started
from settings.sections import ResponderConfig
from tokens.examples import Tokens

GPU_SHARE = 0.3  # of a GPU's memory, for an engine's weights and cache beside what trains


class VllmResponder:
    """An engine with a copy of a policy's weights, as they were when it was last handed them."""

    def __init__(
        self, config: ResponderConfig, model: Any, vocab_size: int, dtype: torch.dtype, max_length: int, pad_id: int
    ) -> None:
        self.config, self.vocab_size, self.pad_id = config, vocab_size, pad_id
        architecture = model.config.get_text_config()
        width = int(architecture.vocab_size)
        self.bias = bias_against(range(vocab_size, width), width, vocab_size, "rollout.backend=hf")
        options: dict[str, Any] = {"load_format": "dummy", "hf_overrides": {"tie_word_embeddings": False}}
        if torch.cuda.is_available() and not config.kv_cache_gb:
            options["gpu_memory_utilization"] = GPU_SHARE
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(Path(folder))
            self.llm = started(folder, dtype, max_length, 1, config.kv_cache_gb, **options)
        self.block: int | None = None  # the block of steps whose first weights it has
        self.fresh_step = 0  # the step whose weights it has

    def is_due(self, step: int) -> bool:
        """Tell whether a step (from 1) begins with new weights."""
        return self.block != (step - 1) // self.config.refresh_every

    def hand_over(self, step: int, weights: Iterable[tuple[str, Tensor]], head: Tensor) -> None:
        """Take a step's weights by their names in the library, and the last layer's; forget what was cached."""
        named = {name: tensor for name, tensor in weights if name != "lm_head.weight"}
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter([*named.items(), ("lm_head.weight", head)])}
        )
        if not self.llm.reset_prefix_cache():
            raise ValueError("vLLM did not forget the keys and values of the weights before: use rollout.backend=hf")
        self.block, self.fresh_step = (step - 1) // self.config.refresh_every, step

    def answers(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], max_new_tokens: int, stop: list[int]
    ) -> list[Answer]:
        """Answer every prompt by what its weights say over the tokenizer's vocabulary, row i by seeds[i]."""

        def request(i: int) -> Request:
            return str(i), prompts[i], sampling_params(stop, self.bias, max_new_tokens, seeds[i])

        found: dict[int, Answer] = {}
        for output in finished(self.llm, deque(range(len(prompts))), request):
            number, made = int(output.request_id), output.outputs[0]
            ids, reason = cut(list(made.token_ids), stop)
            logps = [float(entry[token].logprob) for token, entry in zip(ids, made.logprobs, strict=True)]
            found[number] = Answer(number, ids, reason, logps)
        return [found[i] for i in range(len(prompts))]

    def gap(self, model: Any, prompts: Sequence[list[int]], said: Sequence[Answer]) -> Gap:
        """Compare the engine's log-probabilities of the first responses with those that training would have."""
        count = min(self.config.check_rows, len(said))
        rows = [
            Tokens([*prompt, *one.ids], [False] * len(prompt) + [True] * len(one.ids))
            for prompt, one in zip(prompts[:count], said[:count], strict=True)
        ]
        theirs = [one.logps or [] for one in said[:count]]
        return logp_gap(model, rows, theirs, self.pad_id, self.vocab_size, count)

    def close(self) -> None:
        """End the engine and free its memory."""
        shut_down(self.llm)
        del self.llm
