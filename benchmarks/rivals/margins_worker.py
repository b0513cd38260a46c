"""The plain way of caching teachers for distillation: each by itself in a pass of its own, then a pass that merges.

    python -m benchmarks.rivals.margins_worker MODEL_FOLDER K BATCH_SIZE TEACHERS

As published code for advantages does it (docs/losses.md says where ours differs): every teacher's log-softmax over all
positions and the whole vocabulary, its own top k in float16 to disk; then both files are read, the second teacher's
entries looked up at the first one's ids, what is missing takes its smallest kept value, the differences are clamped
into (1e-8, 1) and written again. One teacher: the first pass alone. Written by us from that description.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import Clock
from benchmarks.rivals.trl_worker import read_rows
from benchmarks.turns import Served

Rows = list[dict[str, list[int]]]


@torch.inference_mode()
def write_top_k(model: torch.nn.Module, batches: list[Rows], k: int, path: Path) -> None:
    """Score all batches with one teacher into one file: ids and log-probabilities of every response token."""
    found, device = [], next(model.parameters()).device
    for rows in batches:
        longest = max(len(row["ids"]) for row in rows)
        pad = [(row["ids"] + [0] * (longest - len(row["ids"])), len(row["ids"])) for row in rows]
        ids = torch.tensor([row for row, _ in pad], device=device)
        mask = torch.tensor([[1] * n + [0] * (longest - n) for _, n in pad], device=device)
        logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        top = logps.topk(k, dim=-1)
        for i, row in enumerate(rows):
            places = torch.tensor(row["response"], device=device).nonzero().flatten() - 1
            kept = {"ids": top.indices[i, places].int().cpu(), "logps": top.values[i, places].half().cpu()}
            found.append(kept)
    torch.save(found, path)


def merge(first: Path, second: Path, out: Path) -> None:
    """Join two teachers' files into margins at the first one's ids."""
    merged = []
    for ours, theirs in zip(torch.load(first), torch.load(second), strict=True):
        rows = []
        for ids, logps, other_ids, other in zip(*ours.values(), *theirs.values(), strict=True):
            known, least = dict(zip(other_ids.tolist(), other.tolist(), strict=True)), float(other.min())
            base = torch.tensor([known.get(i, least) for i in ids.tolist()])
            rows.append((logps.float() - base).clamp(1e-8, 1.0))
        merged.append({"ids": ours["ids"], "margins": torch.stack(rows).half()})
    torch.save(merged, out)


def main() -> None:
    """Answer every turn with the seconds of caching (and merging) all sequences."""
    served, (folder, k, size, teachers) = Served(), sys.argv[1:]
    gpu = torch.cuda.is_available()
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if gpu else torch.float32)  # noqa: E731
    models = [load().to("cuda" if gpu else "cpu").eval() for _ in range(int(teachers))]
    rows = [sides[0] for sides in read_rows(served.wait()["rows"])]
    batches = [rows[start : start + int(size)] for start in range(0, len(rows), int(size))]
    served.answer(torch=torch.__version__)
    tokens, clock = sum(sum(row["response"]) for row in rows), None
    with tempfile.TemporaryDirectory() as out:
        while True:
            served.wait()
            clock = clock or Clock()
            clock.begin()
            paths = [Path(out) / f"teacher{number}.pt" for number in range(len(models))]
            for model, path in zip(models, paths, strict=True):
                write_top_k(model, batches, int(k), path)
            if len(models) == 2:
                merge(*paths, Path(out) / "margins.pt")
            kept = Path(out) / "margins.pt" if len(models) == 2 else paths[0]
            served.answer(**clock.end(), bytes_per_token=kept.stat().st_size / tokens)


if __name__ == "__main__":
    main()
