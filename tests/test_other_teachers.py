"""Teachers with a vocabulary or a tokenizer of their own, and several of them, from a command's config to a loss."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
import models
from dataloader import collate, load_examples
from engine.placement import Replicated
from engine.processes import Processes
from models import response_logits
from teacher.cache import Reader
from teacher.entries import topk_logps
from teacher.spans import response_ids
from tests.support.helpers import composed, rows_of, write_pairs
from tests.support.tokenizers import written
from trainers.batches import make_batch
from trainers.dckd import DCKD
from trainers.opd import distillation_advantages, span_advantages

TINY = ["model=tiny", "datasets=[local]"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs with a column that names a teacher, and a function that makes a cache of a teacher."""
    base = tmp_path_factory.mktemp("others")
    data = write_pairs(base / "pairs.jsonl", 6)
    rows = [row | {"teacher": "math" if i % 2 else "code"} for i, row in enumerate(rows_of(data))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"cache_dir={base}", *TINY, f"datasets.local.train={data}"]

    def cache(name: str, *overrides: str) -> Path:
        launch.run_task(composed(*common, "task=cache", f"exp_name={name}", "cache.top_k=8", *overrides))
        return base / name / "CACHE"

    made = {name: cache(name, f"++model.build_seed={i}") for i, name in enumerate(("code", "math"), 5)}
    return base, common, cache, made


def trainer_of(common: list[str], *overrides: str) -> DCKD:
    settings = launch.settings_of(composed(*common, "loss=dckd", *overrides))
    return DCKD(settings, models.load_tokenizer(settings.model), Replicated(Processes(), settings.model))


def items_of(trainer: DCKD):
    """Make the items, and read their entries as a batch does."""
    settings = trainer.settings
    items = trainer.items(load_examples(settings.datasets, "train", trainer.tokenizer, settings.model), "train")
    return [item._replace(entries=tuple(entry.read() for entry in item.entries)) for item in items]


def sums_of(trainer: DCKD, items, **model) -> dict[str, float]:
    batch = make_batch(items, trainer.tokenizer.pad_token_id)
    student = models.load_model(trainer.settings.model, trainable=False)
    with torch.no_grad():
        out = response_logits(student, batch.sequences, trainer.vocab_size)
        sums, _ = trainer.sums(out, batch)
    return {name: float(value) for name, value in sums.items()}


def cached(folder: object) -> str:
    return f"loss.teacher_cache={folder}"


# ---- several teachers


def test_one_teacher_in_a_list_is_that_teacher_to_the_bit(world):
    _, common, _, made = world
    alone, listed = (trainer_of(common, cached(f)) for f in (made["code"], f"[{made['code']}]"))
    one, other = items_of(alone), items_of(listed)
    for item, same in zip(one, other, strict=True):
        for a, b in zip(item.entries, same.entries, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert sums_of(alone, one) == sums_of(listed, other)


def test_a_mixture_has_the_weighted_probabilities_of_its_teachers(world):
    _, common, _, made = world
    folders = f"{{code: {made['code']}, math: {made['math']}}}"
    weights = "loss.teacher_weights={math: 3, code: 1}"
    trainer = trainer_of(common, cached(folders), weights)
    assert "the mixture of probabilities (0.25 code, 0.75 math)" in trainer.objective()
    item = items_of(trainer)[2]
    entry, tokens = item.entries[0], item.sequences[0]
    parts = {name: Reader(folder).get(tokens.ids, tokens.response) for name, folder in made.items()}
    for t, (ids, values) in enumerate(zip(entry.ids, entry.values, strict=True)):
        truth: dict[int, float] = {}
        for name, weight in (("code", 0.25), ("math", 0.75)):
            for i, logp in zip(parts[name]["ids"][t], parts[name]["values"][t], strict=True):
                truth[int(i)] = truth.get(int(i), 0.0) + weight * float(np.exp(logp))
        found = {int(i): float(np.exp(v)) for i, v in zip(ids, values, strict=True) if v > -np.inf}
        assert found == pytest.approx(truth, abs=1e-6)
    assert all(np.isfinite(list(sums_of(trainer, items_of(trainer)).values())))


def test_a_column_routes_each_row_to_its_teacher_and_a_missing_name_is_refused_with_its_place(world, tmp_path):
    _, common, cache, made = world
    routed = [cached(f"{{code: {made['code']}, math: {made['math']}}}"), "loss.teacher_column=teacher"]
    trainer = trainer_of(common, *routed)
    for i, item in enumerate(items_of(trainer)):
        reader = Reader(made["math" if i % 2 else "code"])
        for tokens, entry in zip(item.sequences, item.entries, strict=True):
            assert np.array_equal(entry.values, reader.get(tokens.ids, tokens.response)["values"])
    narrow = cache("narrow", "++model.build_seed=5", "cache.top_k=3")  # teachers may keep different numbers of entries
    mixed_widths = trainer_of(
        common, cached(f"{{code: {narrow}, math: {made['math']}}}"), "loss.teacher_column=teacher"
    )
    items = items_of(mixed_widths)
    assert {entry.ids.shape[1] for item in items for entry in item.entries} == {8}
    assert np.isneginf(items[0].entries[0].values[:, 3:]).all()
    assert np.isfinite(list(sums_of(trainer, items).values())).all()
    data = Path(trainer.settings.datasets["local"].train)
    rows = rows_of(data)
    rows[3]["teacher"] = "physics"
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"wrong.jsonl, row 4: .*'teacher' .*'physics'.* has code, math"):
        items_of(trainer_of(common, f"datasets.local.train={wrong}", *routed))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([cached("[]")], "must be a CACHE folder, a list"),
        ([cached("[a,b]"), "loss.teacher_column=teacher"], "give loss.teacher_cache as a mapping"),
        ([cached("a"), "loss.teacher_weights=[1]"], "mixes several teachers"),
        ([cached("[a,b]"), "loss.teacher_weights=[1]"], "one weight a teacher"),
        ([cached("[a,b]"), "loss.teacher_weights=[1,0]"], "numbers above 0"),
        ([cached("{x: a, y: b}"), "loss.teacher_weights={x: 1, z: 1}"], "one weight a teacher of .*: x, y"),
        ([cached("[a,b]"), "loss.mixture=median"], "choose one of probabilities"),
        ([cached("a"), "loss.alignment=bytes"], "needs loss.teacher_tokenizer"),
        ([cached("a"), "loss.span_loss=uld"], "needs loss.alignment=bytes"),
        ([cached("a"), "loss.span_merge=observed"], "with loss.span_loss=kl a span is an event"),
        ([cached("a"), "loss.alignment=bytes", "loss.teacher_tokenizer=b", "loss.tail=truncate"], "needs tail=bucket"),
    ],
)
def test_what_contradicts_itself_is_refused_before_a_model_loads(world, overrides, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(world[1], *overrides)


# ---- one tokenizer, padded vocabularies


def test_padded_embeddings_of_one_tokenizer_change_nothing_but_themselves(world):
    """The teacher's embedding has 320 rows, the student's 272, the tokenizer 259 tokens, as with Qwen's models."""
    base, common, cache, _ = world
    folder = cache("padded", "++model.build.vocab_size=320", "++model.build_seed=8")
    trainer = trainer_of(common, cached(folder), "++model.build.vocab_size=272")
    items = items_of(trainer)
    assert max(int(entry.ids.max()) for item in items for entry in item.entries) < 259
    sums = sums_of(trainer, items)
    teacher_config = launch.settings_of(composed(*common, "++model.build.vocab_size=320", "++model.build_seed=8")).model
    teacher, student = (models.load_model(c, trainable=False) for c in (teacher_config, trainer.settings.model))
    assert (teacher.config.vocab_size, student.config.vocab_size) == (320, 272)
    rows = collate([item.sequences[0] for item in items], trainer.tokenizer.pad_token_id)
    with torch.no_grad():
        ids, logps, _ = topk_logps(response_logits(teacher, rows, 259).logits, 8)
        own = response_logits(student, rows, 259).logits.log_softmax(-1).gather(1, ids)
    rest, own_rest = 1 - logps.exp().sum(1), 1 - own.exp().sum(1)
    live = (logps.exp() * (logps - own)).sum() + (rest * (rest / own_rest).log()).sum()
    assert sums["kl_chosen"] == pytest.approx(trainer.config.chosen_weight * float(live), rel=2e-3)  # float16 on disk


def test_a_live_teachers_padding_is_cut_off_and_other_shared_ids_are_refused(world, tmp_path):
    base, common, *_ = world
    sft = ["n_steps=1", "++model.build.vocab_size=320", "exp_name=live_teacher"]
    launch.run_task(composed(*common, *sft))
    gkd = ["loss=gkd", f"loss.teacher={base}/live_teacher/FINAL", "loss.on_policy=0", "n_steps=1"]
    launch.run_task(composed(*common, *gkd, "++model.build.vocab_size=272", "exp_name=gkd"))
    assert (base / "gkd" / "FINAL").is_dir()
    other = written("bpe", tmp_path)
    shared = r"ids that both have are other tokens\. The first, id \d+, is '.*' for the policy and '.*' there"
    with pytest.raises(ValueError, match=shared):
        launch.run_task(composed(*common, *gkd, f"++model.tokenizer_name_or_path={other}", "exp_name=refused"))


def test_a_teacher_asked_in_tokens_that_mean_something_else_to_it_is_refused(world, tmp_path):
    base, common, cache, _ = world
    launch.run_task(composed(*common, "n_steps=1", "exp_name=own_tokens"))
    other, own = written("bpe", tmp_path), f"++model.load_from={base}/own_tokens/FINAL"
    with pytest.raises(ValueError, match=r"own_tokens/FINAL has another tokenizer .* ids that both have are other"):
        cache("wrong_tokens", own, f"++model.tokenizer_name_or_path={other}")
    cache("right_tokens", own, "++model.tokenizer_name_or_path=assets/byte_tokenizer")


def test_a_familys_tokenizer_with_more_words_is_taken_if_shared_ids_are_the_same(world, tmp_path):
    base, common, cache, _ = world
    larger = models.load_tokenizer(launch.settings_of(composed("model=tiny")).model)
    larger.add_tokens(["<extra>", "<more>"])
    larger.save_pretrained(str(tmp_path / "larger"))
    tokenizer = f"++model.tokenizer_name_or_path={tmp_path}/larger"
    folder = cache("larger", tokenizer, "++model.build.vocab_size=264", "cache.top_k=261", "++model.build_seed=8")
    with pytest.raises(ValueError, match="tokenizer_digest"):
        items_of(trainer_of(common, cached(folder)))
    trainer = trainer_of(common, cached(folder), f"loss.teacher_tokenizer={tmp_path}/larger")
    entry = items_of(trainer)[0].entries[0]
    assert entry.ids.max() < 259 and np.isneginf(entry.values).sum(1).tolist() == [2] * len(entry.values)
    assert (entry.tail > 0).all() and np.isfinite(list(sums_of(trainer, items_of(trainer)).values())).all()


# ---- another tokenizer


@pytest.fixture(scope="module")
def bytes_world(world, tmp_path_factory):
    """A student of bytes and a teacher of a byte-level BPE, with a template and an end of turn of its own."""
    base, common, cache, _ = world
    folder = tmp_path_factory.mktemp("tokenizers")
    other = {kind: written(kind, folder) for kind in ("bpe", "unigram", "words")}
    made = cache("by_bpe", f"++model.tokenizer_name_or_path={other['bpe']}", "cache.top_k=330", "++model.build_seed=8")
    return base, common, cache, other, made


def by_bytes(made: Path, tokenizer: Path) -> list[str]:
    return [cached(made), "loss.alignment=bytes", f"loss.teacher_tokenizer={tokenizer}"]


def test_dckd_by_bytes_covers_the_text_and_a_span_is_as_probable_as_the_teacher_says(bytes_world, capsys):
    base, common, _, other, made = bytes_world
    trainer = trainer_of(common, *by_bytes(made, other["bpe"]))
    items = items_of(trainer)
    assert re.search(r"100.0% of \d+ response tokens are in aligned spans", capsys.readouterr().out)
    theirs, reader = (
        models.load_tokenizer(
            launch.settings_of(composed(*common, f"++model.tokenizer_name_or_path={other['bpe']}")).model
        ),
        Reader(made),
    )
    ids, mask = next((ids, mask) for ids, mask in reader.sequences(99) if "cat dog elk!" in theirs.decode(ids))
    item = next(i for i in items if "cat dog elk!" in trainer.tokenizer.decode(i.sequences[0].ids))
    entry, asked = item.entries[0], reader.get(ids, mask)
    response = [i for i, on in zip(ids, mask, strict=True) if on]
    place = [{int(i): v for i, v in zip(a, b, strict=True)} for a, b in zip(asked["ids"], asked["values"], strict=True)]
    total = sum(place[t][i] for t, i in enumerate(response))
    own = response_ids(item.sequences[0])
    singles = [
        dict(zip(entry.ids[t].tolist(), entry.values[t], strict=True))[own[t]]
        for t in range(len(own))
        if entry.spans[t] < 0
    ]
    assert sum(singles) + entry.span_logps.sum() == pytest.approx(total, rel=1e-4)  # chain rule: the whole text's
    sums = sums_of(trainer, items)
    assert all(np.isfinite(list(sums.values()))) and sums["kl_chosen"] > 0
    launch.run_task(composed(*common, "loss=dckd", *by_bytes(made, other["bpe"]), "exp_name=bytes", "n_steps=2"))
    assert rows_of(base / "bytes" / "metrics.jsonl")[-1]["loss/train"] > 0


def test_uld_by_bytes_trains_and_says_so(bytes_world):
    base, common, _, other, made = bytes_world
    trainer = trainer_of(common, *by_bytes(made, other["bpe"]), "loss.span_loss=uld")
    assert "distance of sorted probabilities" in trainer.objective()
    items = items_of(trainer)
    counts = trainer.counts(make_batch(items, trainer.tokenizer.pad_token_id))
    assert 0 < counts["kl_chosen"] < counts["nll"] and sums_of(trainer, items)["kl_chosen"] > 0


def test_golds_hybrid_by_bytes_trains_and_says_so(bytes_world):
    _, common, _, other, made = bytes_world
    trainer = trainer_of(common, *by_bytes(made, other["bpe"]), "loss.span_loss=gold")
    assert "distance of the others, sorted" in trainer.objective()
    items = items_of(trainer)
    assert 0 < trainer.hybrid_weights[0] < 1 and 0 < int(trainer.shared.sum()) <= len(trainer.tokenizer)
    assert sums_of(trainer, items)["kl_chosen"] > 0
    with pytest.raises(ValueError, match="hybrid_weights=.*must be two numbers"):
        trainer_of(common, *by_bytes(made, other["bpe"]), "loss.span_loss=gold", "loss.hybrid_weights=[1]")


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_a_merged_span_has_one_distribution_times_the_probability_of_its_other_tokens(bytes_world, merge):
    _, common, _, other, made = bytes_world
    merged, plain = (
        trainer_of(common, *by_bytes(made, other["bpe"]), "loss.span_loss=gold", f"loss.span_merge={name}")
        for name in (merge, "none")
    )
    assert "a span of several tokens has the distribution of its" in merged.objective()
    items, events = items_of(merged), items_of(plain)
    checked = 0
    for item, event in zip(items, events, strict=True):
        for entry, whole in zip(item.entries, event.entries, strict=True):
            single = entry.spans < 0
            assert np.array_equal(entry.values[single], whole.values[single])
            for number, factor in enumerate(entry.span_logps):
                inside = np.flatnonzero(entry.spans == number)
                base = inside[0 if merge == "observed" else -1]
                mass = np.exp(entry.values[base]).sum()  # K is the whole vocabulary: what is left is the factor
                assert np.log(mass) == pytest.approx(factor, abs=1e-2)
                assert np.isneginf(entry.values[inside[inside != base]]).all()
                checked += len(inside) > 1
            known = [whole.spans[np.flatnonzero(entry.spans == n)[0]] for n in range(len(entry.span_logps))]
            assert (entry.span_logps >= whole.span_logps[known] - 1e-2).all()  # less one token's probability
    assert checked > 5
    sums = sums_of(merged, items)
    assert all(np.isfinite(list(sums.values()))) and sums["kl_chosen"] != sums_of(plain, events)["kl_chosen"]


def test_by_bytes_with_the_students_own_tokenizer_is_the_plain_loss(world):
    _, common, _, made = world
    plain = trainer_of(common, cached(made["code"]))
    aligned = trainer_of(common, *by_bytes(made["code"], Path("assets/byte_tokenizer")))
    one, other = sums_of(plain, items_of(plain)), sums_of(aligned, items_of(aligned))
    assert one == other


def test_too_little_in_common_is_refused_and_shown(bytes_world):
    _, common, cache, other, _ = bytes_world
    made = cache("by_words", f"++model.tokenizer_name_or_path={other['words']}", "cache.top_k=8")
    with pytest.raises(
        ValueError, match=r"(?s)% of \d+ response tokens are in spans .*min_coverage=0.8.*student: '.*teacher: '"
    ) as error:
        items_of(trainer_of(common, *by_bytes(made, other["words"]), "loss.teacher_weights=null"))
    assert "The worst response" in str(error.value)


def test_a_conversation_that_the_cache_lacks_or_another_tokenizer_is_refused(bytes_world):
    _, common, _, other, made = bytes_world
    with pytest.raises(ValueError, match="tokenizer_digest"):
        items_of(trainer_of(common, *by_bytes(made, other["unigram"])))
    short = ["++model.max_length=20", "++model.max_prompt_length=10"]  # the teacher's prompt is cut otherwise
    with pytest.raises(ValueError, match=r"(?s)has no entries for a sequence .*this run: .*cached: "):
        items_of(trainer_of(common, *by_bytes(made, other["bpe"]), *short))


# ---- on-policy distillation


def test_the_advantage_of_a_span_goes_to_each_of_its_tokens():
    from teacher.alignment import Span

    own, theirs = np.array([-1.0, -2.0, -0.5, -3.0]), np.array([-0.7, -0.2, -1.5])
    spans = [Span(0, 2, 0, 1), Span(3, 4, 1, 3)]
    last = -0.2 - 1.5 + 3.0
    first = -0.7 + 3.0
    np.testing.assert_allclose(span_advantages(own, theirs, spans, 0.0), [first, first, 0, last])
    np.testing.assert_allclose(span_advantages(own, theirs, spans, 0.5)[0], first + 0.5 * last)
    single = [Span(i, i + 1, i, i + 1) for i in range(3)]
    for discount in (0.0, 0.7):
        plain = distillation_advantages(torch.tensor(own[None, :3]), torch.tensor(theirs[None]), discount)
        np.testing.assert_allclose(span_advantages(own[:3], theirs, single, discount), plain[0])


def test_on_policy_distillation_learns_from_a_teacher_with_another_tokenizer(bytes_world):
    base, common, _, other, _ = bytes_world
    bpe = f"++model.tokenizer_name_or_path={other['bpe']}"
    launch.run_task(composed(*common, "exp_name=bpe_teacher", "n_steps=1", bpe))
    opd = ["loss=opd", f"loss.teacher={base}/bpe_teacher/FINAL", "loss.max_new_tokens=6", "n_steps=1", "n_examples=3"]
    with pytest.raises(ValueError, match="another tokenizer than the policy"):
        launch.run_task(composed(*common, *opd, "exp_name=opd_ids"))
    # an untrained student says bytes that are no characters: little is in common, and that is refused unless allowed
    launch.run_task(composed(*common, *opd, "loss.alignment=bytes", "loss.min_coverage=0", "exp_name=opd_bytes"))
    row = rows_of(base / "opd_bytes" / "metrics.jsonl")[-1]
    assert 0 <= row["coverage/train"] < 1 and np.isfinite(row["loss/train"])
    with pytest.raises(ValueError, match=r"% of \d+ response tokens are in spans .*min_coverage=1.0"):
        launch.run_task(composed(*common, *opd, "loss.alignment=bytes", "loss.min_coverage=1", "exp_name=opd_refused"))
