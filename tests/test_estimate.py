"""The estimator: its arithmetic against autograd, a FLOP counter and real files; its command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import dataloader
import launch
import models
from dataloader import collate
from docs import worked_plan
from engine import export
from estimate import arithmetic as estimate
from estimate import lengths
from estimate.arithmetic import Batch, Setup, Work
from estimate.shape import shape_of
from settings.needs import Needs
from tasks.estimate import estimated, of_stage, print_plan
from teacher.cache import Meta, Writer, finish
from teacher.quantities import TABLE, quantity_named
from tests.support.helpers import composed, write_pairs
from tests.support.shapes import SHAPE, inline, settings
from tests.test_pipeline import planned

PLAIN = Setup("none", 1, 1, master=4, compute=4, reference=0, live=False, states=2, checkpointing=False, gpu=False)
# ---- counts


@pytest.mark.parametrize(
    "options", [[], ["model.use_peft=true"], ["model.num_layers=1"], ["++model.build.tie_word_embeddings=false"]]
)
def test_parameters_counted_without_weights_are_those_of_the_model(options: list[str]) -> None:
    config = settings("model=tiny", *options).model
    model: Any = models.load_model(config, trainable=True)
    embedding = model.get_input_embeddings().weight.numel()
    if config.use_peft:
        model = export.add_lora(model, config)
    found = shape_of(config)
    parameters = list(model.parameters())
    assert found.parameters + found.adapters == sum(p.numel() for p in parameters)
    assert found.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert found.embedding == embedding and found.layers == model.config.num_hidden_layers
    assert found.layers * found.block + found.outside == found.parameters


@pytest.mark.parametrize(
    ("name", "published"), [("llama_8b_shape", 8_030_261_248), ("llama_70b_shape", 70_553_706_496)]
)
def test_shapes_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert shape_of(settings(f"model={name}").model).parameters == published


@pytest.mark.parametrize(("loss", "passes"), [("sft", 3), ("dpo", 4)])
def test_flops_are_those_that_torch_counts(loss: str, passes: int) -> None:
    config = settings("model=tiny", inline(SHAPE)).model
    model, shape = models.load_model(config, trainable=True), shape_of(config)
    rows, length = 2, 24  # short rows: torch counts attention without its causal half, which is below 2 % here
    ids = torch.randint(0, shape.vocab, (rows, length))
    work = Work(rows, rows * length, rows * length**2, rows * length)
    with FlopCounterMode(display=False) as counter:
        if loss == "dpo":
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    predicted = estimate.training_flops(shape, work, work if loss == "dpo" else None, checkpointing=False)
    assert predicted.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert predicted.total == pytest.approx(passes * predicted.forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(dtype: torch.dtype, checkpointing: bool) -> None:
    build = {**SHAPE, "num_key_value_heads": 2, "vocab_size": 259}
    model = LlamaForCausalLM(LlamaConfig(**build)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shape = shape_of(settings("model=tiny", inline(build)).model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    attention = torch.ones(3, 64, dtype=torch.int64)
    attention[0, -9:] = 0  # padded, as batches are
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        model.model(input_ids=torch.randint(0, 259, (3, 64)), attention_mask=attention, use_cache=False)
    weights = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}
    actual = sum(
        t.untyped_storage().nbytes()
        for at, t in kept.items()
        if at not in own and not (t.dim() == 2 and t.shape in weights)
    )
    setup = PLAIN._replace(compute=dtype.itemsize, checkpointing=checkpointing)
    assert estimate.activations(shape, Batch(3, 64, 63, 100), setup)[0] == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("vocab", [259, 128_256])
@pytest.mark.parametrize("name", [row.name for row in TABLE])
def test_cache_bytes_are_those_of_a_written_cache(vocab: int, name: str, tmp_path: Path) -> None:
    k, prompt, response, count = 50, 20, 30, 8
    quantity = quantity_named(name)
    meta = Meta(name, k, vocab, "t", None, "t", "t", "d", "")
    writer, rng = Writer(tmp_path, meta), np.random.default_rng(0)
    for _ in range(count):
        ids = rng.integers(0, vocab, prompt + response).tolist()
        arrays = {a.name: np.zeros((response, k) if a.wide else response) for a in quantity.arrays}
        writer.add(ids, [False] * prompt + [True] * response, arrays)
    writer.close()
    finish(tmp_path, meta, writer.keys)
    names = ("shard.json", "checksums.bin")
    actual = sum(f.stat().st_size for f in tmp_path.glob("shard-*/*") if f.name not in names)
    work = Work(count, count * (prompt + response), 0, count * response)
    assert estimate.cache_bytes(quantity, k, vocab, work) == actual


# ---- memory


def test_full_sharding_divides_what_it_shards() -> None:
    shape, batch = shape_of(settings("model=llama_8b_shape").model), Batch(2, 2048, 1024, 2048)
    one = estimate.training_memory(shape, batch, PLAIN).terms
    many = estimate.training_memory(shape, batch, PLAIN._replace(strategy="fsdp", devices=8)).terms
    for name in ("weights", "gradients", "optimizer states"):
        assert many[name] == one[name] // 8
    assert many["gathered weights"] > 0 and many["activations"] == one["activations"]
    assert one["weights"] + one["gradients"] + one["optimizer states"] == 16 * shape.parameters


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({"strategy": "ddp", "compute": 2}, "copies of the weights"),
        ({"reference": 2, "live": True}, "frozen reference"),
        ({"strategy": "ddp"}, "communication buckets"),
    ],
)
def test_an_option_that_takes_memory_is_a_term_of_its_own(changes: dict[str, Any], term: str) -> None:
    shape, batch = shape_of(settings("model=llama_8b_shape").model), Batch(2, 2048, 1024, 2048)
    base = PLAIN._replace(strategy="fsdp", devices=8)
    assert term not in estimate.training_memory(shape, batch, base).terms
    assert estimate.training_memory(shape, batch, base._replace(**changes)).terms[term] > 0


def test_checkpointing_takes_less_memory_and_more_flops() -> None:
    shape, batch = shape_of(settings("model=llama_8b_shape").model), Batch(2, 2048, 1024, 2048)
    work = Work(2, 4096, 2 * 2048**2, 2048)
    less = estimate.training_memory(shape, batch, PLAIN._replace(checkpointing=True))
    assert less.peak < estimate.training_memory(shape, batch, PLAIN).peak
    plain, again = (estimate.training_flops(shape, work, None, on).total for on in (False, True))
    assert 1.3 < again / plain < 1.34


@pytest.mark.parametrize(("micro_batches", "tracked"), [(1, 23.08e9), (2, 26.51e9)])
def test_full_sharding_in_bfloat16_takes_what_torch_tracks(micro_batches: int, tracked: float) -> None:
    """torch's FSDPMemTracker with fake tensors on 4 ranks, 8 rows of 1,024 tokens a micro-batch, checkpointing, without
    optimizer states: 23.08 GB, and 26.51 GB where each of two micro-batches is reduced.
    """
    shape, batch = shape_of(settings("model=llama_8b_shape").model), Batch(8, 1024, 512, 4096)
    setup = PLAIN._replace(strategy="fsdp", devices=4, compute=2, states=0, checkpointing=True)
    found = estimate.training_memory(shape, batch, setup._replace(micro_batches=micro_batches))
    assert "copies of the weights" not in found.terms
    assert found.peak == pytest.approx(tracked, rel=0.15)


# ---- lengths


def test_lengths_are_those_of_the_batches_that_are_trained_on(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 22)
    config = settings("model=tiny", "datasets=[local]", f"datasets.local.train={data}")
    needs = Needs("pairs", reference="logps")
    found = lengths.training_lengths(config, needs)
    assert found is not None and found.measured and found.number == 22
    examples, _, _ = lengths.examples_of(config, "train")
    rows = [t for e in examples for t in (e.chosen, e.rejected) if t is not None]
    assert found.work == Work(
        44, sum(len(t.ids) for t in rows), sum(len(t.ids) ** 2 for t in rows), sum(map(sum, (t.response for t in rows)))
    )
    batch, real = lengths.padded(found.items), collate(rows, 0)
    shape = shape_of(config.model)
    seen: list[torch.Size] = []
    model = models.load_model(config.model, trainable=False)
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape))
    out = models.response_logits(model, real, shape.vocab)
    assert seen[-1] == (batch.rows, batch.columns, shape.vocab) and len(out.targets) == batch.responses
    assert real.ids.shape == (batch.rows, batch.length)
    for packing in ("rows", "prompts"):
        laid, row = lengths.laid(found.items, packing), collate(rows, 0, packing).packed
        assert row is not None and (laid.rows, laid.length, laid.responses) == (*row.ids.shape, len(row.places))
        assert laid.masks == sum(
            n * row.layout.seen(i) for i, n in enumerate(row.layout.lengths) if row.layout.before[i] >= 0
        )


def test_a_sample_is_scaled_and_its_memory_is_an_upper_bound(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 40)
    config = settings("model=tiny", "datasets=[local]", f"datasets.local.train={data}", "loss=dpo")
    whole, sample = (
        estimated(replace(config, estimate=replace(config.estimate, rows=rows)), "train") for rows in (None, 10)
    )
    assert sample["tokens"] == pytest.approx(whole["tokens"], rel=0.1) and sample["sequences"] == whole["sequences"]
    assert "lengths from 10 tokenized rows" in sample["lengths"]
    assert sample["peak_bytes"] > 10 * whole["peak_bytes"]  # rows of max_length


def test_without_the_data_there_is_an_upper_bound_or_nothing() -> None:
    bound = estimated(settings("model=tiny", "datasets=[dpo_mix]", "loss=dpo", "n_examples=100"), "train")
    assert bound["tokens"] == 100 * 2 * 2048 and bound["lengths"].startswith("upper bound")
    nothing = estimated(settings("model=tiny", "datasets=[dpo_mix]", "loss=dpo"), "train")
    assert nothing["tokens"] is None and nothing["hours"] is None and "set n_examples" in nothing["lengths"]


def test_hours_come_from_tokens_or_from_flops() -> None:
    common = ["model=llama_8b_shape", "datasets=[deita]", "estimate.tokens=36e6"]
    assert estimated(settings(*common, "estimate.tokens_per_second=1e4"), "train")["hours"] == pytest.approx(
        1.0, rel=1e-3
    )
    found = estimated(settings(*common, "estimate.flops_per_second_per_device=1e15", "estimate.devices=2"), "train")
    assert found["hours"] == pytest.approx(found["flops"]["total"] / (2 * 1e15 * 0.4) / 3600)


# ---- the command


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["estimate.devices=3"], "model.batch_size=8 .* is not divisible by 3 devices .* 9 would work"),
        (["estimate.run=nowhere"], "estimate.run=nowhere has no config.yaml"),
        (["estimate.strategy=none", "estimate.devices=2"], "choose ddp or fsdp"),
        (["estimate.device=2"], "unknown key 'estimate.device'. Did you mean 'estimate.devices'"),
    ],
)
def test_a_mistake_is_named(wrong: list[str], message: str, tmp_path: Path) -> None:
    raw = composed("task=estimate", "model=tiny", f"cache_dir={tmp_path}", *[f"++{word}" for word in wrong])
    with pytest.raises(ValueError, match=message):
        launch.run_task(raw)


def test_a_finished_run_stands_beside_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 20)
    common = ["model=tiny", "datasets=[local]", f"datasets.local.train={data}", f"cache_dir={tmp_path}"]
    launch.run_task(composed(*common, "exp_name=run", "n_steps=4", "lr=1e-4"))
    monkeypatch.setattr(dataloader, "_encoded", None)  # the tokens are there: no row is tokenized again
    for _ in range(2):  # it is new at every call
        launch.run_task(composed(*common, "exp_name=said", "task=estimate", f"estimate.run={tmp_path}/run"))
    said = json.loads((tmp_path / "said/estimate.json").read_text(encoding="utf-8"))
    assert said["actual"]["tokens"] == pytest.approx(
        said["predicted"]["tokens"], rel=0.01
    )  # 4 steps of 8, the third of 4
    assert said["actual"]["peak_bytes"][0] > said["actual"]["baseline_bytes"][0] > 0
    printed = capsys.readouterr().out
    assert "peak memory, predicted" in printed and "peak memory, actual" in printed


def test_the_plan_of_a_pipeline_says_what_its_stages_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = list(planned(tmp_path, "pipeline=quickstart").values())
    section = {**composed()["estimate"], "tokens": 1e6, "flops_per_second_per_device": 1e11}
    print_plan(stages, section)
    printed = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line for line in printed.splitlines() if line.startswith("| ")}
    assert set(rows) == {"stage", *(stage.name for stage in stages)}
    assert "111.94 k" in rows["teacher_sft"] and "1.00 M" in rows["cache_advantages"]
    assert "not estimated: task=summarize" in rows["summarize"] and "of teacher caches" in printed
    assert not list(tmp_path.iterdir())


def test_a_stage_has_the_layout_of_its_accelerate_configuration(tmp_path: Path) -> None:
    line = [
        "pipeline=adpa_plus",
        "pipeline.teacher=llama_8b_shape",
        "pipeline.student=llama_8b_shape",
        "datasets=[dpo_mix]",
    ]
    stages = planned(tmp_path, *line, "pipeline.accelerate_config=accelerate_config/fsdp_2x8gpu.yaml")
    found = of_stage(stages["teacher_dpo"], composed()["estimate"])
    assert isinstance(found, dict) and (found["strategy"], found["devices"]) == ("fsdp", 16)
    assert found["memory"]["weights"] == 8_030_261_248 * 4 // 16
    other = of_stage(stages["cache_logprobs"], composed()["estimate"])
    assert isinstance(other, dict) and (other["strategy"], other["devices"]) == ("fsdp", 16)
    assert other["memory"]["weights"] == 8_030_261_248 * 4 // 16 and other["memory"]["gathered weights"] > 0
    alone = of_stage(stages["cache_logprobs"], {**composed()["estimate"], "devices": 16})
    assert isinstance(alone, dict) and alone["strategy"] == "whole model each"
    assert alone["memory"]["weights"] == 8_030_261_248 * 4 and "gathered weights" not in alone["memory"]


def test_a_model_without_a_readable_configuration_is_named() -> None:
    with pytest.raises(ValueError, match="no architecture: cannot read config.json of 'nobody/nothing-of-this-name'"):
        estimated(settings("model=llama", "model.name_or_path=nobody/nothing-of-this-name"), "train")


@pytest.mark.slow
@pytest.mark.parametrize(("line", "written"), worked_plan.parts(), ids=lambda text: text[:40])
def test_the_worked_plan_is_what_its_commands_print(line: str, written: str) -> None:
    assert worked_plan.output_of(line) == written, "run: python -m docs.worked_plan"
