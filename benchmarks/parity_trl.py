"""Our loss and gradient against TRL's, side by side in one process: same weights, same batch, every method both have.

    uv venv /tmp/trl-venv && uv pip install --python /tmp/trl-venv/bin/python torch transformers accelerate datasets
    peft hydra-core omegaconf trl /tmp/trl-venv/bin/python -m benchmarks.parity_trl

A two-layer Llama built from a seed is the policy, another one the reference; both libraries score the very same token
ids in float32 (TRL has no float64 path). Printed: both losses, their difference, and the largest difference of any
gradient relative to the largest gradient.
"""

import contextlib
import copy
import io
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from datasets import Dataset
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

import launch
import models
from dataloader import Example, Tokens
from engine.placement import Replicated
from engine.processes import Processes
from settings.methods import method_class
from trainers.batches import Item

ROOT = Path(__file__).resolve().parents[1]
# our loss and options; TRL's trainer and its options
METHODS: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "dpo": (["loss=dpo"], "dpo", {"beta": 0.1, "loss_type": "sigmoid"}),
    "dpo, js": (
        ["loss=dpo", "loss.divergence=js"],
        "dpo",
        {"beta": 0.1, "loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
    ),
    "dpo, forward KL": (
        ["loss=dpo", "loss.divergence=forward_kl"],
        "dpo",
        {"beta": 0.1, "loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    ),
    "dpo, WPO": (
        ["loss=dpo", "loss.wpo=unclamped"],
        "dpo",
        {"beta": 0.1, "loss_type": "sigmoid", "use_weighting": True},
    ),
    "robust-dpo": (["loss=robust-dpo"], "dpo", {"beta": 0.1, "loss_type": "robust", "label_smoothing": 0.1}),
    "ipo": (["loss=ipo"], "dpo", {"beta": 0.1, "loss_type": "ipo"}),
    "hinge": (["loss=hinge"], "dpo", {"beta": 0.1, "loss_type": "hinge"}),
    "exo": (["loss=exo"], "dpo", {"beta": 0.1, "loss_type": "exo_pair", "label_smoothing": 1e-3}),
    "nca": (["loss=nca"], "dpo", {"beta": 0.1, "loss_type": "nca_pair"}),
    "sppo-hard": (["loss=sppo-hard", "loss.beta=0.1"], "dpo", {"beta": 0.1, "loss_type": "sppo_hard"}),
    "apo-zero": (["loss=apo-zero"], "dpo", {"beta": 0.1, "loss_type": "apo_zero"}),
    "apo-down": (["loss=apo-down"], "dpo", {"beta": 0.1, "loss_type": "apo_down"}),
    "aot, paired": (["loss=aot"], "dpo", {"beta": 0.1, "loss_type": "aot"}),
    "aot, unpaired": (["loss=aot", "loss.variant=unpaired"], "dpo", {"beta": 0.1, "loss_type": "aot_unpaired"}),
    "discopop": (["loss=discopop"], "dpo", {"beta": 0.1, "loss_type": "discopop"}),
    "kto": (["loss=kto", "loss.desirable_weight=1.3"], "kto", {"beta": 0.1, "desirable_weight": 1.3}),
    "bradley-terry": (
        ["loss=bradley-terry", "loss.center_weight=0.01"],
        "reward",
        {"center_rewards_coefficient": 0.01},
    ),
    "cpo": (["loss=cpo"], "cpo", {"beta": 0.1, "cpo_alpha": 1.0, "loss_type": "sigmoid"}),
    "simpo": (
        ["loss=simpo", "loss.gamma=0.5"],
        "cpo",
        {"beta": 2.0, "cpo_alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.5},
    ),
    "sft": (["loss=sft", "loss.train_on=chosen"], "dpo", {"beta": 0.1, "loss_type": "sft"}),
}


def settings_of(*overrides: str) -> Any:
    """Compose and type our configuration."""
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        raw = OmegaConf.to_container(compose("config", ["model=tiny", *overrides]), resolve=True)
    assert isinstance(raw, dict)
    raw.pop("pipeline", None)
    raw["datasets"] = raw.get("datasets") or {}
    return launch.settings_of({str(k): v for k, v in raw.items()})


def examples() -> list[Example]:
    """Return eight pairs of ragged token ids below 256 (bytes)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(32, 127, (count,), generator=generator).tolist()  # noqa: E731
    rows = []
    for i in range(8):
        prompt, responses = draw(5 + i), [draw(3 + i % 4), draw(2 + (3 * i) % 5)]
        sides = [Tokens(prompt + response, [False] * len(prompt) + [True] * len(response)) for response in responses]
        rows.append(Example(prompt, sides[0], sides[1], None, None))  # type: ignore[arg-type]
    return rows


def ours(
    policy: torch.nn.Module, reference: torch.nn.Module, overrides: list[str]
) -> tuple[float, dict[str, torch.Tensor], list[Item]]:
    """Return our loss and gradients, and the items that they are of."""
    settings = settings_of(*overrides)
    trainer = method_class(settings.raw["loss"]["trainer"])(
        settings, models.load_tokenizer(settings.model), Replicated(Processes(), settings.model)
    )
    trainer.policy, trainer.reference = policy, reference
    items: list[Item] = trainer.items(examples(), "train")
    batches = trainer.prepared([trainer.batch_of(items)], True)
    counts = trainer.global_counts(batches)
    loss = trainer.terms(batches[0], counts)[0]
    return float(loss.detach()), gradients(policy, loss), items


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Back-propagate and return every gradient, leaving none behind."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def padded(sides: list[Tokens], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad sequences as TRL's collators do: ids, attention mask, completion mask, labels."""
    longest = max(len(side.ids) for side in sides)
    fill = lambda values, pad: values + [pad] * (longest - len(values))  # noqa: E731
    batch = {
        "input_ids": torch.tensor([fill(s.ids, pad_id) for s in sides]),
        "attention_mask": torch.tensor([fill([1] * len(s.ids), 0) for s in sides]),
        "completion_mask": torch.tensor([fill([int(on) for on in s.response], 0) for s in sides]),
    }
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)}


def sides_of(items: list[Item], slot: int) -> list[Tokens]:
    """Return the sequences of a slot."""
    return [item.sequences[slot] for item in items]


def their_loss(
    method: str, options: dict[str, Any], policy: Any, reference: Any, tokenizer: Any, items: list[Item]
) -> torch.Tensor:
    """Return TRL's loss of our items, through the trainer's own compute_loss (CPO: get_batch_loss_metrics)."""
    pad = tokenizer.pad_token_id
    common = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_dropout": True}
    if method == "kto":
        rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
        classes, batch = (trl.KTOConfig, trl.KTOTrainer), padded(sides_of(items, 0), pad)
        other = padded([item.scored[0] for item in items], pad)
        batch = {
            **batch,
            **{f"KL_{key}": value for key, value in other.items()},
            "label": [item.label == 1 for item in items],
        }
        batch["label"] = torch.tensor(batch["label"])
        for key in ("labels", "KL_labels"):
            batch.pop(key)
    else:
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        both = padded(sides_of(items, 0) + sides_of(items, len(items[0].sequences) - 1), pad)
        if method == "reward":
            classes, batch = (
                (trl.RewardConfig, trl.RewardTrainer),
                {key: both[key] for key in ("input_ids", "attention_mask")},
            )
            rows = [{"chosen": "b", "rejected": "c"}] * 2
        elif method == "cpo":
            from trl.experimental.cpo import CPOConfig, CPOTrainer

            classes, half = (CPOConfig, CPOTrainer), len(items)
            names = ("input_ids", "attention_mask", "labels")
            batch = {f"chosen_{key}": both[key][:half] for key in names} | {
                f"rejected_{key}": both[key][half:] for key in names
            }
        else:
            classes, batch = (trl.DPOConfig, trl.DPOTrainer), {key: both[key] for key in both if key != "labels"}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = classes[0](output_dir=folder, **common, **options)
        models_given = {"model": policy, "ref_model": reference} if method in ("dpo", "kto") else {"model": policy}
        trainer = classes[1](
            **models_given, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.model.train()
        if method == "cpo":
            return trainer.get_batch_loss_metrics(trainer.model, batch)[0]
        return trainer.compute_loss(trainer.model, batch)


def main() -> None:
    """Print one row a method."""
    datasets.disable_progress_bars()
    settings = settings_of()
    tokenizer: PreTrainedTokenizerFast = models.load_tokenizer(settings.model)
    language_model = models.load_model(settings.model, trainable=True)
    reward_model = models.load_model(settings.model, trainable=True, head="reward")
    models.set_padding(reward_model, tokenizer)
    reference = models.load_model(settings_of("++model.build_seed=7").model, trainable=False)
    print(
        f"TRL {trl.__version__}, torch {torch.__version__}, float32, 8 pairs, "
        f"{sum(p.numel() for p in language_model.parameters())} parameters"
    )
    print("| method | ours | TRL | difference | largest gradient difference, relative |\n|---|---|---|---|---|")
    worst = 0.0
    for name, (overrides, method, options) in METHODS.items():
        policy = reward_model if method == "reward" else language_model
        loss, grads, items = ours(policy, reference, overrides)
        their = their_loss(method, options, policy, copy.deepcopy(reference), tokenizer, items)
        other, other_grads = float(their.detach()), gradients(policy, their)
        scale = max(float(g.abs().max()) for g in other_grads.values())
        off = max(float((grads[key] - other_grads[key]).abs().max()) for key in other_grads) / scale
        worst = max(worst, off, abs(loss - other) / abs(other))
        print(f"| {name} | {loss:.6f} | {other:.6f} | {abs(loss - other):.1e} | {off:.1e} |", flush=True)
    print(f"largest relative difference of a loss or a gradient: {worst:.1e}")


if __name__ == "__main__":
    main()
