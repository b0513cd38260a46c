"""How long the sequences of a run are: tokenized where the data is on this machine, an upper bound where it is not."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from estimate import text_lengths
from estimate.arithmetic import Batch, Work
from settings import paths
from settings.needs import Needs
from settings.schema import PACKS_FROM, Settings
from tokens.sources import open_rows

if TYPE_CHECKING:  # torch is loaded where rows are tokenized, and not before
    from dataloader import Example, Tokens

Slot = tuple[int, int, int]  # tokens, index of the first response token, response tokens


class Lengths(NamedTuple):
    """The sequences of one pass. items: those that were tokenized, a tuple of slots each (empty for an upper bound)."""

    items: list[tuple[Slot, ...]]
    number: int  # of items in the pass
    work: Work
    source: str  # where the numbers come from, for people
    about: bool = False  # counted from text, without the chat template

    @property
    def measured(self) -> bool:
        """Tell whether every item was tokenized."""
        return len(self.items) == self.number


def slot_of(tokens: "Tokens") -> Slot:
    """Return the numbers of a sequence."""
    return tokens.length, tokens.response.index(True), tokens.num_supervised


def training_slots(example: "Example", needs: Needs) -> list[tuple[Slot, ...]]:
    """Return the items that a method makes of an example; what a student will say is taken to be as long as the
    chosen.
    """
    found = [tokens for tokens in (example.chosen, example.rejected, example.response) if tokens is not None]
    if needs.data == "pairs":
        return [tuple(slot_of(tokens) for tokens in found[:2])]
    if needs.data == "feedback":
        return [(slot_of(tokens),) for tokens in found]
    answer = slot_of(example.response or example.chosen or found[0])
    return [(answer, answer)] if needs.teacher == "advantage" else [(answer,)]


def work_of(items: Sequence[tuple[Slot, ...]]) -> Work:
    """Sum over the sequences of all items."""
    slots = [slot for item in items for slot in item]
    return Work(
        len(slots),
        sum(n for n, _, _ in slots),
        sum(n * n for n, _, _ in slots),
        sum(responses for _, _, responses in slots),
    )


def is_here(settings: Settings, split: str) -> bool:
    """Tell whether the files of a split are on this machine."""
    sources = [getattr(dataset, split) for dataset in settings.datasets.values()]
    return any(sources) and all(paths.found(source) for source in sources if source)


def from_text(settings: Settings) -> bool:
    """Tell whether lengths come from the rows' text instead of their tokens: a shape alone has no tokenizer."""
    model = settings.model
    named = model.tokenizer_name_or_path or model.load_from or model.from_checkpoint or model.name_or_path
    return settings.estimate.lengths == "text" or not named


def examples_of(settings: Settings, split: str) -> tuple[Sequence["Example"], int, int]:
    """Tokenize at most estimate.rows rows of a split; return examples, the rows they come from and all rows there
    are.
    """
    if from_text(settings):
        return text_lengths.text_examples(settings, split)
    import models
    from dataloader import drawn_rows, load_examples

    run, config = settings.run, settings.model
    limit = run.n_examples if split == "train" else run.n_eval_examples
    total = sum(
        len(drawn_rows(open_rows(source, f"datasets.{name}.{split}").size(), dataset, split, run.seed, name))
        for name, dataset in settings.datasets.items()
        if (source := getattr(dataset, split))
    )
    number = min(total, limit or total)
    if config.load_from and not (Path(config.load_from).expanduser() / "config.json").is_file():
        config = replace(config, load_from=None)  # a stage that has not run; its tokenizer is the one it started with
    tokenizer = models.load_tokenizer(config)
    with redirect_stdout(io.StringIO()):
        sampled = min(number, settings.estimate.rows or number)
        # All rows of a finished run are looked at again: their tokens are kept since it began.
        kept = run.tokens_dir if settings.estimate.rows is None and run.tokens_dir.is_dir() else None
        examples = load_examples(settings.datasets, split, tokenizer, config, sampled, run.seed, kept)
    return examples, sampled, number


def scaled(items: Sequence[tuple[Slot, ...]], sampled: int, number: int, about: bool = False) -> Lengths:
    """Return the lengths of a pass from those of `sampled` of its `number` rows; `about`: counted from their text."""
    if sampled >= number:
        how = text_lengths.SAID if about else "all tokenized"
        return Lengths(list(items), len(items), work_of(items), f"{len(items):,} items, {how}", about)
    share = number / sampled
    count = round(len(items) * share)
    how = f"{text_lengths.SAID}, of {sampled:,} rows" if about else f"lengths from {sampled:,} tokenized rows"
    return Lengths(list(items), count, work_of(items).times(share), f"{count:,} items, {how}", about)


def bounded(settings: Settings, examples: float | None, slots: int, prompt_only: bool = False) -> Lengths | None:
    """Return what full-length rows would be: estimate.tokens, or a number of examples; None if neither is known."""
    length, share, response = settings.model.max_length, settings.estimate.response_share, 0
    if prompt_only:
        length, response = settings.model.max_prompt_length, settings.generation.max_new_tokens
    if settings.estimate.tokens is not None:
        sequences = settings.estimate.tokens / (length + response)
        source = f"estimate.tokens, in rows of {length + response:,} tokens"
    elif examples is not None:
        sequences, source = examples * slots, f"upper bound: {examples:,.0f} examples x {slots} x {length:,} tokens"
    else:
        return None
    tokens = sequences * length
    return Lengths([], round(sequences / slots), Work(sequences, tokens, tokens * length, tokens * share), source)


def training_lengths(settings: Settings, needs: Needs, split: str = "train") -> Lengths | None:
    """Return the lengths of one pass of training data; None if nothing says how much there is."""
    run, config = settings.run, settings.model
    slots = slots_of(needs)
    if settings.estimate.tokens is None and is_here(settings, split):
        examples, sampled, number = examples_of(settings, split)
        return scaled(
            [item for example in examples for item in training_slots(example, needs)],
            sampled,
            number,
            from_text(settings),
        )
    examples_seen = run.n_examples or (run.n_steps * config.batch_size if run.n_steps else None)
    return bounded(settings, examples_seen, slots)


def cache_lengths(settings: Settings) -> Lengths | None:
    """Return the lengths of what task=cache scores."""
    config = settings.cache
    if config.generations and paths.found(config.generations):
        from tokens.generations import read_generations

        items = [(slot_of(g.tokens),) for g in read_generations(config.generations, None) if g.response_ids]
        return scaled(items, len(items), len(items))
    slots = 1 if config.generations else len(config.responses)
    if settings.estimate.tokens is None and is_here(settings, config.split):
        examples, sampled, number = examples_of(settings, config.split)
        names = ["chosen"] if config.generations else config.responses
        found = [[t for name in names if (t := getattr(e, name) or e.response) is not None] for e in examples]
        return scaled([(slot_of(t),) for row in found for t in row], sampled, number, from_text(settings))
    return bounded(settings, settings.run.n_examples, slots)


def prompt_lengths(settings: Settings) -> Lengths | None:
    """Return the lengths of the prompts that task=generate answers; their responses are new."""
    split = settings.generation.split
    if settings.estimate.tokens is None and is_here(settings, split):
        examples, sampled, number = examples_of(settings, split)
        return scaled([((len(e.prompt), len(e.prompt), 0),) for e in examples], sampled, number, from_text(settings))
    return bounded(settings, settings.run.n_examples, 1, prompt_only=True)


# ---- micro-batches


def padded(items: Sequence[tuple[Slot, ...]]) -> Batch:
    """Return the shape of the micro-batch of these items."""
    slots = [slot for item in items for slot in item]
    length = max(n for n, _, _ in slots)
    # The position before a response predicts its first token; the last position predicts nothing.
    columns = max(first - 1 + responses for _, first, responses in slots) - min(first - 1 for _, first, _ in slots)
    return Batch(len(slots), length, columns, sum(responses for _, _, responses in slots))


def packed(items: Sequence[tuple[Slot, ...]], share: bool) -> Batch:
    """Return the shape of the packed row of these items; `share`: an item's slots have one prompt."""
    length = masks = joined = 0
    for item in items:
        prompts = {first for _, first, _ in item}
        prompt = prompts.pop() if share and len(item) > 1 and len(prompts) == 1 else 0
        rests = [n - 1 - prompt for n, _, _ in item]  # a last token predicts nothing
        length += prompt + sum(rests)
        if prompt:
            masks += sum(rest * (prompt + rest) for rest in rests)
            joined += sum(prompt + rest for rest in rests)
    responses = sum(number for item in items for _, _, number in item)
    return Batch(1, length, responses, responses, masks, joined)


def packing_of(settings: Settings) -> str:
    """Return how this run lays its batches (models.packing_of); no folder is read: a model in one is taken as wide."""
    config = settings.model
    if config.packing != "auto":
        return config.packing
    narrow = int((config.build or {}).get("hidden_size", PACKS_FROM)) < PACKS_FROM
    return "none" if config.compile or narrow else "prompts"


def laid(items: Sequence[tuple[Slot, ...]], packing: str) -> Batch:
    """Return the shape of the micro-batch of these items, as model.packing lays it."""
    return padded(items) if packing == "none" else packed(items, packing == "prompts")


def largest(batches: Sequence[Batch]) -> Batch:
    """Return a batch as large as the largest of each number."""
    rows, length, columns, responses = (max(sizes) for sizes in zip(*(batch[:4] for batch in batches), strict=True))
    masks = [batch.masks for batch in batches]
    largest_mask = None if None in masks else max(mask or 0 for mask in masks)
    return Batch(rows, length, columns, responses, largest_mask, max(batch.joined for batch in batches))


def largest_batch(settings: Settings, lengths: Lengths, devices: int, slots: int) -> Batch:
    """Return the largest micro-batch of a device: of the run's first pass if all is tokenized, else of full-length
    rows.
    """
    config = settings.model
    micro = max(1, config.batch_size // (devices * config.gradient_accumulation_steps))
    if not lengths.measured:
        return full_batch(settings, lengths, micro * slots)
    packing = packing_of(settings)
    if lengths.about:  # the longest ones together, whatever the order
        return laid(sorted(lengths.items, key=lambda item: -sum(n for n, _, _ in item))[:micro], packing)
    from dataloader import epoch_order
    from forward.dealing import deal

    order = epoch_order(len(lengths.items), settings.run.seed, 0)
    found = []
    for start in range(0, len(order), config.batch_size):
        step = order[start : start + config.batch_size]
        costs = [sum(length for length, _, _ in lengths.items[i]) for i in step]
        for parts in deal(costs, micro, devices, config.tokens_per_micro_batch):
            chosen = ([lengths.items[step[place]] for place in part] for part in parts if part)
            found += [laid(items, packing) for items in chosen]
    return largest(found)


def slots_of(needs: Needs) -> int:
    """Return how many sequences an item of a method has."""
    return 2 if needs.data == "pairs" or needs.teacher == "advantage" else 1


def unknown(settings: Settings) -> Lengths:
    """Return what stands for data of which nothing is known: rows of full length."""
    return Lengths([], 1, Work(1, 1, 1, settings.estimate.response_share), "")


def full_batch(settings: Settings, lengths: Lengths, rows: int) -> Batch:
    """Return a micro-batch of rows of max_length tokens, response tokens in their usual share."""
    length = settings.model.max_length
    share = lengths.work.responses / max(1.0, lengths.work.tokens)
    responses = round(rows * length * share)
    if packing_of(settings) != "none":
        return Batch(1, rows * length, responses, responses, 0)
    return Batch(rows, length, length - 1, responses)


def chunked_batch(lengths: Lengths, size: int, packing: str = "none") -> Batch | None:
    """Return the largest batch of `size` items taken by length, as an evaluation takes them."""
    ordered = sorted(lengths.items, key=lambda item: -sum(n for n, _, _ in item))
    starts = range(0, len(ordered), size)
    return largest([laid(ordered[i : i + size], packing) for i in starts]) if ordered else None
