"""Bytes per cached token: what a cache takes on disk, by top k, quantity and vocabulary.

python -m benchmarks.cache_bytes
"""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.setup import arguments
from teacher.cache import Meta, Writer, finish


def bytes_per_token(folder: Path, k: int, vocab: int, quantity: str, prompt: int, response: int, count: int) -> float:
    """Write a cache of random entries and return its size per response token, ids of the prompts included."""
    meta = Meta(
        quantity=quantity,
        k=k,
        vocab_size=vocab,
        teacher_digest="t",
        reference_digest=None,
        tokenizer_digest="t",
        template_digest="t",
        data_digest="d",
        precision="",
    )
    writer, rng = Writer(folder, meta), np.random.default_rng(0)
    mask = [False] * prompt + [True] * response
    for _ in range(count):
        ids = rng.integers(0, vocab, prompt + response).tolist()
        entries = rng.integers(0, vocab, (response, k))
        values = np.log(rng.dirichlet(np.ones(k), response)).astype(np.float32)
        arrays = {"ids": entries, "values": values, "tail": np.zeros(response, np.float32)}
        writer.add(ids, mask, arrays | ({"teacher_logps": values} if quantity == "advantage" else {}))
    writer.close()
    finish(folder, meta, writer.keys)
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / (count * response)


def main() -> None:
    """Print a table: one line for each vocabulary and quantity."""
    options = arguments(__doc__ or "")
    ks = sorted({12, options.top_k, 100})
    print(f"bytes per response token ({options.prompt} prompt and {options.response} response tokens a sequence)")
    print(
        "| vocabulary | ids | quantity | "
        + " | ".join(f"K = {k}" for k in ks)
        + f" | a full float16 row | K = {options.top_k} to a full row |"
    )
    print("|---|---|---|" + "---|" * (len(ks) + 2))
    for vocab in (32_000, 128_256):
        for quantity in ("logprob", "advantage"):
            found = []
            for k in ks:
                with tempfile.TemporaryDirectory() as folder:
                    found.append(
                        bytes_per_token(Path(folder), k, vocab, quantity, options.prompt, options.response, 64)
                    )
            ids, full = ("uint16" if vocab <= 65_536 else "int32"), 2 * vocab
            share = found[ks.index(options.top_k)] / full
            print(
                f"| {vocab:,} | {ids} | {quantity} | "
                + " | ".join(f"{b:.0f}" for b in found)
                + f" | {full:,} | {share:.5f} |"
            )


if __name__ == "__main__":
    main()
