"""task=audit: every figure against brute force, and caches that are damaged on purpose."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launch
from functional import full_kl
from report.audit_page import figure, html
from teacher import audit
from teacher.audit import Stored, stored_of, summary, token_figures
from teacher.cache import Arrays, Reader, Writer, finish
from teacher.entries import expected_advantage, topk_kl
from tests.support.helpers import composed, write_pairs
from tests.test_evaluation_report import cells_of, rendered

N, K, V = 7, 4, 12


def random_logps(seed: int, scale: float = 1.5) -> torch.Tensor:
    return (scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(
        -1
    )


def exact_entries(teacher: torch.Tensor, reference: torch.Tensor | None = None, k: int = K) -> Stored:
    """Store the top k of a teacher without any loss."""
    logps, ids = teacher.topk(k, dim=-1)
    kept = torch.ones_like(ids, dtype=torch.bool)
    advantages = None if reference is None else (teacher - reference).gather(-1, ids)
    return Stored(ids, logps, kept, 1 - logps.exp().sum(-1), advantages)


TEACHER, STUDENT, REFERENCE = random_logps(0), random_logps(1), random_logps(2)


def test_mass_overlap_and_errors_are_what_a_loop_finds():
    stored = exact_entries(TEACHER)
    shifted = stored._replace(logps=stored.logps + 0.25)
    shifted.kept[2, 3] = False
    figures = token_figures(TEACHER, shifted, STUDENT)
    for n in range(N):
        ids = [int(i) for i, on in zip(shifted.ids[n], shifted.kept[n], strict=True) if on]
        probabilities = TEACHER[n].exp()
        assert float(figures["mass"][n]) == pytest.approx(sum(float(probabilities[i]) for i in ids))
        assert float(figures["best_mass"][n]) == pytest.approx(
            float(probabilities.sort(descending=True)[0][: len(ids)].sum())
        )
        assert float(figures["error_max"][n]) == pytest.approx(0.25)
        assert float(figures["error_weighted"][n]) == pytest.approx(0.25 * float(figures["mass"][n]))
        both = set(STUDENT[n].topk(K).indices.tolist()) & set(TEACHER[n].topk(K).indices.tolist())
        assert float(figures["overlap"][n]) == len(both) / K
    assert figures["entries"].tolist() == [4.0, 4.0, 3.0, 4.0, 4.0, 4.0, 4.0]


def test_the_kls_and_the_gradient_are_those_of_the_loss_that_trains():
    stored = exact_entries(TEACHER)
    logits = STUDENT.clone().requires_grad_()
    truncated = topk_kl(logits, stored.ids, stored.logps)
    (gradient,) = torch.autograd.grad(truncated.sum(), logits)
    torch.testing.assert_close(audit.bucket_kl(STUDENT, stored), truncated.detach())
    torch.testing.assert_close(audit.bucket_gradient(STUDENT, stored), gradient)
    exact = full_kl(logits, TEACHER)
    (whole,) = torch.autograd.grad(exact.sum(), logits)
    figures = token_figures(TEACHER, stored, STUDENT)
    torch.testing.assert_close(figures["kl_exact"], exact.detach())
    torch.testing.assert_close(figures["dckd_dot"], (gradient * whole).sum(-1))
    torch.testing.assert_close(figures["dckd_exact"], whole.square().sum(-1))
    found = audit.gradient_summary({name: part.numpy() for name, part in figures.items()}, "dckd")
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(gradient.flatten(), whole.flatten(), 0)))
    assert found["relative_norm"] == pytest.approx(float(gradient.norm() / whole.norm()))
    assert found["relative_error"] == pytest.approx(float((gradient - whole).norm() / whole.norm()))
    assert found["worst_token_cosine"] == pytest.approx(float(torch.cosine_similarity(gradient, whole, -1).min()))


def test_fewer_entries_than_k_count_as_those_entries_alone():
    full = exact_entries(TEACHER)
    padded = Stored(
        torch.cat([full.ids, torch.zeros(N, 2, dtype=torch.int64)], -1),
        torch.cat([full.logps, torch.full((N, 2), -torch.inf, dtype=torch.float64)], -1),
        torch.cat([full.kept, torch.zeros(N, 2, dtype=torch.bool)], -1),
        full.tail,
    )
    torch.testing.assert_close(audit.bucket_kl(STUDENT, padded), audit.bucket_kl(STUDENT, full))
    torch.testing.assert_close(audit.bucket_gradient(STUDENT, padded), audit.bucket_gradient(STUDENT, full))
    one, other = token_figures(TEACHER, padded), token_figures(TEACHER, full)
    assert all(torch.allclose(one[name], other[name]) for name in one)


def test_all_entries_leave_no_bias():
    figures = token_figures(TEACHER, exact_entries(TEACHER, REFERENCE, V), STUDENT, REFERENCE)
    found = summary({name: part.numpy() for name, part in figures.items()}, np.arange(1, N + 1))
    assert found["mass"]["min"] == pytest.approx(1) and found["mass_missed"] == pytest.approx(0, abs=1e-12)
    assert found["kl"]["gap"] == pytest.approx(0, abs=1e-9)
    for name in ("dckd_gradient", "adpa_gradient"):
        assert found[name]["cosine"] == pytest.approx(1) and found[name]["relative_norm"] == pytest.approx(1)
    assert found["temperature"] == pytest.approx(1) and found["fit"] == pytest.approx(1)


def test_the_advantage_gradient_is_that_of_the_loss_that_trains():
    stored = exact_entries(TEACHER, REFERENCE)
    logits = STUDENT.clone().requires_grad_()
    assert stored.advantages is not None
    (gradient,) = torch.autograd.grad(expected_advantage(logits, stored.ids, stored.advantages).sum(), logits)
    given = audit.dense(stored, stored.advantages, V)
    torch.testing.assert_close(audit.advantage_gradient(STUDENT, given), gradient)


def test_wrong_signs_are_counted_by_entries_and_by_probability():
    stored = exact_entries(TEACHER, REFERENCE)
    assert stored.advantages is not None
    flipped = stored.advantages.clone()
    flipped[1, 2] *= -1
    flipped[4, 0] *= -1
    figures = token_figures(TEACHER, stored._replace(advantages=flipped), None, REFERENCE)
    found = audit.signs_summary({name: part.numpy() for name, part in figures.items()}, N * K)
    assert found["wrong_signs"] == pytest.approx(2 / (N * K))
    assert found["wrong_sign_mass"] == pytest.approx(float(stored.logps[1, 2].exp() + stored.logps[4, 0].exp()) / N)
    assert found["max_error"] == pytest.approx(2 * float(stored.advantages[[1, 4], [2, 0]].abs().max()))


def test_a_sign_of_next_to_nothing_is_not_counted():
    exact, kept = torch.tensor([[1e-8, 1e-3]]), torch.ones(1, 2, dtype=torch.bool)
    figures = audit.sign_errors(torch.zeros(1, 2), exact, torch.tensor([[0.9, 0.1]]).log(), kept)
    assert figures["wrong_signs"].tolist() == [1.0] and float(figures["wrong_sign_mass"][0]) == pytest.approx(0.1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_of_the_entries_is_seen(temperature):
    stored = exact_entries((TEACHER / temperature).log_softmax(-1))
    figures = {name: part.numpy() for name, part in token_figures(TEACHER, stored).items()}
    assert audit.temperature_of(figures)["temperature"] == pytest.approx(temperature)
    assert audit.temperature_of(figures)["fit"] == pytest.approx(1)
    other = {name: part.numpy() for name, part in token_figures(random_logps(9), stored).items()}
    fit = audit.temperature_of(other)["fit"]
    assert fit is not None and fit < 0.5  # entries of another model are no temperature of this one


def test_mass_by_position_and_the_first_difference():
    mass = np.array([0.5, 0.9, 0.8, 0.7, 0.6])
    bins = audit.by_position({"mass": mass}, np.array([1, 2, 3, 4, 20]))
    assert [(row["from"], row["tokens"]) for row in bins] == [(1, 1), (2, 2), (4, 1), (16, 1)]
    assert bins[1]["mean"] == pytest.approx(0.85) and bins[1]["min"] == pytest.approx(0.8)
    assert audit.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert audit.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert audit.first_difference([1, 2, 3], [1, 2]) == 2


def test_what_a_reader_returns_becomes_entries():
    logps = np.array([[-0.5, -1.0], [-0.1, -np.inf]], dtype=np.float32)
    arrays = {"ids": np.array([[3, 4], [5, 9]]), "values": logps, "tail": np.zeros(2, np.float32)}
    stored = stored_of(arrays)
    assert stored.kept.tolist() == [[True, True], [True, False]] and stored.advantages is None
    both = stored_of(arrays | {"values": np.ones((2, 2), np.float32), "teacher_logps": logps})
    assert both.advantages is not None and both.kept.tolist() == stored.kept.tolist()


def test_what_a_codec_states_is_no_error_and_more_is():
    stored = exact_entries(TEACHER)
    half = stored._replace(logps=stored.logps * (1 + 0.9 / 2048))
    assert float(audit.beyond_stated(TEACHER, half, None).max()) == 0
    twice = stored._replace(logps=stored.logps * (1 + 2 / 2048))
    excess = audit.beyond_stated(TEACHER, twice, None)
    torch.testing.assert_close(excess, stored.logps.abs() / 2048, rtol=2e-3, atol=0)
    levels = (256 * (stored.logps / 2).exp()).round().clamp_min(1) / 256
    rounded = stored._replace(logps=2 * levels.log())
    assert float(audit.beyond_stated(TEACHER, rounded, 1 / 512).max()) == 0
    assert float(audit.beyond_stated(TEACHER, rounded._replace(logps=rounded.logps + 0.2), 1 / 512).max()) > 0.1


# ---- task=audit


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Two teachers, a cache of each quantity, and a function that audits; it returns audit.json and its words."""
    base = tmp_path_factory.mktemp("audit")
    data = write_pairs(base / "pairs.jsonl", 10)
    common = [f"cache_dir={base}", "model=tiny", "datasets=[local]", f"datasets.local.train={data}", "cache.top_k=12"]
    launch.run_task(composed(*common, "exp_name=start", "n_steps=1", "lr=1e-3"))
    launch.run_task(composed(*common, "exp_name=teacher", "n_steps=3", "lr=3e-3"))
    teachers = [f"model.load_from={base}/teacher/FINAL", f"cache.reference={base}/start/FINAL"]
    launch.run_task(composed(*common, "exp_name=logprob", "task=cache", teachers[0]))
    launch.run_task(composed(*common, "exp_name=advantage", "task=cache", *teachers))
    bars = ["audit.min_mass=0.05", "audit.min_cosine=0.05", "audit.max_kl_gap=5"]  # tiny models are nearly uniform

    def audited(name: str, cache: str, *overrides: str) -> dict[str, Any]:
        given = [f"exp_name={name}", "task=audit", f"audit.cache={base}/{cache}/CACHE", "audit.n_sequences=6"]
        launch.run_task(composed(*common, *given, *bars, "audit.precisions=[]", *teachers, *overrides))
        return json.loads((base / name / "audit.json").read_text())

    return base, audited


def damaged(base: Path, name: str, change: Callable[[Arrays], Arrays], **meta: Any) -> None:
    """Write the log-probability cache anew with changed entries."""
    reader = Reader(base / "logprob/CACHE")
    rows = reader.sequences(reader.meta.num_sequences)
    writer = Writer(base / name / "CACHE", replace(reader.meta, **meta))
    for ids, mask in rows:
        writer.add(ids, mask, change(reader.get(ids, mask)))
    writer.close()
    finish(base / name / "CACHE", writer.meta, writer.keys)


def test_a_whole_cache_meets_every_bar(chain, capsys):
    base, audited = chain
    for name in ("logprob", "advantage"):
        found = audited(f"audit_{name}", name)
        assert found["verdict"] == "verdict: every bar is met", found["verdict"]
        assert found["verdict"] in capsys.readouterr().out
        figures = found["figures"]
        assert figures["error"]["beyond_stated"] < 1e-4 and figures["temperature"] == pytest.approx(1, abs=1e-3)
        assert found["drift"]["retokenized_otherwise"] == 0 and found["drift"]["coverage"] == {"rows": 20, "held": 20}
        assert "stand-in" in found["student"] and "start/FINAL" in found["student"]
        assert len(found["worst"]) == 12 and (base / f"audit_{name}/audit.md").is_file()
    assert figures["advantages"]["stored"]["wrong_sign_mass"] < 0.01


def test_a_damaged_cache_is_named_in_words(chain):
    base, audited = chain
    rng = np.random.default_rng(0)

    def noisy(arrays: Arrays) -> Arrays:
        return arrays | {"values": arrays["values"] + rng.normal(0, 0.2, arrays["values"].shape).astype(np.float32)}

    def heated(arrays: Arrays) -> Arrays:
        logps = arrays["values"] / 2
        return arrays | {"values": logps - np.log(np.exp(logps).sum(-1, keepdims=True) * 1.5)}

    damaged(base, "noisy", noisy)
    damaged(base, "heated", heated)
    assert "stored against exact: an entry is" in audited("audit_noisy", "noisy")["verdict"]
    assert "the entries look like temperature 2.0" in audited("audit_heated", "heated")["verdict"]
    other = audited("audit_other", "logprob", f"model.load_from={base}/start/FINAL")
    assert "another teacher: the cache was made with teacher_digest=" in other["verdict"]
    assert "not the top entries" in other["verdict"] and "temperature" not in other["verdict"]


def test_a_template_that_drifted_shows_in_the_data_that_is_looked_up(chain):
    _, audited = chain
    found = audited("audit_cut", "logprob", "model.max_length=40", "model.max_prompt_length=30")
    assert "of 20 sequences that this run's data" in found["verdict"]
    assert "agrees with the nearest cached one" in found["drift"]["coverage"]["first"]


def test_narrow_precisions_are_asked_or_named_as_not_possible(chain):
    _, audited = chain
    found = audited("audit_narrow", "advantage", "audit.precisions=[bfloat16,float16]")["figures"]["precisions"]
    for row in found.values():
        assert "not_possible" in row or (row["max_logp_error"] > 1e-4 and 0 <= row["wrong_signs"] <= 1)
    assert found["bfloat16"]["max_logp_error"] > found["float16"].get("max_logp_error", 0)


def test_an_audit_without_its_teachers_is_refused(chain):
    _, audited = chain
    with pytest.raises(ValueError, match="name their second teacher with cache.reference=FOLDER"):
        audited("audit_none", "advantage", "cache.reference=null")
    with pytest.raises(ValueError, match="task=audit needs audit.cache=FOLDER"):
        launch.run_task(composed("task=audit", "exp_name=none"))


def test_a_browser_shows_the_worst_tokens_and_untrusted_text_is_escaped(chain, tmp_path):
    base, audited = chain
    found = audited("audit_page", "advantage")
    dom, log = rendered(base / "audit_page/audit.html", tmp_path / "profile")
    assert dom.count("<mark>") == 12 and "every bar is met" in dom and 'href="#worst"' in dom
    assert figure(found["figures"]["mass"]["mean"]) in cells_of(dom, "kept")
    for trouble in ("CONSOLE", "Uncaught", "Content Security Policy"):
        assert trouble not in log
    nasty = "<img src=x onerror=alert(1)>"
    found["worst"][0] |= {"token": nasty, "before": nasty}
    found["worst"][0]["stored"][0]["token"] = nasty
    found["drift"]["first"] = {"sequence": 0, "position": 0, "in_response": True, "stored": [nasty], "again": []}
    found["missed"], found["student"] = [nasty], nasty
    page = html(found)
    assert "<img" not in page and page.count("&lt;img") >= 5
