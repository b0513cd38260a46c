"""Our side of benchmarks/run.py: a process that trains, scores or multiplies matrices, a turn at a time.

    python -m benchmarks.ours train OVERRIDES...    # task=train as launch.py runs it; a turn is an optimizer step
    python -m benchmarks.ours cache OVERRIDES...    # a turn is a whole task=cache, or the bare forward pass
    python -m benchmarks.ours matmul                # a turn measures the machine's matmul rate
    python -m benchmarks.ours teachers FOLDER OVERRIDES...   # writes made-up teachers' caches and generations
    python -m benchmarks.ours save FOLDER OVERRIDES...       # writes a built model as a folder that rivals can load
    python -m benchmarks.ours store OVERRIDES...    # tokenizes and stores the rows

Nothing of a trainer is copied: overrides reach every switch, and what changes in the code is what is measured.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import launch
import models
from benchmarks.figures import entropy_bytes
from benchmarks.made_up import write_teachers
from benchmarks.measure import Clock, ComputedTokens
from benchmarks.turns import Served
from dataloader import collate, epoch_order, load_examples
from estimate.shape import shape_of
from pipeline.run_folder import versions
from settings.paths import CONFIG
from teacher.cache import Reader
from trainers.basic import BasicTrainer
from trainers.batches import Item


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose the config as launch.py does."""
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        raw: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    raw.pop("pipeline", None)
    raw["datasets"] = raw.get("datasets") or {}
    return {str(key): value for key, value in raw.items()}


def facts() -> dict[str, Any]:
    """Say what computes."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


# ---- training


def prompt_length(item: Item) -> int:
    """Return how many tokens all sequences of an item share before the first supervised one of any; 0 of one."""
    if len(item.sequences) < 2:
        return 0
    ids = [tokens.ids for tokens in item.sequences]
    supervised = [tokens.response.index(True) for tokens in item.sequences if any(tokens.response)]
    shared = min(supervised, default=0)
    return shared if all(one[:shared] == ids[0][:shared] for one in ids) else 0


def tokens_of(items: Sequence[Item]) -> dict[str, int]:
    """Count what items need: tokens with a shared prompt once, tokens of the sequences, pairs of tokens that see each
    other (as n squared), supervised tokens.
    """
    needed = squares = whole = supervised = 0
    for item in items:
        shared = prompt_length(item)
        lengths = [len(tokens.ids) for tokens in item.sequences]
        whole += sum(lengths)
        needed += shared + sum(length - shared for length in lengths)
        squares += shared**2 + sum(length**2 - shared**2 for length in lengths)
        supervised += sum(sum(tokens.response) for tokens in item.sequences)
    return {"needed": needed, "sequences": whole, "squares": squares, "supervised": supervised}


def write_sides(rows: Iterable[Sequence[Any]], path: Path) -> None:
    """Write token ids and supervised places of each row's sequences, for rivals."""
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            sides = [{"ids": t.ids, "response": [int(on) for on in t.response]} for t in row]
            out.write(json.dumps({"sides": sides}) + "\n")


def in_order(items: Sequence[Item], epochs: int, seed: int) -> Iterator[Sequence[Any]]:
    """Yield every epoch's items in the order in which we take them up: rivals get the very same."""
    for epoch in range(epochs):
        for number in epoch_order(len(items), seed, epoch):
            yield items[number].sequences


class Trained:
    """Puts a turn around every optimizer step of whatever trainer the loss names."""

    def __init__(self, served: Served) -> None:
        self.served, self.step = served, BasicTrainer._step
        self.clock: Clock | None = None
        self.tokens: dict[str, int] = {}

    def prepare(self, trainer: BasicTrainer) -> None:
        """Say that the first step can begin, and what it works on."""
        first = self.served.wait()
        items = [trainer.train_items[i] for i in range(len(trainer.train_items))]
        self.tokens = tokens_of(items)
        if first.get("rows"):
            ordered = in_order(items, int(first["epochs"]), trainer.run_config.seed)
            write_sides(ordered, Path(first["rows"]))
        shape = shape_of(trainer.model_config)
        self.computed = ComputedTokens(trainer.placement.unwrapped(trainer.policy))
        self.served.answer(**facts(), shape=shape._asdict(), tokens=self.tokens, live=trainer.reference is not None)

    def __call__(self, trainer: BasicTrainer, number: int) -> int:
        """Wait for the turn, do the step, tell its cost."""
        if self.clock is None:
            self.prepare(trainer)
        self.served.wait()
        self.clock = self.clock or Clock()
        self.clock.begin()
        result = self.step(trainer, number)
        self.served.answer(**self.clock.end(), computed=self.computed.taken())
        return result


def train(served: Served, overrides: Sequence[str]) -> None:
    """Run task=train until nobody asks for a further step."""
    turn = Trained(served)
    BasicTrainer._step = lambda trainer, number: turn(trainer, number)  # type: ignore[method-assign]
    launch.run_task(composed(overrides))


# ---- scoring


class FirstForward:
    """Notes when the first forward pass of any model begins that models.load_model gives."""

    def __init__(self) -> None:
        self.load, self.clock = models.load_model, Clock()
        self.seen = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Load a model as ever, and watch it."""
        model = self.load(*args, **options)
        model.get_input_embeddings().register_forward_pre_hook(self._note)
        return model

    def _note(self, *_: Any) -> None:
        if not self.seen:
            self.seen = True
            self.clock.begin()


def cache(served: Served, overrides: Sequence[str]) -> None:
    """Answer "cache" by a whole task=cache and "forward" by the bare forward passes of the same sequences."""
    watch = FirstForward()
    models.load_model = watch  # type: ignore[assignment]
    raw, count, forward = composed(overrides), 0, None
    while True:
        message = served.wait()
        if message["do"] == "start":
            tokens = sequences_of(raw)
            if message.get("rows"):
                rows = [
                    json.dumps({"sides": [{"ids": t.ids, "response": [int(r) for r in t.response]}]}) for t in tokens
                ]
                Path(message["rows"]).write_text("\n".join(rows) + "\n", encoding="utf-8")
            scored = {"supervised": sum(t.num_supervised for t in tokens), "sequences": sum(t.length for t in tokens)}
            served.answer(**facts(), tokens=scored)
        elif message["do"] == "cache":
            watch.seen, count = False, count + 1
            run = composed([*overrides, f"run_count=turn{count}"])
            launch.run_task(run)
            folder = Path(run["cache_dir"]) / run["exp_name"] / f"turn{count}" / "CACHE"
            served.answer(**watch.clock.end(), folder=str(folder))
        elif message["do"] == "bytes":
            served.answer(**sizes(Path(message["folder"]), sequences_of(raw)))
        else:
            forward = forward or Forward(raw)
            watch.clock.begin()
            forward()
            served.answer(**watch.clock.end())


def sequences_of(raw: dict[str, Any]) -> list[Any]:
    """Return what task=cache scores, longest first, each content once."""
    settings = launch.settings_of(raw)
    tokenizer, run = models.load_tokenizer(settings.model), settings.run
    examples = load_examples(
        settings.datasets, "train", tokenizer, settings.model, run.n_examples, run.seed, run.tokens_dir, 1
    )
    found = [t for e in examples for t in (e.chosen, e.rejected) if t is not None]
    unique = {t.key: t for t in found}
    return sorted(unique.values(), key=lambda t: -t.length)


class Forward:
    """The forward passes of one model or two over padded batches, every logit computed, nothing kept."""

    def __init__(self, raw: dict[str, Any]) -> None:
        settings, tokens = launch.settings_of(raw), sequences_of(raw)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pad, size = models.load_tokenizer(settings.model).pad_token_id, settings.cache.batch_size
        self.batches = [collate(tokens[start : start + size], pad).to(device) for start in range(0, len(tokens), size)]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        sources = (None, settings.cache.reference)[: 2 if settings.cache.reference else 1]
        load = lambda source: models.load_model(settings.model, dtype=dtype, trainable=False, source=source)  # noqa: E731
        self.models = [load(source).to(device).eval() for source in sources]

    @torch.inference_mode()
    def __call__(self) -> None:
        """Do them all."""
        for batch in self.batches:
            for model in self.models:
                model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)


# ---- floors


def sizes(folder: Path, tokens: Sequence[Any]) -> dict[str, float]:
    """Return a cache's bytes per response token on disk, and what an ideal code of order zero needs for its entries.

    Symbols are the token ids, the steps from one log-probability of a token to the next smaller one, and advantages,
    numbers as float16 patterns. Frequencies are those of this very cache: of a small one they flatter the code.
    """
    reader, count = Reader(folder), sum(t.num_supervised for t in tokens)
    entries = [reader.get(t.ids, t.response) for t in tokens]
    joined = lambda name: np.concatenate([np.asarray(one[name]) for one in entries])  # noqa: E731
    wide = "teacher_logps" in entries[0]
    logps = joined("teacher_logps" if wide else "values").astype(np.float16).view(np.int16).astype(np.int64)
    symbols = [joined("ids"), np.diff(logps, axis=1, prepend=0)]
    symbols += [joined("values").astype(np.float16).view(np.int16)] if wide else []
    ideal = sum(entropy_bytes(np.unique(part, return_counts=True)[1].tolist()) * part.size for part in symbols)
    whole = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"bytes_per_token": whole / count, "entropy": ideal / count}


def matmul(served: Served) -> None:
    """Answer every turn with the FLOP/s of a large matrix product: float32 on CPU, bfloat16 on a GPU."""
    gpu = torch.cuda.is_available()
    size, device, dtype = (8192, "cuda", torch.bfloat16) if gpu else (1536, "cpu", torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    served.wait()
    served.answer(**facts())
    clock = Clock()
    while True:
        served.wait()
        clock.begin()
        times = 20 if gpu else 8
        for _ in range(times):
            left @ right
        found = clock.end()
        served.answer(**found, flops=2 * times * size**3 / found["seconds"])


def teachers(served: Served, rest: Sequence[str]) -> None:
    """Write made-up teachers into a folder."""
    settings = launch.settings_of(composed([*rest[1:], "loss=sft"]))
    served.wait()
    served.answer(**dataclasses.asdict(write_teachers(settings, Path(rest[0]))))


def save(served: Served, rest: Sequence[str]) -> None:
    """Write a built model with its tokenizer."""
    config = launch.settings_of(composed(rest[1:])).model
    served.wait()
    models.load_model(config, dtype=torch.float32, trainable=False).save_pretrained(rest[0])
    models.load_tokenizer(config).save_pretrained(rest[0])
    served.answer(folder=rest[0])


def store(served: Served, overrides: Sequence[str]) -> None:
    """Tokenize the rows into an empty store, in one process."""
    settings = launch.settings_of(composed([*overrides, "loss=sft"]))
    tokenizer, run = models.load_tokenizer(settings.model), settings.run
    served.wait()
    clock = Clock()
    load_examples(settings.datasets, "train", tokenizer, settings.model, None, run.seed, run.tokens_dir, 1)
    served.answer(**clock.end())


def main() -> None:
    """Serve what the command line names."""
    served, (what, *rest) = Served(), sys.argv[1:]
    if what == "matmul":
        matmul(served)
    else:
        {"train": train, "cache": cache, "teachers": teachers, "save": save, "store": store}[what](served, rest)


if __name__ == "__main__":
    main()
