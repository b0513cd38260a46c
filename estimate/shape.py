"""The numbers of a model without its weights."""

from estimate.arithmetic import Model
from estimate.llama import llama_of
from settings.schema import ModelConfig


def shape_of(config: ModelConfig) -> Model:
    """Count a model's parameters; ValueError if there is no configuration to read, or for mixtures of experts.

    A Llama is counted from its keywords. Everything else is built on the meta device, for which torch is loaded.
    """
    model = llama_of(config)
    if model is not None:
        return model
    from estimate.meta_model import counted

    return counted(config)
