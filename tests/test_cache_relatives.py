"""loss=dadpo, ctpd, pad, aligndistil, opsd: what each is at its ends, and what it refuses."""

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
from conversations import Conversation
from tests.support.bigram import examples, gradient_of, items_of, tokens, trainer_of
from tests.support.chain import chain_of
from tests.support.helpers import composed, rows_of
from trainers.aligndistil import extrapolations
from trainers.pad import jsd, ranked_groups, ranking_logps
from trainers.sampling import Said


def test_dadpo_without_the_teacher_s_weight_is_dpo_and_with_the_reference_for_a_teacher_a_stronger_one() -> None:
    plain, other = trainer_of("dadpo", "loss.teacher_weight=0"), trainer_of("dpo")
    items = items_of(plain, "dadpo")
    torch.testing.assert_close(gradient_of(plain, items)[1], gradient_of(other, items_of(other, "dpo"))[1])
    both, strong = trainer_of("dadpo", "loss.teacher_weight=0.3"), trainer_of("dpo", "loss.beta=0.4")
    known = both.reference.table.log_softmax(-1).detach().numpy()
    alike = [
        item._replace(
            entries=tuple(
                entry._replace(values=np.array([[known[a, b]] for a, b in steps(side)]))
                for side, entry in zip(item.sequences, item.entries, strict=True)
            )
        )
        for item in items
    ]
    torch.testing.assert_close(
        gradient_of(both, alike)[1], gradient_of(strong, items_of(strong, "dpo"))[1], rtol=1e-5, atol=1e-7
    )  # a cache's numbers are float32


def steps(side) -> list[tuple[int, int]]:
    return [(side.ids[t - 1], side.ids[t]) for t in range(len(side.ids)) if side.response[t]]


def test_ctpd_with_equal_weights_and_the_reference_for_a_teacher_is_dpo() -> None:
    one, plain = trainer_of("ctpd", "loss.weight_exponent=0"), trainer_of("dpo")
    known = one.reference.table.log_softmax(-1).detach().numpy()
    items = [
        item._replace(
            entries=tuple(
                entry._replace(
                    values=np.array([[known[a, b], -1.0, -2.0] for a, b in steps(side)]),
                )
                for side, entry in zip(item.sequences, item.entries, strict=True)
            )
        )
        for item in items_of(one, "ctpd")
    ]
    torch.testing.assert_close(
        gradient_of(one, items)[1], gradient_of(plain, items_of(plain, "dpo"))[1], rtol=1e-5, atol=1e-7
    )
    with pytest.raises(ValueError, match="clamp_low=2.0 must be below"):
        trainer_of("ctpd", "loss.clamp_low=2.0")


def test_rankings_of_plackett_and_luce_are_a_distribution_whose_first_places_are_a_softmax() -> None:
    scores = torch.tensor([[0.3, -1.2, 2.0, 0.1], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = ranking_logps(scores).exp()
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    first = torch.tensor([order[0] for order in permutations(range(4))])
    for response in range(4):
        torch.testing.assert_close(found[:, first == response].sum(1), scores.softmax(1)[:, response])
    torch.testing.assert_close(found[1], torch.full((24,), 1 / 24, dtype=torch.float64))


def test_pad_of_two_responses_compares_two_coins() -> None:
    own, theirs = torch.tensor([[1.5, 0.5]]).double(), torch.tensor([[0.2, 0.9]]).double()
    p, q = torch.sigmoid(own[0, 0] - own[0, 1]), torch.sigmoid(theirs[0, 0] - theirs[0, 1])
    mixed = (p + q) / 2
    kl = lambda a, b: a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))  # noqa: E731
    expected = (kl(float(p), float(mixed)) + kl(float(q), float(mixed))) / 2
    assert float(jsd(ranking_logps(own), ranking_logps(theirs))) == pytest.approx(expected, rel=1e-12)
    assert float(jsd(ranking_logps(own), ranking_logps(own))) == pytest.approx(0, abs=1e-12)


def test_generations_are_ranked_in_groups_of_n_and_none_is_left_out() -> None:
    generations = {b"a": [0, 3, 4, 7], b"b": [1, 2]}
    assert ranked_groups([b"a", b"b", b"a"], generations, 2) == [[0, 3], [4, 7], [1, 2]]
    with pytest.raises(ValueError, match=r"loss\.n=3: a prompt has 4 generations"):
        ranked_groups([b"a"], generations, 3)
    with pytest.raises(ValueError, match="pairs have two responses"):
        trainer_of("pad", "loss.n=3")


def test_aligndistil_goes_nowhere_beyond_two_models_that_agree() -> None:
    same = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    assert extrapolations(same, same, 10.0, True).tolist() == [0.001] * 3
    trainer = trainer_of("aligndistil", "loss.beta=0.001")
    trainer.frozen_models["reverse_teacher"] = trainer.frozen_models["teacher"]
    reverse_kl = trainer_of("gkd", "loss.beta=1")
    reverse_kl.frozen_models = {"teacher": trainer.frozen_models["teacher"]}
    items = items_of(trainer, "aligndistil")
    torch.testing.assert_close(gradient_of(trainer, items)[1], gradient_of(reverse_kl, items)[1])


def test_opsd_shows_the_solution_to_the_teacher_alone() -> None:
    trainer = trainer_of("opsd", "loss.context='{prompt} SOLVED {solution} NOW'")
    said = [{"role": "assistant", "content": "forty two"}]
    conversation = Conversation([{"role": "user", "content": "six by seven?"}], said, None, None, {})
    row = replace(examples()[0], conversation=conversation)
    item = trainer.item(row, row.chosen, 0)
    context = trainer.tokenizer.decode(
        [token for token, on in zip(item.scored[0].ids, item.scored[0].response, strict=True) if not on]
    )
    assert "six by seven? SOLVED forty two NOW" in context
    answered = trainer.with_response(item, row.prompt, Said([7, 8, 9], "stop"))
    assert answered.sequences[0] == tokens(row.prompt, [7, 8, 9])
    assert answered.scored[0].ids[-3:] == [7, 8, 9] and answered.scored[0].num_supervised == 3
    assert trainer.tokenizer.decode(answered.scored[0].ids[:-3]) == context
    short = trainer_of("opsd", "loss.max_context_length=4")
    with pytest.raises(ValueError, match=r"above loss\.max_context_length=4"):
        short.item(row, row.chosen, 0)
    with pytest.raises(ValueError, match="must hold {solution}"):
        trainer_of("opsd", "loss.context='{prompt}'")
    with pytest.raises(ValueError, match="the solution that the teacher sees"):
        trainer.item(replace(row, chosen=None, rejected=None), tokens([1], [2]), 0)


@pytest.mark.slow
def test_three_generations_are_ranked_and_a_student_answers_itself(tmp_path: Path) -> None:
    chain = chain_of(tmp_path)
    common = [f"cache_dir={tmp_path}", "model=tiny", "datasets=[local]", f"datasets.local.train={chain['data']}"]
    answered = ["task=generate", chain["start"], "generation.n=3", "generation.max_new_tokens=6", "exp_name=three"]
    launch.run_task(composed(*common, *answered))
    generations = f"{tmp_path}/three/generations.jsonl"
    teacher = [f"model.load_from={tmp_path}/teacher/FINAL", f"cache.generations={generations}"]
    launch.run_task(composed(*common, "task=cache", "cache.quantity=token_logp", *teacher, "exp_name=scored"))
    training = [*common, chain["start"], "n_steps=4", "lr=1e-3", "model.batch_size=4", "log_every=2"]
    runs = {
        "pad": [f"loss.teacher_cache={tmp_path}/scored/CACHE", f"loss.generations={generations}", "loss.n=3"],
        "opsd": ["loss.max_new_tokens=6", "loss.clip=0.05", f"datasets.local.test={chain['data']}"],
        "aligndistil": [
            f"loss.teacher={tmp_path}/teacher/FINAL",
            f"loss.reverse_teacher={tmp_path}/start/FINAL",
            "loss.max_new_tokens=6",
        ],
    }
    for name, options in runs.items():
        launch.run_task(composed(*training, f"loss={name}", f"exp_name={name}", *options))
        rows = rows_of(tmp_path / name / "metrics.jsonl")
        assert all(math.isfinite(row["loss/train"]) for row in rows if "loss/train" in row)
    found = rows_of(tmp_path / "opsd" / "metrics.jsonl")
    responses = [row["response_tokens/train"] for row in found if "response_tokens/train" in row]
    assert responses[-1] <= 6  # its own, not the data's
    assert max(row.get("generated_tokens", 0) for row in found) >= 16  # four steps of four responses
    with pytest.raises(ValueError, match=r"loss\.n=2: a prompt has 3 generations"):
        launch.run_task(composed(*training, "loss=pad", "exp_name=two", *runs["pad"][:2], "loss.n=2"))
    assert json.loads((tmp_path / "scored/CACHE/meta.json").read_text())["quantity"] == "token_logp"
