"""The estimator: predicted peaks against what torch allocates and what real processes take."""

import os
from pathlib import Path

import pytest

import launch
from estimate.tables import single, size, table
from settings.schema import settings_from
from tasks.estimate import compared, estimated
from tests.support.allocated import peaks_of_steps
from tests.support.helpers import composed, write_pairs
from tests.support.helpers import launch as command
from tests.support.shapes import SHAPE, even_pairs, inline, large_vocabulary, settings


@pytest.mark.parametrize(
    "options",
    [
        ["loss=sft"],
        ["loss=dpo"],
        ["loss=sft", "model.activation_checkpointing=true"],
        ["loss=dpo", "model.gradient_accumulation_steps=4"],
        ["loss=sft", "model.policy_dtype=bfloat16"],
        ["loss=sft", "optimizer=SGD"],
    ],
    ids=" ".join,
)
def test_the_peak_is_what_torch_allocates_in_a_step(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data = large_vocabulary(tmp_path / "words", 2000), even_pairs(tmp_path / "pairs.jsonl", 8, 60)
    raw = composed(
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"cache_dir={tmp_path}",
        "n_steps=2",
        inline(SHAPE),
        f"model.tokenizer_name_or_path={tokenizer}",
        *options,
    )
    allocated = peaks_of_steps(monkeypatch)
    launch.run_task(raw)
    found = estimated(settings_from(raw), "train")
    before = sum(found["memory"].get(name, 0) for name in ("weights", "optimizer states", "frozen reference"))
    # Measured: 0.99 to 1.03.
    print(f"{options}: predicted is {found['peak_bytes'] / (before + allocated[1]):.3f} of the actual bytes")
    assert found["peak_bytes"] == pytest.approx(before + allocated[1], rel=0.08)


def test_a_process_on_a_cpu_holds_its_libraries_and_what_the_allocator_keeps() -> None:
    found = estimated(settings("model=tiny", "datasets=[dpo_mix]", "n_examples=8", "estimate.accelerator=cpu"), "train")
    assert set(found["process"]) == {"interpreter and libraries", "kept by the allocator"}
    assert found["device_bytes"] == found["peak_bytes"] + sum(found["process"].values())
    assert "the process" in single(found) and size(found["device_bytes"]) in table([("a", found)])
    gpu = estimated(settings("model=tiny", "datasets=[dpo_mix]", "n_examples=8", "estimate.accelerator=gpu"), "train")
    assert gpu["process"] == {} and gpu["device_bytes"] == gpu["peak_bytes"] and "the process" not in single(gpu)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "large"), [("sft", False), ("sft", True), ("dpo", True)])
def test_a_process_takes_what_is_said_within_a_quarter(loss: str, large: bool, tmp_path: Path) -> None:
    """As users run it: the C library keeps what it likes, and libraries take 400 to 540 MB on different machines."""
    line = [f"datasets.local.train={write_pairs(tmp_path / 'few.jsonl', 20)}"]
    if large:
        build = {
            **SHAPE,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
        }
        words = large_vocabulary(tmp_path / "words", 8000)
        data = even_pairs(tmp_path / "pairs.jsonl", 16, 120)
        line = [f"datasets.local.train={data}", inline(build), f"model.tokenizer_name_or_path={words}"]
    common = ["model=tiny", "datasets=[local]", f"cache_dir={tmp_path}", "exp_name=run", "n_steps=3"]
    done = command(f"loss={loss}", *common, *line, timeout=600)
    assert done.returncode == 0, done.stderr
    found = compared(settings("task=estimate", "model=tiny", f"estimate.run={tmp_path}/run"))
    predicted, actual = found["predicted"]["device_bytes"], max(found["actual"]["peak_bytes"])
    print(f"{loss}: predicted {predicted / 1e6:.0f} MB, actual {actual / 1e6:.0f} MB")
    assert predicted == pytest.approx(actual, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_the_peak_is_what_a_real_process_takes(loss: str, tmp_path: Path) -> None:
    """A Llama of 12 M parameters (SFT 16 bytes each, DPO 20), float32 on CPU, in a process of its own."""
    tokenizer, data = large_vocabulary(tmp_path / "words", 8000), even_pairs(tmp_path / "pairs.jsonl", 16, 120)
    build = {**SHAPE, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6}
    done = command(
        f"loss={loss}",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"cache_dir={tmp_path}",
        "exp_name=run",
        "n_steps=3",
        inline(build),
        f"model.tokenizer_name_or_path={tokenizer}",
        # Freed memory goes back to the system at once: by default the C library keeps some (SFT: 943 MB instead of
        # 651).
        env={"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = compared(settings("task=estimate", "model=tiny", f"estimate.run={tmp_path}/run"))
    actual = found["actual"]["peak_bytes"][0] - found["actual"]["baseline_bytes"][0]
    print(f"{loss}: predicted {found['predicted']['peak_bytes'] / 1e6:.0f} MB, actual {actual / 1e6:.0f} MB")
    # Measured: SFT 0.99, DPO 1.03 of the actual bytes; what libraries allocate for themselves differs between machines.
    assert found["predicted"]["peak_bytes"] == pytest.approx(actual, rel=0.15)
