"""What a teacher is asked and in which precision, who shares the work, and what a reference's numbers depend on."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

import functional
import launch
import models
from dataloader import Tokens, collate
from engine.placement import Replicated
from engine.processes import Apart
from forward import chunks, responses
from models import response_logits
from teacher.cache import Reader, Writer, content_key
from teacher.entries import topk_entries
from teacher.precision import teacher_logits, teacher_path
from teacher.scoring import batches_of
from tests.support.helpers import composed, rows_of, write_pairs
from tests.support.ranks import Ranks

PAD = 0


def ragged() -> list[Tokens]:
    """Rows of several lengths, with prompts of several lengths."""
    rng = np.random.default_rng(2)
    sizes = ((3, 4), (6, 1), (2, 7))
    return [Tokens(rng.integers(1, 99, p + r).tolist(), [False] * p + [True] * r) for p, r in sizes]


# ---- the last layer


def tiny(kind: str) -> torch.nn.Module:
    """Build a model whose logits are capped (Gemma 2), or whose last layer has a bias (Phi)."""
    sizes = dict(vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    special = dict(pad_token_id=PAD, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
    with models.seeded(3):
        if kind == "capped":
            config = Gemma2Config(**sizes, **special, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
            return Gemma2ForCausalLM(config).eval().requires_grad_(False)
        model = PhiForCausalLM(PhiConfig(**sizes, **special)).eval().requires_grad_(False)
        model.lm_head.bias.data.normal_()
        return model


@pytest.mark.parametrize("kind", ["capped", "bias"])
def test_a_float32_teacher_gives_the_plain_path_bit_by_bit(kind):
    model, batch = tiny(kind), collate(ragged(), PAD)
    plain, asked = response_logits(model, batch, 99), teacher_logits(model, batch, 99)
    assert all(torch.equal(one, other) for one, other in zip(plain, asked, strict=True))


@pytest.mark.parametrize("kind", ["capped", "bias"])
def test_a_narrow_teachers_last_layer_is_that_of_float32_on_its_hidden_states(kind, monkeypatch):
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", 32 * 50)  # the vocabulary in three pieces
    model, batch = tiny(kind).to(torch.bfloat16), collate(ragged(), PAD)
    asked = teacher_logits(model, batch, 99)
    assert asked.logits.dtype == torch.float32 and asked.logits.shape == (12, 99)
    hidden = model.model(input_ids=batch.ids, attention_mask=batch.attention.long()).last_hidden_state
    head = model.lm_head
    wide = hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    if kind == "capped":
        wide = 2 * torch.tanh(wide / 2)
    expected = torch.cat(
        [wide[row, [t - 1 for t, on in enumerate(r.response) if on]] for row, r in enumerate(ragged())]
    )
    # float32 sums of 32 products, against bfloat16's own steps of 2^-8
    torch.testing.assert_close(asked.logits, expected[:, :99].float(), atol=2e-5, rtol=2e-5)
    plain = response_logits(model, batch, 99)  # the layer is itself again
    assert plain.logits.dtype == torch.bfloat16 and torch.equal(plain.targets, asked.targets)


def test_numbers_that_float16_cannot_hold_are_refused():
    model = tiny("bias").to(torch.float16)
    model.model.final_layernorm.weight.data.fill_(6e4)
    with pytest.raises(ValueError, match=r"not finite in torch.float16: set model.reference_dtype"):
        teacher_logits(model, collate(ragged(), PAD), 99)


def test_autocast_around_a_teacher_does_not_reach_it():
    model, batch = tiny("bias"), collate(ragged(), PAD)
    with torch.autocast("cpu", torch.bfloat16):
        asked = teacher_logits(model, batch, 99)
    assert torch.equal(asked.logits, teacher_logits(model, batch, 99).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_layer_by_chunks_keeps_its_precision_wherever_it_is_looked_at(dtype, monkeypatch):
    model, batch = tiny("bias").to(dtype), collate(ragged(), PAD)
    whole = teacher_logits(model, batch, 99).logits
    monkeypatch.setattr(responses, "LAZY", 0)
    lazy = teacher_logits(model, batch, 99).logits
    assert isinstance(lazy, chunks.HeadLogits) and isinstance(whole, torch.Tensor)
    with torch.autocast("cpu", torch.bfloat16):
        found = topk_entries(lazy, 5, chunk=3)
    for one, other in zip(found, topk_entries(whole, 5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_policys_logits_by_chunks_are_those_of_its_autocast_after_it(monkeypatch):
    model, batch = tiny("bias"), collate(ragged(), PAD)
    with torch.autocast("cpu", torch.bfloat16):
        whole = response_logits(model, batch, 99)
        monkeypatch.setattr(responses, "LAZY", 0)
        lazy = response_logits(model, batch, 99)
    assert isinstance(lazy.logits, chunks.HeadLogits)
    assert torch.equal(
        functional.token_logps(lazy.logits, lazy.targets), functional.token_logps(whole.logits, whole.targets)
    )


# ---- task=cache


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models and 11 pairs; a function that runs task=cache on them."""
    base = tmp_path_factory.mktemp("scoring")
    data = write_pairs(base / "pairs.jsonl", 11)
    common = [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}"]
    launch.run_task(composed(*common, "exp_name=teacher", "++model.build_seed=5", "n_steps=2", "lr=1e-3"))

    def cache(name: str, *overrides: str) -> Path:
        own = [f"exp_name={name}", "task=cache", "cache.top_k=4", "cache.batch_size=3"]
        launch.run_task(composed(*common, *own, *overrides))
        return base / name / "CACHE"

    return base, common, cache


def contents(folder: Path) -> dict[bytes, list[np.ndarray]]:
    """Return every sequence's arrays."""
    reader = Reader(folder)
    rows = [(content_key(*row), reader.get(*row)) for row in reader.sequences(reader.meta.num_sequences)]
    return {key: [part for _, part in sorted(found.items())] for key, found in rows}


def test_every_quantity_is_what_its_name_says(world):
    base, common, cache = world
    second = f"cache.reference={base}/teacher/FINAL"
    found = {name: Reader(cache(f"q_{name}", f"cache.quantity={name}")) for name in ("logprob", "token_logp", "value")}
    found["advantage"] = Reader(cache("q_advantage", second, "cache.beta=2"))
    settings = launch.settings_of(composed(*common))
    teacher = models.load_model(settings.model, trainable=False)
    reference = models.load_model(settings.model, source=f"{base}/teacher/FINAL", trainable=False)
    ids, mask = found["value"].sequences(3)[-1]
    batch = collate([Tokens(ids, mask)], PAD)
    out, other = (response_logits(model, batch, found["value"].meta.vocab_size) for model in (teacher, reference))
    logps, other_logps = out.logits.log_softmax(-1), other.logits.log_softmax(-1)
    top = logps.topk(4, dim=-1).indices
    entry = {name: reader.get(ids, mask) for name, reader in found.items()}
    # float32 sums in another padding for the first two, float16 on disk for the others
    near, coarse = dict(atol=1e-5, rtol=1e-5), dict(atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(entry["value"]["values"], out.logits.logsumexp(-1), **near)
    np.testing.assert_allclose(entry["token_logp"]["logps"], functional.token_logps(out.logits, out.targets), **near)
    for name in ("logprob", "advantage"):
        assert np.array_equal(entry[name]["ids"], top)
        np.testing.assert_allclose(entry[name]["tail"], 1 - logps.gather(1, top).exp().sum(-1), **coarse)
    np.testing.assert_allclose(entry["logprob"]["values"], logps.gather(1, top), **coarse)
    np.testing.assert_allclose(entry["advantage"]["teacher_logps"], logps.gather(1, top), **coarse)
    np.testing.assert_allclose(entry["advantage"]["values"], 2 * (logps - other_logps).gather(1, top), **coarse)
    assert (found["value"].meta.k, found["advantage"].meta.k, found["advantage"].meta.beta) == (0, 4, 2.0)


def test_a_cache_of_packed_batches_is_that_of_padded_ones(world):
    base, _, cache = world
    second = f"cache.reference={base}/teacher/FINAL"
    padded, packed = (
        contents(cache(f"advantages_{mode}", second, f"model.packing={mode}", "cache.quantity=advantage"))
        for mode in ("none", "prompts")
    )
    assert padded.keys() == packed.keys()
    for key, parts in padded.items():
        for one, other in zip(parts, packed[key], strict=True):  # float16 on disk
            np.testing.assert_allclose(one.astype(float), other.astype(float), atol=2e-3, rtol=1e-3)


def test_sequences_that_share_a_prompt_are_neighbors_where_it_is_computed_once():
    def tokens(prompt: list[int], reply: list[int]) -> Tokens:
        return Tokens(prompt + reply, [False] * len(prompt) + [True] * len(reply))

    long, short, middle = tokens([1, 2], [3] * 9), tokens([1, 2], [4]), tokens([5], [6] * 6)
    rows = [short, middle, long, long]
    assert batches_of(rows, 2) == [[long, middle], [short]]
    assert batches_of(rows, 2, "prompts") == [[long, short], [middle]]


@pytest.mark.parametrize(("rows", "shards"), [(4, 3), (2, 2)])
def test_processes_score_a_shard_each_and_the_whole_is_that_of_one(world, monkeypatch, rows, shards):
    """Of batches of 3, 8 sequences make three, one of them short, and 4 make two: then a process has nothing to do."""
    _, _, cache = world
    one = cache(f"alone_{rows}", f"n_examples={rows}")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 1, 0):  # rank 0 waits for the others
        monkeypatch.setenv("RANK", str(rank))
        many = cache(f"shared_{rows}", f"n_examples={rows}")
    assert len(list(many.glob("shard-*"))) == shards
    both = contents(one), contents(many)
    assert both[0].keys() == both[1].keys()
    for key, parts in both[0].items():
        assert all(np.array_equal(a, b) for a, b in zip(parts, both[1][key], strict=True))
    assert Reader(one).meta.num_sequences == Reader(many).meta.num_sequences == len(both[0])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("cache.beta=3", "beta=1.0, this run has 3.0"),
        ("model.reference_dtype=bfloat16", "precision='weights=float32 .* this run has 'weights=bfloat16"),
        ("model.attn_implementation=eager", "precision=.*attention=default.*attention=eager"),
        ("++model.num_layers=1", "another model: teacher_digest="),
        ("++model.build_seed=6", "another model: teacher_digest="),
    ],
)
def test_a_killed_cache_does_not_go_on_with_what_changes_its_values(world, override, key):
    base, _, cache = world
    common = [f"cache.reference={base}/teacher/FINAL"]
    folder = base / "killed"
    (folder / "DONE").unlink(missing_ok=True)
    if folder.is_dir():
        (folder / "CACHE" / "DONE").unlink()
    cache("killed", *common)
    (folder / "DONE").unlink()
    with pytest.raises(ValueError, match=key):
        cache("killed", *common, override)


def test_a_cache_of_an_older_version_is_refused_by_name(world):
    base, common, cache = world
    folder = cache("older")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | {"format_version": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="format_version=1 .*make it again"):
        launch.run_task(composed(*common, "exp_name=reads_older", "loss=dckd", f"loss.teacher_cache={folder}"))


# ---- a reference's log-probabilities


def losses(folder: Path) -> list[float]:
    return [row["loss/train"] for row in rows_of(folder / "metrics.jsonl")]


def test_dpo_learns_from_what_task_cache_wrote_as_from_a_live_reference(world):
    base, common, cache = world
    folder = cache("reference", "cache.quantity=token_logp")
    short = ["loss=dpo", "n_steps=3", "log_every=1", "lr=1e-3"]
    launch.run_task(composed(*common, *short, "exp_name=live"))
    launch.run_task(composed(*common, *short, "exp_name=loaded", f"++load_reference_logprobs={folder}"))
    # one batch scores 3 rows, the other 16: float32 sums in another padding, measured 1e-7
    assert losses(base / "loaded") == pytest.approx(losses(base / "live"), abs=2e-6)
    other = cache("top_k", "cache.quantity=logprob")
    with pytest.raises(ValueError, match="quantity='logprob', this run has 'token_logp'"):
        launch.run_task(composed(*common, *short, "exp_name=wrong", f"++load_reference_logprobs={other}"))


@pytest.mark.parametrize("key", ["policy_dtype=bfloat16", "reference_dtype=bfloat16", "attn_implementation=eager"])
def test_another_numeric_path_has_a_reference_of_its_own_and_refuses_the_other(world, key):
    base, common, _ = world
    short = ["loss=dpo", "n_steps=1", "n_examples=2", f"cache_dir={base}/{key.partition('=')[0]}"]
    names = [part for part in common if not part.startswith("cache_dir")]
    for name, override in (("plain", []), ("other", [f"++model.{key}"])):
        launch.run_task(composed(*names, *short, *override, f"exp_name={name}", "++cache_reference_logprobs=true"))
    folders = sorted((base / key.partition("=")[0] / "reference_logprobs").iterdir())
    assert len(folders) == 2
    with pytest.raises(ValueError, match="another precision: precision="):
        for folder in folders:
            load = f"++load_reference_logprobs={folder}"
            launch.run_task(composed(*names, *short, f"exp_name=loads_{folder.name}", load))


def test_a_gap_in_a_reference_is_counted_and_shown(world, tmp_path):
    _, common, cache = world
    folder = cache("some", "cache.quantity=token_logp", "n_examples=4")
    with pytest.raises(ValueError, match=re.compile(r"lacks 14 of 22 sequences.*this run: .*cached: ", re.S)):
        launch.run_task(composed(*common, "loss=dpo", "exp_name=gap", f"++load_reference_logprobs={folder}"))


def test_a_killed_scoring_of_a_reference_goes_on_where_it_was(world, monkeypatch):
    base, common, _ = world
    own = [p for p in common if not p.startswith("cache_dir")]
    run = [*own, f"cache_dir={base}/kill", "loss=dpo", "n_steps=1", "++cache_reference_logprobs=true"]
    run += ["model.eval_batch_size=4", "exp_name=x"]

    class Killed(Exception):
        """What ends the first run."""

    add, calls = Writer.add, []

    def third_kills(self, ids, response, arrays):
        calls.append(len(ids))
        if len(calls) == 11:
            raise Killed
        add(self, ids, response, arrays)

    monkeypatch.setattr(Writer, "add", third_kills)
    with pytest.raises(Killed):
        launch.run_task(composed(*run))
    shared = base / "kill" / "reference_logprobs"
    (part,) = shared.iterdir()
    assert part.name.endswith(".part") and not (part / "DONE").exists()
    calls.clear()
    monkeypatch.setattr(Writer, "add", lambda self, *rest: (calls.append(1), add(self, *rest))[1])
    launch.run_task(composed(*run))
    (folder,) = shared.iterdir()
    assert Reader(folder).meta.num_sequences == 22 and len(calls) == 22 - 8  # two batches of 4 were whole


def test_a_teachers_precision_is_its_own_key_and_a_references_the_policys():
    config = launch.settings_of(composed("model=tiny")).model
    assert str(teacher_path(config, "cuda")) == "weights=float16 compute=float16 head=float32 attention=default"
    assert teacher_path(replace(config, reference_dtype="float32"), "cuda").compute == torch.float32
    narrow = replace(config, policy_dtype="bfloat16")
    paths = [str(Replicated(Apart(), c).reference_path()) for c in (config, narrow)]
    assert paths == [f"weights=float32 compute={d} head={d} attention=default" for d in ("float32", "bfloat16")]


# ---- two processes


@pytest.mark.distributed
def test_two_processes_share_a_cache_and_a_sharded_reference(world):
    base, common, cache = world

    def two(*overrides: str) -> None:
        Ranks(*common, *overrides, folder=base).output(timeout=400)

    few = ["n_examples=5", "cache.batch_size=3", "cache.quantity=token_logp"]
    two("exp_name=by_two", "task=cache", *few)
    found, expected = contents(base / "by_two" / "CACHE"), contents(cache("by_one", *few))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)
    dpo = ["loss=dpo", "n_steps=2", "log_every=1", "lr=1e-3", "n_examples=5", "++cache_reference_logprobs=true"]
    dpo += ["model.batch_size=4", "model.eval_batch_size=3"]
    two(*dpo, "exp_name=dpo_by_two", "strategy=fsdp", "seed=3")
    (folder,) = (base / "reference_logprobs").iterdir()  # renamed when whole
    assert len(list(folder.glob("shard-*"))) == 2
    launch.run_task(composed(*common, *dpo, "exp_name=dpo_by_one", "seed=3"))
    # gradients are summed in another order, as in test_sharding.py; the log-probabilities are the same file's
    assert losses(base / "dpo_by_two") == pytest.approx(losses(base / "dpo_by_one"), abs=2e-5)
