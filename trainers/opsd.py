"""On-policy self-distillation (OPSD, arXiv 2601.18734): the model, shown the solution, teaches itself.

L = mean over the tokens of the student's response to the plain prompt of the generalized JSD(beta) of pi_T(.|x, y*,
y_<t) and pi_theta(.|x, y_<t). The solution y* is the row's response (of pairs the chosen one). The teacher's weights
are those where training started (with LoRA: the adapter is off); sync_reference lets them follow the policy, as the
authors' option of a moving average does. `clip` bounds what each entry of the vocabulary adds, as the authors' code
does and its first paper does not. Left out: the teacher that writes a reasoning first, and the policy-gradient form
(loss=opd has it). SDFT (2601.19897) is the same with a moving teacher. Letters: N response tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dataloader import Example, Tokens
from engine.metrics import Mean
from forward.chunks import Logits, chunked
from functional import _parts_jsd, _wide, entropies, generalized_jsd
from models import ResponseLogits
from settings.needs import Needs
from settings.schema import require
from tokens.encoding import encode_prompt
from trainers.batches import Batch, Item, supervised_sequence
from trainers.own_responses import OwnResponses, OwnResponsesConfig
from trainers.sampling import Said


@dataclass(frozen=True)
class OPSDConfig(OwnResponsesConfig):
    """Values of config/loss/opsd.yaml."""

    context: str
    max_context_length: int
    beta: float
    temperature: float
    clip: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("{prompt}", "{solution}"):
            require(field in self.context, f"loss.context={self.context!r} must hold {field}: it is put in there")
        require(self.max_context_length >= 1, f"loss.max_context_length={self.max_context_length} must be at least 1")
        require(0 <= self.beta <= 1, f"loss.beta={self.beta} must be in [0, 1]")
        require(self.temperature > 0, f"loss.temperature={self.temperature} must be above 0")
        require(self.clip is None or self.clip > 0, f"loss.clip={self.clip} must be above 0, or null for none")


def clipped_jsd(logits: Logits, teacher_logits: Logits, beta: float, temperature: float, clip: float) -> Tensor:
    """Return generalized_jsd [N] with each entry's part bounded from above; a bounded part has no gradient."""

    def of_chunk(part: Tensor, other: Tensor) -> Tensor:
        student, teacher = ((_wide(x) / temperature).log_softmax(-1) for x in (part, other))
        return _parts_jsd(student, teacher, beta).clamp(max=clip).sum(-1)

    return chunked(of_chunk, logits, (teacher_logits,), None, held=9)


def continued(prompt: list[int], response: Tokens) -> Tokens:
    """Return the response's supervised tokens behind another prompt."""
    ids = [token for token, on in zip(response.ids, response.response, strict=True) if on]
    return Tokens([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))


class OPSD(OwnResponses):
    """Unit: tokens. Slot: the response; scored beside it: the same response behind the teacher's prompt."""

    config: OPSDConfig
    Config = OPSDConfig
    needs = Needs("responses", reference="distributions")
    formula = (
        "mean over response tokens of the generalized JSD({beta}) of π_0 with the solution in its prompt and π_θ "
        "without it, at temperature {temperature}; responses: a share {on_policy} the student's own, the rest the "
        "data's"
    )
    source = "2601.18734"

    def objective(self) -> str:
        """Return the formula with the run's numbers, and the bound on an entry's part."""
        clip = self.config.clip
        return super().objective() + (f"; an entry of the vocabulary adds at most {clip}" if clip else "")

    def item(self, example: Example, response: Tokens, number: int) -> Item:
        """Return the item of a row, with its response behind the teacher's prompt."""
        given = example.response or example.chosen
        supervised_sequence(given, "a response, the solution that the teacher sees,", "opsd", example)
        return Item((response,), scored=(continued(self.context_ids(example), response),), source=number)

    def context_ids(self, example: Example) -> list[int]:
        """Return the teacher's prompt: the last message with the solution beside it; ValueError if it is too long."""
        conversation = example.conversation
        turns, said = conversation.prompt, conversation.response or conversation.chosen
        assert said is not None, "a row with response tokens has their messages"
        text = self.config.context.replace("{prompt}", turns[-1]["content"])
        text = text.replace("{solution}", said[-1]["content"])
        ids = encode_prompt(self.tokenizer, [*turns[:-1], {**turns[-1], "content": text}])
        if len(ids) > self.config.max_context_length:
            raise ValueError(
                f"{example.where}: the teacher's prompt with the solution has {len(ids)} tokens, above "
                f"loss.max_context_length={self.config.max_context_length}. Raise it, or remove the row"
            )
        return ids

    def with_response(self, item: Item, prompt: list[int], said: Said) -> Item:
        """Put what the student said behind both prompts."""
        renewed, known = super().with_response(item, prompt, said), item.scored[0]
        context = [token for token, on in zip(known.ids, known.response, strict=True) if not on]
        return renewed._replace(scored=(continued(context, renewed.sequences[0]),))

    def sums(self, out: ResponseLogits, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """Return the divergence's sum, and how much surer the teacher is."""
        config, wanted = self.config, self.scored_reference_logits(batch)
        if config.clip is None:
            divergence = generalized_jsd(out.logits, wanted, config.beta, config.temperature)
        else:
            divergence = clipped_jsd(out.logits, wanted, config.beta, config.temperature, config.clip)
        tokens, real = len(divergence), batch.supervised(0)
        with torch.no_grad():
            spread, theirs = entropies(out.logits).sum(), entropies(wanted).sum()
        return {"divergence": divergence.sum()}, {
            "entropy": Mean(spread, tokens),
            "teacher_entropy": Mean(theirs, tokens),
            "response_tokens": Mean(tokens, real.sum()),
        }
