"""One table and JSON of what a step and a cache cost: ours, a rival's, the floor, and their ratios, all in one run.

    python -m benchmarks.run                                   # everything, SmolLM2-135M, on CPU or the GPU there is
    python -m benchmarks.run --only sft,dpo --set model.compile=true
    python -m benchmarks.run --check                           # compare with benchmarks/baselines: names what got worse
    python -m benchmarks.run --growth                          # how cost grows with tokens a step and with rows

Each work has a process of its own, loaded before anything is timed, and is asked for a step at a time, so that works
take turns on whatever else the machine does; the first turn is not counted. Figures are medians over turns with their
range, ratios are formed turn by turn. Rivals: benchmarks/rivals/install.sh; without it their columns stay empty.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth, works
from benchmarks.figures import Figure, checkable, committed, complaints, figure, met, ratios, shown, table, unlike
from benchmarks.made_up_rows import write_mix
from benchmarks.turns import Message, Worker
from benchmarks.works import Setup

BASELINES = Path(__file__).with_name("baselines")
TRAINED = ("sft", "dpo", "dpo_precomputed", "gkd")
DISTILLED = ("dckd", "adpa")
CACHED = ("cache", "cache_advantage")
KINDS = (*TRAINED, *DISTILLED, *CACHED, "useful")
# Of TRL's time and of its peak memory, by the table.
AIMS = {"sft": (0.7, 0.7), "dpo": (0.6, 0.6), "dpo_precomputed": (0.6, 0.6), "gkd": (None, None)}
GIB = 2**30
SMALL = ("model.build.hidden_size=16", "model.build.num_attention_heads=2")
Figures = dict[str, Figure]


# ---- turns


def take_turns(setup: Setup, workers: Sequence[Worker], asked: dict[str, str]) -> dict[str, list[Message]]:
    """Ask every worker once a turn, forth and back; return the answers of all turns but the first."""
    answers: dict[str, list[Message]] = {worker.name: [] for worker in workers}
    for turn in range(setup.repeats + 1):
        for worker in workers if turn % 2 else reversed(workers):
            found = worker.ask(asked.get(worker.name, "step"))
            print(f"  turn {turn} {worker.name}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
            if turn:
                answers[worker.name].append(found)
    return answers


def seconds(answers: Sequence[Message]) -> list[float]:
    """Return the seconds of every turn."""
    return [float(found["seconds"]) for found in answers]


def processor_seconds(answers: Sequence[Message]) -> list[float]:
    """Return the processor seconds of every turn, of all threads: what others do on the machine does not show."""
    return [float(found["processor_seconds"]) for found in answers]


def peak(answers: Sequence[Message]) -> float:
    """Return the peak in GiB; each answer has that of all steps so far, the first turn's among them."""
    return max(float(found["peak_bytes"]) for found in answers) / GIB


# ---- training


def floor_flops(start: Message) -> float:
    """Return the FLOPs that a step cannot do without: every token once, a shared prompt once, no recomputation."""
    from estimate.arithmetic import Model, Work, training_flops

    tokens = start["tokens"]
    work = Work(0, tokens["needed"], tokens["squares"], tokens["supervised"])
    return training_flops(Model(**start["shape"]), work, work if start["live"] else None, False).total


def floor_bytes(start: Message) -> float:
    """Return what weights, gradients and two moments in float32 take, and a frozen reference's weights."""
    return float(start["shape"]["parameters"]) * 4 * (5 if start["live"] else 4)


def steps_of(
    setup: Setup, name: str, loss: list[str], rival: str | None, beside: Worker | None = None
) -> tuple[Message, dict[str, list[Message]]]:
    """Measure our trainer, a rival's or another one of ours, and matrix products, taking turns."""
    ours = works.start_ours(setup, name, "train", works.train_overrides(setup, name, loss))
    floor = works.start_ours(setup, "matmul", "matmul", [])
    workers = [ours, floor, *([beside] if beside else [])]
    try:
        if rival and setup.rivals:
            workers.append(works.start_trl(setup, rival))
        rows = str(setup.folder / f"{name}.rows.jsonl")
        start = ours.ask("start", rows=rows, epochs=setup.repeats + 1)
        for worker in workers[1:]:  # a rival reads the rows that ours wrote
            worker.ask("start", **({"rows": rows} if worker.name.startswith("trl_") else {}))
        return start, take_turns(setup, workers, {})
    finally:
        for worker in workers:
            worker.close()


def own_figures(name: str, start: Message, answers: dict[str, list[Message]]) -> Figures:
    """Return what is said of our step by itself and against the floor."""
    ours, rates = answers[name], [float(found["flops"]) for found in answers["matmul"]]
    flops, least = floor_flops(start), floor_bytes(start) / GIB
    floors = [flops / rate for rate in rates]
    by_processor = [
        flops / (rate * found["seconds"] / found["processor_seconds"])
        for rate, found in zip(rates, answers["matmul"], strict=True)
    ]
    shares = [start["tokens"]["needed"] / found["computed"] for found in ours]
    return {
        f"{name}.seconds": figure(seconds(ours), "s"),
        f"{name}.floor_seconds": figure(floors, "s"),
        f"{name}.floor_ratio": ratios(seconds(ours), floors),
        f"{name}.processor_floor_ratio": ratios(processor_seconds(ours), by_processor),
        f"{name}.peak": figure([peak(ours)], "GiB"),
        f"{name}.floor_peak": figure([least], "GiB"),
        f"{name}.peak_to_weights": figure([peak(ours) / least], "", "higher"),
        f"{name}.useful_share": figure(shares, "", "lower", 0.95),
    }


def against(name: str, ours: list[Message], other: list[Message], aims: tuple[float | None, float | None]) -> Figures:
    """Return what is said of our step against another one."""
    return {
        f"{name}.rival_seconds": figure(seconds(other), "s"),
        f"{name}.time_ratio": ratios(seconds(ours), seconds(other), aims[0]),
        f"{name}.processor_ratio": ratios(processor_seconds(ours), processor_seconds(other), aims[0]),
        f"{name}.rival_peak": figure([peak(other)], "GiB"),
        f"{name}.memory_ratio": figure([peak(ours) / peak(other)], "", "higher", aims[1]),
    }


def trained(setup: Setup, name: str) -> Figures:
    """Measure a method that TRL has, too."""
    loss = {
        "sft": ["loss=sft"],
        "dpo": ["loss=dpo"],
        "dpo_precomputed": ["loss=dpo", "cache_reference_logprobs=true"],
        "gkd": ["loss=gkd", f"loss.teacher={setup.model_folder}", "loss.on_policy=0"],
    }[name]
    start, answers = steps_of(setup, name, loss, name)
    found = own_figures(name, start, answers)
    rival = answers.get(f"trl_{name}")
    if rival:
        shares = [start["tokens"]["needed"] / each["computed"] for each in rival]
        found |= against(name, answers[name], rival, AIMS[name])
        found[f"{name}.rival_useful_share"] = figure(shares)
    return found


def distilled(setup: Setup, name: str) -> Figures:
    """Measure DCKD or ADPA against our SFT on both responses of every pair: equal scored tokens."""
    maker = works.start_ours(
        setup, "teachers", "teachers", [str(setup.folder / "teachers"), *works.train_overrides(setup, "teachers", [])]
    )
    try:
        made = maker.ask("start")
    finally:
        maker.close()
    loss = {
        "dckd": ["loss=dckd", f"loss.teacher_cache={made['logprobs']}"],
        "adpa": ["loss=adpa", f"loss.advantages={made['advantages']}", f"loss.generations={made['generations']}"],
    }[name]
    both = works.train_overrides(setup, f"sft_beside_{name}", ["loss=sft"], "both", per_pair=2)
    beside = works.start_ours(setup, "sft_of_both", "train", both)
    start, answers = steps_of(setup, name, loss, None, beside)
    return own_figures(name, start, answers) | against(name, answers[name], answers["sft_of_both"], (1.05, 1.05))


# ---- caching


def cached(setup: Setup, name: str) -> Figures:
    """Measure task=cache against the bare forward pass, and against the plain way of caching and merging."""
    two = name == "cache_advantage"
    if two:
        works.second_teacher(setup)
    overrides = works.cache_overrides(setup, name, two)
    ours = works.start_ours(setup, name, "cache", overrides)
    workers = [ours, works.start_ours(setup, "forward", "cache", overrides)]
    try:
        if setup.rivals:
            numbers = [str(works.TOP_K), str(works.SEQUENCES_AT_ONCE), "2" if two else "1"]
            workers.append(works.start_rival(setup, "margins", "margins_worker", numbers))
        rows = str(setup.folder / f"{name}.rows.jsonl")
        for worker in workers:  # ours writes the rows, the rival reads them
            worker.ask("start", **({} if worker.name == "forward" else {"rows": rows}))
        answers = take_turns(setup, workers, {name: "cache", "forward": "forward"})
        size = ours.ask("bytes", folder=answers[name][-1]["folder"])
    finally:
        for worker in workers:
            worker.close()
    spent, forward = seconds(answers[name]), seconds(answers["forward"])
    busy = zip(processor_seconds(answers[name]), processor_seconds(answers["forward"]), strict=True)
    found = {
        f"{name}.seconds": figure(spent, "s"),
        f"{name}.floor_seconds": figure(forward, "s"),
        f"{name}.speed_of_forward": figure([f / s for s, f in zip(spent, forward, strict=True)], "", "lower", 0.95),
        f"{name}.processor_of_forward": figure([f / s for s, f in busy], "", "lower", 0.95),
        f"{name}.peak": figure([peak(answers[name])], "GiB"),
        f"{name}.floor_peak": figure([peak(answers["forward"])], "GiB"),
        f"{name}.bytes_per_token": figure([size["bytes_per_token"]], "B", "higher"),
        f"{name}.entropy_bytes_per_token": figure([size["entropy"]], "B"),
        f"{name}.bytes_to_entropy": figure([size["bytes_per_token"] / size["entropy"]], "", "higher"),
    }
    if setup.rivals:
        found |= against(name, answers[name], answers["margins"], (None, None))
        found[f"{name}.rival_bytes_per_token"] = figure([answers["margins"][-1]["bytes_per_token"]], "B")
    return found


# ---- the useful share


def useful(setup: Setup) -> Figures:
    """Count computed and needed tokens of SFT and DPO steps of 32 pairs: on the rows of the run, and on log-normal
    lengths. A model without weight to speak of counts the same.
    """
    small = setup._replace(pairs=32, micro=4, sets=(*setup.sets, *SMALL))
    found: Figures = {}
    for rows in ("real", "mix") if setup.data else ("mix",):
        folder = setup.folder / f"useful_{rows}"
        folder.mkdir()
        one = small._replace(folder=folder, data=setup.data if rows == "real" else None)
        works.lay_out(one) if rows == "real" else write_mix(folder / "pairs.jsonl", one.pairs)
        for name in ("sft", "dpo"):
            found |= _counted(setup, one, rows, name)
    return found


def _counted(setup: Setup, one: Setup, rows: str, name: str) -> Figures:
    """Count one method on one kind of rows, over its turns."""
    exp = f"{name}_{rows}"
    overrides = works.untrained(works.train_overrides(one._replace(shape="tiny"), exp, [f"loss={name}"]))
    if rows == "real":
        shape = works.SHAPES[setup.shape]
        overrides += [f"model.tokenizer_name_or_path={setup.model_folder}", f"model.max_length={shape.max_length}"]
        overrides += [f"model.max_prompt_length={shape.max_prompt_length}"]
    worker = works.start_ours(one, exp, "train", overrides)
    try:
        start = worker.ask("start")
        computed = [worker.ask("step")["computed"] for _ in range(setup.repeats)]
    finally:
        worker.close()
    tokens, key = start["tokens"], f"useful_{name}_{rows}"
    return {
        f"{key}.useful_share": figure([tokens["needed"] / n for n in computed], "", "lower", 0.95),
        f"{key}.sequence_share": figure([tokens["sequences"] / n for n in computed]),
        f"{key}.supervised_share": figure([tokens["supervised"] / n for n in computed]),
    }


# ---- one run


def measured(setup: Setup, only: Sequence[str], grow: bool) -> Figures:
    """Measure what is asked for; each group of processes ends before the next one begins."""
    works.lay_out(setup)
    if works.SHAPES[setup.shape].built:
        worker = works.start_ours(setup, "save", "save", [str(setup.model_folder), *works.built_overrides(setup)])
        try:
            worker.ask("start")
        finally:
            worker.close()
    found: Figures = {}
    for name in only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name == "useful":
            found |= useful(setup)
        else:
            found |= (trained if name in TRAINED else distilled if name in DISTILLED else cached)(setup, name)
    return found | (growth.figures(setup) if grow else {})


def print_tables(figures: Figures) -> None:
    """Print a row a work, then what does not fit into its columns."""
    columns = ("seconds", "rival_seconds", "floor_seconds", "peak", "rival_peak", "floor_peak")
    names = list(dict.fromkeys(name.split(".")[0] for name in figures if name.endswith(".seconds")))
    cell = lambda key: shown(figures[key]) if key in figures else ""  # noqa: E731
    head = ["work", "ours", "rival", "floor", "peak, ours", "rival", "floor"]
    if names:
        print(table([head, *([name, *(cell(f"{name}.{c}") for c in columns)] for name in names)]), "\n")
    rows = [[key, shown(one), met(one)] for key, one in figures.items() if key.split(".", 1)[1] not in columns and one]
    print(table([["figure", "median (range)", "aim"], *rows]))


def checked(setup: Setup, figures: Figures, path: Path) -> int:
    """Print what got worse than the committed figures; return the exit status."""
    if not path.is_file():
        raise SystemExit(f"error: --check: no {path}: --write-baseline makes it")
    baseline = json.loads(path.read_text(encoding="utf-8"))
    differences = unlike(setup.conditions, baseline["conditions"])
    if differences:
        raise SystemExit(f"error: --check: {path.name} was measured under other conditions: {'; '.join(differences)}")
    kept = checkable(figures, setup.device)
    compared = [name for name in kept if name in baseline["figures"]]
    worse = complaints(kept, baseline["figures"])
    print(f"\ncheck against {path.name}: {len(compared)} figures compared, {len(worse)} worse")
    for line in worse:
        print(line)
    if not compared:
        print("nothing of this run is committed there: nothing was checked")
    return 1 if worse or not compared else 0


def write_baseline(setup: Setup, figures: Figures, path: Path) -> None:
    """Commit what can get worse; figures of the same conditions that this run did not measure stay."""
    kept: dict[str, Any] = {"conditions": setup.conditions, "figures": {}}
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else kept
    if not unlike(setup.conditions, old["conditions"]):
        kept["figures"] = old["figures"]
    kept["figures"] |= committed(figures, works.SHAPES[setup.shape].slack)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(KINDS), help=f"comma-separated, of {', '.join(KINDS)}; none: nothing"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=tuple(works.SHAPES), default="smollm2")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step (default 8)")
    parser.add_argument("--micro", type=int, default=2, help="pairs in a micro-batch (default 2)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3, help="counted turns (default 3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of our config")
    parser.add_argument("--data", help="file of pairs (default: shared/data/alpaca_pairs/train.jsonl, found above)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--growth", action="store_true", help="also how cost grows; minutes")
    parser.add_argument("--no-rivals", action="store_true", help="measure ours and floors alone")
    parser.add_argument("--check", action="store_true", help="compare with the committed figures; status 1 if worse")
    parser.add_argument("--write-baseline", action="store_true", help="write these figures as the committed ones")
    return parser.parse_args()


def setup_of(options: argparse.Namespace, folder: Path) -> Setup:
    """Check the options; what is wrong is said before anything starts."""
    if options.pairs % options.micro or options.repeats < 1:
        raise SystemExit(f"error: --pairs {options.pairs} is no multiple of --micro {options.micro}, or --repeats < 1")
    gpu = Path("/proc/driver/nvidia/version").exists()
    device = options.device if options.device != "auto" else "cuda" if gpu else "cpu"
    rivals = None if options.no_rivals else works.rivals_python()
    if rivals is None and not options.no_rivals:
        print("no rivals: benchmarks/rivals/install.sh makes their environment", file=sys.stderr)
    data = works.data_of(options.data, options.shape)
    numbers = options.pairs, options.micro, options.threads, options.repeats
    return Setup(options.shape, device, *numbers, tuple(options.set), data, folder, rivals)


def main() -> None:
    """Measure, print, write, compare."""
    options = parsed()
    only = [name for name in options.only.split(",") if name and name != "none"]
    unknown = [name for name in only if name not in KINDS]
    if unknown:
        raise SystemExit(f"error: --only {','.join(unknown)}: known are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        setup = setup_of(options, Path(folder))
        figures = measured(setup, only, options.growth)
    print(f"{setup.conditions}; {setup.repeats} counted turns; set: {' '.join(setup.sets) or 'nothing'}\n")
    print_tables(figures)
    found: dict[str, Any] = {
        "conditions": setup.conditions,
        "set": list(setup.sets),
        "repeats": setup.repeats,
        "figures": {name: one._asdict() for name, one in figures.items()},
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path = BASELINES / f"{setup.device}-{setup.shape}.json"
    if options.write_baseline:
        write_baseline(setup, figures, path)
    if options.check:
        sys.exit(checked(setup, figures, path))


if __name__ == "__main__":
    main()
