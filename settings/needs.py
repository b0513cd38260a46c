"""What a method needs, and the refusal of combinations that cannot work, before a model loads."""

from settings.methods import Needs
from settings.schema import Settings, require


def check_needs(settings: Settings, needs: Needs, name: str, head: str) -> None:
    """Raise ValueError for options that this method cannot honor."""
    run, model = settings.run, settings.model
    cached = run.cache_reference_logprobs or bool(run.load_reference_logprobs)
    key = "load_reference_logprobs" if run.load_reference_logprobs else "cache_reference_logprobs=true"
    require(
        not cached or needs.reference != "", f"{key}: loss={name} has no reference model, so there is nothing to cache"
    )
    require(
        not cached or needs.reference == "logps",
        f"{key}: loss={name} compares whole distributions with the reference's, a cache holds the log-probabilities of "
        "the "
        "response tokens only: leave it out, the reference stays in memory",
    )
    require(
        needs.reference == ""
        or not model.from_checkpoint
        or bool(model.load_from or model.name_or_path or model.build),
        f"model.from_checkpoint={model.from_checkpoint}: loss={name} needs a reference, and the model where training "
        "started is not named. Set model.load_from=FOLDER or model.name_or_path to where training started",
    )
    require(
        not (run.sample_every and head == "reward"),
        f"sample_every={run.sample_every}: loss={name} trains a model that scores and writes nothing; leave it out",
    )
    if run.sync_reference:
        key = f"sync_reference={run.sync_reference}"
        require(needs.reference != "", f"{key}: loss={name} has no reference model to move")
        require(
            not cached, f"{key} moves the reference while training, cached log-probabilities stand still: choose one"
        )
        rate = run.sync_reference_rate
        require(
            rate == 1 or model.master_dtype != "bfloat16",
            f"sync_reference_rate={rate} with model.master_dtype=bfloat16: the average is stored as the policy is, and "
            "in bfloat16 it does not move. Leave model.master_dtype=auto, or copy with sync_reference_rate=1",
        )
        require(
            not model.use_peft,
            f"{key}: with model.use_peft=true the reference is the model without its adapter, which does not move",
        )
    require(
        not (head == "reward" and model.activation_checkpointing and model.use_peft),
        f"loss={name} with model.use_peft=true and model.activation_checkpointing=true is not supported: drop one of "
        "them",
    )
