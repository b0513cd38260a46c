"""What many rows cost a run before its first step: seconds and memory of `loss=dckd` with few and with many pairs.

    python -m benchmarks.start_up --rows 100 100000 --processes 1 2 --folder /tmp/start_up

The pairs are made up (about 250 bytes a sequence, a token a byte), and so are the entries of the teacher cache: K = 8
random numbers a token. A run is two steps of the tiny model. The first start of a row count tokenizes, later ones do
not. CPU seconds are those of all processes together. Memory is the largest resident set of a process of the run (pages
of mapped files among them).
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
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
            out.write(json.dumps(row) + "\n")


def write_cache(data: Path, folder: Path) -> None:
    """Write a cache of made-up log-probabilities for the pairs."""
    import models
    from dataloader import load_examples
    from settings.schema import DatasetConfig, ModelConfig, typed
    from teacher.cache import Meta, Writer, finish
    from tests.support.helpers import composed

    config = typed(composed("model=tiny")["model"], ModelConfig)
    tokenizer = models.load_tokenizer(config)
    digest = models.tokenizer_digest(tokenizer)
    meta = Meta("logprob", K, len(tokenizer), "made up", None, digest, "", "", "made up")
    writer, rng = Writer(folder, meta), np.random.default_rng(0)
    for number, example in enumerate(load_examples({"a": DatasetConfig(train=str(data))}, "train", tokenizer, config)):
        for tokens in (example.chosen, example.rejected):
            assert tokens is not None
            length = sum(tokens.response)
            ids = rng.integers(0, 200, (length, 1)) + np.arange(K)
            values = -1.5 - rng.random((length, K), np.float32).cumsum(axis=1)
            writer.add(tokens.ids, tokens.response, {"ids": ids, "values": values, "tail": np.full(length, 0.2)})
        if number % 1000 == 0:
            writer.flush()
    writer.close()
    finish(folder, meta, set())


def measured(root: Path, folder: Path, rows: int, processes: int, name: str) -> tuple[float, float, float]:
    """Run two steps with the code under `root`; return seconds, of the CPU and by the clock, and the largest process's
    memory in MiB.
    """
    base = folder / f"rows-{rows}"
    words = [sys.executable, "launch.py"]
    if processes > 1:
        words = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "launch.py"]
    words += ["loss=dckd", f"loss.teacher_cache={base / 'cache'}", "model=tiny", "datasets=[local]", "n_steps=2"]
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
    """Print a table: rows, processes, start, CPU seconds, seconds, MiB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/start_up"))
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository whose code runs")
    options = parser.parse_args()
    print("| rows | processes | start | CPU seconds | seconds | MiB |\n|---|---|---|---|---|---|", flush=True)
    for rows in options.rows:
        base = options.folder / f"rows-{rows}"
        if not (base / "cache" / "DONE").is_file():
            base.mkdir(parents=True, exist_ok=True)
            write_rows(base / "pairs.jsonl", rows)
            write_cache(base / "pairs.jsonl", base / "cache")
        for processes in options.processes:
            shutil.rmtree(base / "out", ignore_errors=True)
            for start in range(1, options.starts + 1):
                cpu, seconds, memory = measured(options.root, options.folder, rows, processes, "run")
                print(f"| {rows:,} | {processes} | {start} | {cpu:.1f} | {seconds:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
