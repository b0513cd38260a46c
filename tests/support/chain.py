"""What a distilled student needs, made once for a test file: the chain up to the caches, on the tiny model."""

from pathlib import Path

import launch
from tests.support.helpers import composed, write_pairs


def chain_of(base: Path) -> dict[str, str]:
    """A started student, a teacher cache, generations and an advantage cache, all on 22 ragged pairs."""
    data = write_pairs(base / "pairs.jsonl", 22)
    common = [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", "cache.top_k=6"]
    launch.run_task(composed(*common, "exp_name=start", "n_steps=2", "lr=1e-3"))
    launch.run_task(composed(*common, "exp_name=teacher", "n_steps=4", "lr=3e-3"))
    start, teacher = f"model.load_from={base}/start/FINAL", f"model.load_from={base}/teacher/FINAL"
    launch.run_task(composed(*common, "exp_name=cache", "task=cache", teacher))
    launch.run_task(composed(*common, "exp_name=gen", "task=generate", start, "generation.max_new_tokens=9"))
    generations = f"{base}/gen/generations.jsonl"
    reference = f"cache.reference={base}/start/FINAL"
    launch.run_task(
        composed(*common, "exp_name=adv", "task=cache", teacher, reference, f"cache.generations={generations}")
    )
    return {"base": str(base), "data": str(data), "start": start, "generations": generations}
