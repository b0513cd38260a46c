"""What only a GPU can show, in one run: a Markdown table for docs/log.md with a row a check.

    scripts/check_gpu.sh                          # about 20 minutes on one H200
    CHECK_GPU_MODEL=tiny scripts/check_gpu.sh     # a minute or two on any CPU: the script itself is tried

Training steps are those of the methods (their own sums, counts and reference) on random weights and random ids, with
float32 weights under bfloat16 autocast on a GPU. Each runs in a process of its own, so that peaks do not mix.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.check_backends import advantages, task
from benchmarks.check_parts import ROOT, SCALES, Row, Scale, Skipped, model_config, needs_gpu
from benchmarks.measure import forget_peak, peak_bytes, wait
from benchmarks.random_steps import batch_of, trainer_of
from benchmarks.setup import Size, device, machine
from dataloader import Sequences
from engine.compiling import compile_blocks
from estimate.arithmetic import Work, training_flops
from estimate.shape import shape_of
from functional import token_logps
from models import load_model, load_tokenizer, resolve_dtype, response_logits
from settings.schema import ModelConfig
from trainers.batches import Batch

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s by NVIDIA's data sheets
METHODS = ("sft", "dpo", "dckd", "adpa")
TOP_K = 50
LOGITS_TOLERANCE = 0.25  # nat between two attention kernels in bfloat16 on random weights


# ---- what the checks share


def vocabulary(config: ModelConfig) -> int:
    """Return the number of tokens that a step scores: all that the model has."""
    build = config.build or {}
    return int(build.get("vocab_size") or len(load_tokenizer(config)))


def autocast(config: ModelConfig) -> Any:
    """Return the context in which the policy runs."""
    dtype = resolve_dtype(config.policy_dtype, device())
    return nullcontext() if dtype == torch.float32 else torch.autocast(device().type, dtype)


class Step:
    """An optimizer step of a method on random rows."""

    def __init__(self, method: str, scale: Scale, **changes: Any) -> None:
        self.config = model_config(scale.model, **changes)
        self.size = Size(vocabulary(self.config), 0, 0, scale.rows, scale.prompt, scale.response)
        self.trainer = trainer_of(method, self.size.vocab)
        self.batch: Batch = batch_of(method, self.size, min(TOP_K, self.size.vocab // 2))
        self.model = load_model(self.config, trainable=True).to(device())
        compile_blocks(self.model, self.config)
        self.reference = None
        if method == "dpo":  # a live one, as frozen weights beside the policy
            self.reference = load_model(self.config, trainable=False).to(device())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.tokens = self.batch.sequences.ids.numel()

    def __call__(self) -> float:
        """Do one; return the loss."""
        batch = self.batch
        if self.reference is not None:
            batch = batch._replace(reference_logps=self.logps())
        counts = self.trainer.counts(batch)
        with autocast(self.config):
            out = response_logits(self.model, batch.sequences, self.size.vocab)
        sums, _ = self.trainer.sums(out, batch)
        loss = torch.stack([total / counts[name] for name, total in sums.items()]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.no_grad()
    def logps(self) -> Tensor:
        """Return the live reference's log-probabilities [N]."""
        with autocast(self.config):
            out = response_logits(self.reference, self.batch.sequences, self.size.vocab)  # type: ignore[arg-type]
        return token_logps(out.logits, out.targets)

    def flops(self) -> float:
        """Return the FLOPs of a step."""
        rows, length = self.batch.sequences.ids.shape
        work = Work(rows, self.tokens, rows * length**2, int(self.batch.sequences.response.sum()))
        return training_flops(shape_of(self.config), work, work if self.reference else None, False).total


def timed(work: Callable[[], object], times: int) -> float:
    """Return the seconds of one, after two that are not timed."""
    for _ in range(2):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - started) / times


# ---- the checks


def training_step(method: str, scale: Scale) -> Row:
    """Time a step; MFU against the device's peak; memory; what the profiler sees."""
    step = Step(method, scale)
    forget_peak()
    loss = step()
    seconds = timed(step, scale.steps)
    peak = next((value for name, value in PEAKS.items() if name in machine()), None)
    return Row(
        f"{method} step",
        f"loss {loss:.3f}; {profiled(step)}",
        seconds,
        step.tokens / seconds,
        step.flops() / seconds / peak if peak else None,
        peak_bytes(),
    )


def profiled(step: Callable[[], object]) -> str:
    """Return the three operations that take the most time of a step, with their shares, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        step()
        wait()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: getattr(row, field), reverse=True)
    total = sum(getattr(row, field) for row in rows) or 1
    return ", ".join(f"{row.key[:40]} {getattr(row, field) / total:.0%}" for row in rows[:3])


def compiled(scale: Scale) -> Row:
    """Time an SFT step with model.compile beside an eager one."""
    needs_gpu()
    eager, fast = Step("sft", scale), Step("sft", scale, compile=True)
    losses = eager(), fast()
    seconds = [timed(step, scale.steps) for step in (eager, fast)]
    words = f"eager {seconds[0]:.3f} s, {seconds[0] / seconds[1]:.2f} x; losses {losses[0]:.4f} and {losses[1]:.4f}"
    return Row("compile, sft step", words, seconds[1], fast.tokens / seconds[1])


def flash_attention(scale: Scale) -> Row:
    """Compare flash_attention_2's log-probabilities with sdpa's on rows of two lengths, and time a forward pass."""
    needs_gpu()
    if find_spec("flash_attn") is None:
        raise Skipped("flash-attn is not installed")
    found, seconds = [], []
    for kind in ("sdpa", "flash_attention_2"):
        config = model_config(scale.model, attn_implementation=kind)
        model = load_model(config, dtype=torch.bfloat16, trainable=False).to(device())
        ids = torch.randint(3, vocabulary(config), (2, scale.prompt), generator=torch.Generator().manual_seed(0))
        attention = torch.ones_like(ids, dtype=torch.bool)
        attention[1, scale.prompt // 2 :] = False  # padding on the right
        response = attention.clone()
        response[:, 0] = False
        rows = Sequences(ids.to(device()), attention.to(device()), response.to(device()))

        def once(model: Any = model, rows: Sequences = rows, config: ModelConfig = config) -> Tensor:
            with torch.no_grad():
                out = response_logits(model, rows, vocabulary(config))
                return token_logps(out.logits, out.targets)

        found.append(once())
        seconds.append(timed(once, scale.steps))
    difference = float((found[0] - found[1]).abs().max())
    if difference > LOGITS_TOLERANCE:
        raise ValueError(f"log-probabilities differ by {difference:.3f} nat from sdpa's")
    return Row("flash attention, forward", f"{difference:.4f} nat from sdpa ({seconds[0]:.4f} s)", seconds[1])


def checks(scale: Scale) -> dict[str, Callable[[], Row]]:
    """Name every check."""
    found: dict[str, Callable[[], Row]] = {
        f"{method} step": lambda method=method: training_step(method, scale)  # type: ignore[misc]
        for method in METHODS
    }
    found["compile, sft step"] = lambda: compiled(scale)
    found["flash attention, forward"] = lambda: flash_attention(scale)
    for backend in ("hf", "vllm"):
        for name in ("generate", "cache"):
            found[f"{name} by {backend}"] = lambda n=name, b=backend: task(n, b, scale)  # type: ignore[misc]
    for backend in ("server", "vllm"):
        found[f"advantages by {backend}"] = lambda b=backend: advantages(b, scale)  # type: ignore[misc]
    return found


# ---- the table


def attempted(name: str, scale: Scale) -> Row:
    """Do one check; what went wrong is its result."""
    try:
        return checks(scale)[name]()
    except Skipped as why:
        return Row(name, f"skipped: {why}")
    except Exception as error:  # one check that fails leaves the others their turn
        return Row(name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def in_own_process(name: str) -> Row:
    """Do one check in a process of its own: memory and compiled code of another one do not count."""
    command = [sys.executable, "-m", "benchmarks.check_gpu", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return Row(name, f"failed: the process ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def line(row: Row) -> str:
    """Write one row of the table."""
    figures = [
        "" if row.seconds is None else f"{row.seconds:.3f}",
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "" if row.mfu is None else f"{row.mfu:.1%}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
    ]
    return f"| {row.check} | {' | '.join(figures)} | {row.result.replace('|', '/')} |"


def main() -> None:
    """Print the table; exit 1 where a check failed."""
    name = os.environ.get("CHECK_GPU_MODEL", "1b")
    if name not in SCALES:
        raise SystemExit(f"CHECK_GPU_MODEL={name} is not one of {', '.join(SCALES)}")
    scale = SCALES[name]
    if len(sys.argv) > 1:
        print(json.dumps(attempted(sys.argv[1], scale)._asdict()))
        return
    if name != "tiny" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; CHECK_GPU_MODEL=tiny tries the script itself on a CPU")
    print(f"{machine()}; model {scale.model}, {scale.rows} pairs of {scale.prompt} + {scale.response} tokens\n")
    print("| check | seconds | tokens/s | MFU | peak GB | result |\n|---|---|---|---|---|---|", flush=True)
    # On a CPU everything fits one process: starting ten would be most of the time.
    alone = in_own_process if torch.cuda.is_available() else lambda check: attempted(check, scale)
    failed = False
    for check in checks(scale):
        row = alone(check)
        failed |= row.result.startswith("failed")
        print(line(row), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
