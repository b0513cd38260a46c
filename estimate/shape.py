"""The numbers of a model without its weights."""

from estimate.arithmetic import Model
from estimate.llama import kind_of, llama_of
from settings.schema import ModelConfig


def shape_of(config: ModelConfig, may_build: bool = True) -> Model:
    """Count a model's parameters; ValueError if there is no configuration to read, or for mixtures of experts.

    A Llama and its relatives are counted from their keywords. Everything else is built on the meta device, for which
    torch is loaded; where it may not be (in a plan), ValueError says so.
    """
    model = llama_of(config)
    if model is not None:
        return model
    if not may_build:
        kind = kind_of(config)
        what = f"a {kind}" if kind else "a model whose config.json is not on this machine"
        raise ValueError(f"{what} is not counted in a plan: task=estimate counts it, or estimate.lengths=tokens here")
    from estimate.meta_model import counted

    return counted(config)
