"""How cost grows: a step with its tokens, tokenizing with its rows; slopes in logarithms, 1 is in proportion.

The tiny model and made-up rows: what is looked for is a part that grows faster than the work, and that shows there.
"""

from benchmarks import works
from benchmarks.figures import Figure, figure, slope
from benchmarks.made_up_rows import write_mix
from benchmarks.turns import Message
from benchmarks.works import Setup

PAIRS = (16, 64, 256)  # a step of 10^4 to 10^5.2 tokens, 8 pairs in a micro-batch
ROWS = (1_000, 10_000, 100_000)


def figures(setup: Setup) -> dict[str, Figure]:
    """Measure every size and fit the slopes."""
    folder = setup.folder / "growth"
    folder.mkdir()
    tiny = setup._replace(shape="tiny", micro=8, sets=(), data=None, folder=folder)
    steps = [_step(tiny._replace(pairs=pairs)) for pairs in PAIRS]
    stores = [_store(tiny, rows) for rows in ROWS]
    return _told("growth_tokens", "tokens", steps) | _told("growth_rows", "rows", stores)


def _told(name: str, unit: str, found: list[Message]) -> dict[str, Figure]:
    sizes = [float(one["size"]) for one in found]
    told: dict[str, Figure] = {}
    for one in found:
        told[f"{name}.{one['size']}_{unit}_time"] = figure([one["seconds"]], "s")
        told[f"{name}.{one['size']}_{unit}_peak"] = figure([one["peak_bytes"] / 2**30], "GiB")
    for cost, key in (("seconds", "time_slope"), ("peak_bytes", "memory_slope")):
        told[f"{name}.{key}"] = figure([slope(sizes, [one[cost] for one in found])], "", "higher")
    return told


def _step(setup: Setup) -> Message:
    """Return the fastest of three DPO steps: the smallest size is a second, and noise only adds."""
    write_mix(setup.folder / "pairs.jsonl", setup.pairs)
    name = f"growth_{setup.pairs}"
    overrides = works.untrained(works.train_overrides(setup, name, ["loss=dpo", "cache_reference_logprobs=true"]))
    worker = works.start_ours(setup, name, "train", overrides)
    try:
        start = worker.ask("start")
        turns = [worker.ask("step") for _ in range(4)]
    finally:
        worker.close()
    seconds = min(turn["seconds"] for turn in turns[1:])
    return {"size": start["tokens"]["sequences"], "seconds": seconds, "peak_bytes": turns[-1]["peak_bytes"]}


def _store(setup: Setup, rows: int) -> Message:
    """Return what it costs to tokenize and store so many pairs."""
    path = setup.folder / f"rows-{rows}.jsonl"
    write_mix(path, rows)
    overrides = [
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={path}",
        f"cache_dir={setup.folder / str(rows)}",
    ]
    worker = works.start_ours(setup, f"store_{rows}", "store", overrides)
    try:
        return {"size": rows, **worker.ask("start")}
    finally:
        worker.close()
