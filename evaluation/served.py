"""Models of an evaluation that a server answers for: task=evaluate generation.backend=openai (docs/export.md).

Their folder gives tokenizer, template and what ends a turn; the responses are the server's.
"""

from dataclasses import replace
from typing import Any

from evaluation.turns import Answered, Sample
from generation.openai import OpenAIBackend
from settings.schema import EvaluationConfig, GenerationConfig, Settings


def served_names(settings: Settings) -> list[str]:
    """Return the models that the server of the generation section answers for; none without one."""
    config = settings.evaluation
    if settings.generation.backend != "openai":
        return []
    return config.served or list(config.models)


def check_served(settings: Settings) -> None:
    """Refuse what a server cannot be asked for, and what would be asked of nobody."""
    config, generation = settings.evaluation, settings.generation
    names = served_names(settings)
    if not names and config.served:
        raise ValueError(
            f"evaluation.served={config.served} needs their server: generation.backend=openai generation.base_url=http://..."
        )
    if generation.backend not in ("auto", "hf", "openai"):
        raise ValueError(
            f"generation.backend={generation.backend}: task=evaluate asks models by Hugging Face's generate (auto, "
            "hf) or a server (openai)"
        )
    if len(names) > 1:
        raise ValueError(
            f"generation.base_url={generation.base_url} answers for one model, not for {', '.join(names)}: name it, "
            f"evaluation.served=[{names[0]}]; the others are read from their folders"
        )
    if names:
        _check_weights(config, names[0])


def _check_weights(config: EvaluationConfig, name: str) -> None:
    """Refuse figures that need the weights of a model that is served."""
    asked = {
        "reward_accuracy=true": config.reward_accuracy,
        "latency=true": config.latency,
        "calculator=true": config.calculator,
        f"lm_eval={config.lm_eval}": bool(config.lm_eval),
        f"match_entropy={config.match_entropy}": config.match_entropy is not None,
    }
    for key, wanted in asked.items():
        if wanted:
            raise ValueError(
                f"evaluation.{key} needs the weights of every model, and {name} is asked through a server: leave it "
                "out, or evaluate the folder that was exported"
            )


def from_server(settings: Settings, generation: GenerationConfig, tokenizer: Any, stop: list[int], seed: int) -> Sample:
    """Return what answers prompts through the server; how it drew a token it does not say, so there is no entropy."""
    backend = OpenAIBackend(replace(settings, generation=generation), tokenizer, stop)

    def sample(prompts: list[list[int]]) -> list[Answered]:
        found = {answer.number: answer for answer in backend.answers(prompts, range(len(prompts)), seed)}
        return [(found[i].ids, found[i].finish_reason, None) for i in range(len(prompts))]

    return sample


def server_facts(generation: GenerationConfig) -> list[Any]:
    """Return what tells one server's answers from another's, beside the model's folder."""
    return ["served", generation.model_name or generation.base_url, generation.text_responses]
