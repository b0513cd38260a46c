"""What many rows cost a run before its first step: seconds and memory of a loss with few and with many pairs.

    python -m benchmarks.start_up --rows 100 100000 --processes 1 2 --folder /tmp/start_up
    python -m benchmarks.start_up --losses kto csft adpa --checkpoint
    python -m benchmarks.start_up --losses dckd-column dckd-bytes

The pairs are made up (about 250 bytes a sequence, a token a byte), and so are the entries of teacher caches: K = 8
random numbers a token; for adpa also a generation for each prompt. dckd-column: the rows name one of two teachers (one
cache under two names); dckd-bytes: the teacher's tokenizer is taken for another one. A run is two steps of the tiny
model, with --checkpoint one of them saved, so that the data is hashed. The first start of a row count tokenizes, later
ones do not. CPU seconds are those of all processes together. Memory is the largest resident set of a process of the
run (pages of mapped files among them).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORDS = "ant bee cat dog elk fox gnu hen ibis jay kite lynx mole newt owl pig".split()
K = 8


def write_rows(path: Path, count: int) -> None:
    """Write `count` pairs, a prompt and two responses of 8 to 40 words each."""
    rng = random.Random(0)
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))  # noqa: E731
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = {"prompt": f"{number}: {text()}", "chosen": text(), "rejected": text(), "source": "made up"}
            row["teacher"] = "even" if number % 2 == 0 else "odd"
            out.write(json.dumps(row) + "\n")


def write_cache(data: Path, base: Path, loss: str) -> None:
    """Write a cache of made-up log-probabilities for the pairs, or generations and a cache of advantages on them."""
    import models
    from dataloader import load_examples
    from settings.schema import DatasetConfig, ModelConfig, typed
    from teacher.cache import Meta, Writer, finish
    from tests.support.helpers import composed

    config = typed(composed("model=tiny")["model"], ModelConfig)
    tokenizer = models.load_tokenizer(config)
    digest = models.tokenizer_digest(tokenizer)
    advantage = loss == "adpa"
    folder, quantity = (base / "adpa", "advantage") if advantage else (base / "cache", "logprob")
    meta = Meta(quantity, K, len(tokenizer), "made up", "base" if advantage else None, digest, "", "", "made up")
    writer, rng = Writer(folder, meta), np.random.default_rng(0)
    examples = load_examples({"a": DatasetConfig(train=str(data))}, "train", tokenizer, config)
    with (base / "generations.jsonl").open("w", encoding="utf-8") as out:
        for number, example in enumerate(examples):
            assert example.chosen is not None and example.rejected is not None
            if advantage:
                said = example.rejected.ids[len(example.prompt) :]
                row = {"prompt_ids": example.prompt, "response_ids": said, "prompt": [], "response": ""}
                out.write(json.dumps({**row, "finish_reason": "stop", "tokenizer_digest": digest}) + "\n")
            for tokens in (example.rejected,) if advantage else (example.chosen, example.rejected):
                length = sum(tokens.response)
                ids = rng.integers(0, 200, (length, 1)) + np.arange(K)
                values = -1.5 - rng.random((length, K), np.float32).cumsum(axis=1)
                entries = {"ids": ids, "values": values, "tail": np.full(length, 0.2)}
                writer.add(tokens.ids, tokens.response, {**entries, **({"teacher_logps": values} if advantage else {})})
            if number % 1000 == 0:
                writer.flush()
    writer.close()
    finish(folder, meta, set())


def inputs_of(loss: str, base: Path) -> list[str]:
    """Return what a loss is given beside the pairs, written where it is not there yet."""
    if not loss.startswith(("dckd", "adpa")):
        return []
    folder = base / ("adpa" if loss == "adpa" else "cache")
    if not (folder / "DONE").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_cache(base / "pairs.jsonl", base, loss)
    one = f"loss.teacher_cache={folder}"
    if loss == "dckd-column":
        return [f"loss.teacher_cache={{even: {folder}, odd: {folder}}}", "loss.teacher_column=teacher"]
    if loss == "dckd-bytes":
        return [one, "loss.alignment=bytes", "loss.teacher_tokenizer=assets/byte_tokenizer"]
    if loss == "dckd":
        return [one]
    return [f"loss.generations={base / 'generations.jsonl'}", f"loss.advantages={folder}"]


def measured(root: Path, base: Path, loss: list[str], processes: int, name: str) -> tuple[float, float, float]:
    """Run two steps with the code under `root`; return seconds, of the CPU and by the clock, and the largest process's
    memory in MiB.
    """
    words = [sys.executable, "launch.py"]
    if processes > 1:
        words = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "launch.py"]
    words += [*loss, "model=tiny", "datasets=[local]", "n_steps=2", "lr=1e-4"]
    words += [f"datasets.local.train={base / 'pairs.jsonl'}", f"cache_dir={base / 'out'}", f"exp_name={name}"]
    shutil.rmtree(base / "out" / name, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = time.perf_counter()
    child = subprocess.Popen(
        words, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the run failed:\n{errors[-3000:]}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    """Print a table: loss, rows, processes, start, CPU seconds, seconds, MiB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--losses", nargs="+", default=["dckd"])
    parser.add_argument("--checkpoint", action="store_true", help="save a checkpoint after the first step")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/start_up"))
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository whose code runs")
    options = parser.parse_args()
    print(
        "| loss | rows | processes | start | CPU seconds | seconds | MiB |\n|---|---|---|---|---|---|---|", flush=True
    )
    for rows, loss in product(options.rows, options.losses):
        base = options.folder / f"rows-{rows}"
        base.mkdir(parents=True, exist_ok=True)
        if not (base / "pairs.jsonl").is_file():
            write_rows(base / "pairs.jsonl", rows)
        name = loss.partition("-")[0] if loss.startswith("dckd") else loss
        words = [f"loss={name}", *inputs_of(loss, base), *(["save_every=1"] if options.checkpoint else [])]
        for processes in options.processes:
            shutil.rmtree(base / "out", ignore_errors=True)
            for start in range(1, options.starts + 1):
                cpu, seconds, memory = measured(options.root, base, words, processes, "run")
                found = f"{cpu:.1f} | {seconds:.1f} | {memory:.0f}"
                print(f"| {loss} | {rows:,} | {processes} | {start} | {found} |", flush=True)


if __name__ == "__main__":
    main()
