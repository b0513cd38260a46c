"""Preference distillation on real language: split the pairs by prompt, then run pipeline=smollm2 on the parts.

    python scripts/real_language.py --pairs train.jsonl --test test.jsonl --gsm8k gsm8k.jsonl [--small] [key=value ...]

--pairs: rows with `prompt`, `chosen`, `rejected`. A third of their prompts is learned from, a third trains the reward
model that judges, and the last third and the prompts of --test are held out, a pair each. --gsm8k: questions in GSM8K's
form. --small is the size for 2 CPU cores: 128 pairs of at most 256 tokens, 64 held-out prompts. Further keys go to
launch.py. The parts lie in CACHE_DIR/real_language.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from settings.artifacts import write_text

Rows = list[dict[str, Any]]
SMALL = [
    *("n_examples=128", "++save_every=16", "++pipeline.set.n_eval_examples=8"),
    *(f"++pipeline.stages.{name}.set.n_eval_examples=64" for name in ("evaluate", "solve")),
    *("++model.batch_size=4", "++model.max_length=256", "++model.max_prompt_length=128"),
    "pipeline.stages.dckd_long=null",
    *(f"pipeline.stages.{name}.max_new_tokens=128" for name in ("generate.set.generation", "evaluate.set.evaluation")),
    "pipeline.stages.solve.set.evaluation.max_new_tokens=128",
]


def read(path: Path) -> Rows:
    """Return the rows of a JSONL file; the program ends where one has no prompt."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            sys.exit(
                f"{path}, row {number}: needs `prompt`, a text, and `chosen` and `rejected`; it is {str(row)[:200]}"
            )
    return rows


def digest(text: str) -> str:
    """Return what orders prompts and rows, whatever the order of the file."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def parts_of(pairs: Rows, test: Rows) -> dict[str, Rows]:
    """Return the rows to learn from, those of the reward model, and a held-out row for each other prompt."""
    prompts = sorted({row["prompt"] for row in pairs}, key=digest)
    number = {prompt: place % 3 for place, prompt in enumerate(prompts)}
    learned, judged, rest = ([row for row in pairs if number[row["prompt"]] == part] for part in range(3))
    held_out: dict[str, dict[str, Any]] = {}
    for row in sorted(rest + test, key=lambda row: digest(json.dumps(row))):
        if number.get(row["prompt"], 2) == 2:
            held_out.setdefault(row["prompt"], row)
    return {"pairs": learned, "judge_pairs": judged, "held_out": list(held_out.values())}


def command(folder: Path, gsm8k: Path, more: list[str]) -> list[str]:
    """Return the pipeline's command line on the parts in a folder."""
    local = "set.datasets.local"
    return [
        *(sys.executable, str(ROOT / "launch.py"), "pipeline=smollm2"),
        f"pipeline.data.pairs.{local}.train='{folder}/pairs.jsonl'",
        f"pipeline.data.pairs.{local}.test='{folder}/held_out.jsonl'",
        f"pipeline.data.judge_pairs.{local}.train='{folder}/judge_pairs.jsonl'",
        f"pipeline.data.solved.set.datasets.gsm8k.test='{gsm8k}'",
        *more,
    ]


def main(arguments: list[str]) -> int:
    """Write the parts and run the pipeline."""
    parser = argparse.ArgumentParser(prog="python scripts/real_language.py", description=__doc__)
    for name in ("--pairs", "--test", "--gsm8k"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="the size for 2 CPU cores")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / "outputs")
    options, keys = parser.parse_known_args(arguments)
    folder = options.cache_dir.resolve() / "real_language"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts_of(read(options.pairs), read(options.test)).items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder}/{name}.jsonl: {len(rows)} rows of {len({str(row['prompt']) for row in rows})} prompts")
    more = [f"cache_dir='{options.cache_dir.resolve()}'", *(SMALL if options.small else []), *keys]
    return subprocess.run(command(folder, options.gsm8k.resolve(), more), cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
