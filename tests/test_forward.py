"""Fast ways of asking a model give what the plain way gives: packed rows, shared prompts, logits by chunks."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from forward import responses
from forward.chunks import HeadLogits, whole
from forward.dealing import deal
from forward.packing import pack
from forward.responses import Abilities, abilities_of, response_logits
from forward.rows import Sequences, collate
from functional import entropies, gather_logps, token_logps
from teacher.entries import advantage_scores, distillation_scores, expected_advantage, support_mass, topk_kl
from tokens.examples import Tokens

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = ([5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16])
REPLIES = (([20, 21, 22], [23, 24, 25, 26, 27]), ([30], [31, 32, 33]), ([40, 41, 42, 43, 44, 45, 46, 47], [48, 49]))


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 2} | changes)).double()


def rows() -> list[Tokens]:
    """Chosen then rejected responses to three prompts, as a batch lays them; the last prompt's text is supervised."""
    found = []
    for side in (0, 1):
        for prompt, replies in zip(PROMPTS, REPLIES, strict=True):
            found.append(Tokens([*prompt, *replies[side]], [False] * len(prompt) + [True] * len(replies[side])))
    return found


def gradients(model, batch: Sequences, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return log-probabilities [N], and the gradient of their weighted sum."""
    model.zero_grad()
    out = response_logits(model, batch, 97)
    logps = token_logps(out.logits, out.targets)
    (logps * weights[: len(logps)]).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", ["rows", "prompts"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_rows_give_the_logps_and_gradients_of_padded_ones(packing, lazy, tied, monkeypatch):
    model = llama(tie_word_embeddings=tied, attention_bias=True)
    weights = torch.randn(64, dtype=torch.float64)
    monkeypatch.setattr(responses, "abilities_of", lambda model: Abilities(False, False))
    plain, slopes = gradients(model, collate(rows(), 0), weights)
    monkeypatch.undo()
    monkeypatch.setattr(responses, "LAZY", 0 if lazy else 1 << 40)
    found, own = gradients(model, collate(rows(), 0, packing), weights)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    assert own.keys() == slopes.keys()
    for name, slope in slopes.items():  # the library's norms round to float32 inside, so sums of two differ by that
        assert (own[name] - slope).abs().max() <= 1e-6 * slope.abs().max()


def test_a_shared_prompt_is_computed_once_and_a_response_sees_no_other():
    batch = pack(rows(), "prompts")
    assert batch.ids.shape[1] == sum(map(len, PROMPTS)) + sum(len(r) - 1 for pair in REPLIES for r in pair)
    assert pack(rows(), "rows").ids.shape[1] == sum(len(row.ids) - 1 for row in rows())
    model, changed = llama(), rows()
    changed[3] = Tokens([*PROMPTS[0], 90, 91, 92, 93, 94], changed[3].response)  # the rejected response alone
    before, after = (response_logits(model, collate(r, 0, "prompts"), 97) for r in (rows(), changed))
    own = before.rows == 0
    assert torch.equal(whole(before.logits)[own], whole(after.logits)[own])


def test_rows_without_a_token_to_predict_cost_nothing_and_keep_the_graph():
    nothing = [Tokens(row.ids, [False] * len(row.ids)) for row in rows()]
    assert pack(nothing, "prompts").ids.shape == (1, 1)
    model = llama()
    out = response_logits(model, collate(nothing, 0, "prompts"), 97)
    token_logps(out.logits, out.targets).sum().backward()
    assert out.logits.shape == (0, 97) and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_several_turns_are_predicted_where_they_stand():
    ids = [1, 2, 3, 4, 5, 6, 7, 8]
    turns = Tokens(ids, [False, False, True, True, False, False, True, True])
    other = Tokens([1, 2, 9, 9], [False, False, True, True])
    model = llama()
    plain, packed = (response_logits(model, collate([turns, other], 0, mode), 97) for mode in ("none", "prompts"))
    assert plain.targets.tolist() == packed.targets.tolist() == [3, 4, 7, 8, 9, 9]
    torch.testing.assert_close(whole(packed.logits), whole(plain.logits), rtol=1e-12, atol=1e-12)


def test_a_first_token_is_predicted_by_nothing():
    assert collate([Tokens([1, 2], [True, True])], 0).predictions().targets.tolist() == [2]


def test_padded_rows_without_a_mask_give_the_same_bits():
    model, batch = llama(), collate(rows(), 0)
    found = [responses._run(model, batch, Abilities(takes, False)) for takes in (True, False)]
    real = torch.arange(found[0].shape[1])[None] + batch.predictions().start < batch.attention.sum(1)[:, None]
    assert torch.equal(found[0][real], found[1][real])


def test_what_a_model_cannot_do_is_seen_and_not_done():
    assert abilities_of(llama()) == Abilities(True, True)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0))
    assert abilities_of(capped) == Abilities(False, False)  # windows, and a cap on its logits
    windows = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=3))
    assert abilities_of(windows) == Abilities(False, True)
    eager = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    assert abilities_of(eager) == Abilities(False, True)
    batch = collate(rows(), 0, "prompts")
    plain = responses._run(windows, batch._replace(packed=None), Abilities(False, False))
    assert torch.equal(whole(response_logits(windows, batch, 97).logits), responses.at_responses(plain, batch))


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("width", [97, 90])
def test_functions_of_a_heads_logits_are_those_of_the_tensor(chunk, width):
    torch.manual_seed(1)
    hidden, weight = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((11, 8), (97, 8)))
    bias = torch.randn(97, dtype=torch.float64, requires_grad=True)
    ids, teacher = torch.randint(0, width, (11, 5)), torch.log(torch.full((11, 5), 0.15, dtype=torch.float64))
    lazy = HeadLogits(hidden, weight, bias, width)
    for function in (
        lambda x: gather_logps(x, ids, chunk).sum(-1),
        lambda x: topk_kl(x, ids, teacher, chunk=chunk),
        lambda x: entropies(x, chunk),
        lambda x: gather_logps(x[3:8], ids[3:8], chunk).sum(-1),
    ):
        found = [function(logits) for logits in (lazy, lazy.whole())]
        torch.testing.assert_close(found[0], found[1])
        grads = [torch.autograd.grad((one**2).sum(), (hidden, weight, bias)) for one in found]
        for own, plain in zip(*grads, strict=True):
            torch.testing.assert_close(own, plain)


def test_a_heads_gradient_under_autocast_is_that_of_the_layer():
    torch.manual_seed(1)
    hidden, weight = (torch.randn(*size, requires_grad=True) for size in ((64, 32), (97, 32)))
    targets = torch.randint(0, 97, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        lazy = token_logps(HeadLogits(hidden, weight, None, 97), targets, 16)
        plain = token_logps(torch.nn.functional.linear(hidden, weight), targets, 16)
    assert torch.equal(lazy, plain)
    for own, other in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (lazy, plain)), strict=True):
        torch.testing.assert_close(own, other, rtol=0.02, atol=0.02)  # bfloat16 sums, of other chunks


def test_several_numbers_of_one_pass_are_those_of_passes_of_their_own():
    torch.manual_seed(1)
    logits = torch.randn(11, 97, dtype=torch.float64, requires_grad=True)
    targets, ids = torch.randint(0, 97, (11,)), torch.randint(0, 97, (11, 5))
    teacher = torch.log(torch.full((11, 5), 0.15, dtype=torch.float64)).index_fill(1, torch.tensor([4]), -torch.inf)
    advantages = torch.randn(11, 5, dtype=torch.float64)
    distilled = distillation_scores(logits, targets, ids, teacher, chunk=4)
    plain = token_logps(logits, targets), topk_kl(logits, ids, teacher), support_mass(logits.detach(), ids, teacher)
    aligned = advantage_scores(logits, ids, advantages, teacher > -torch.inf, chunk=4)
    expected = expected_advantage(logits, ids, advantages)
    watched = support_mass(logits.detach(), ids, teacher), entropies(logits.detach())
    for found, other in ((distilled, torch.stack(plain, -1)), (aligned, torch.stack((expected, *watched), -1))):
        torch.testing.assert_close(found, other)
        weights = torch.randn(found.shape, dtype=torch.float64)
        slopes = [torch.autograd.grad((x * weights).sum(), logits, retain_graph=True)[0] for x in (found, other)]
        torch.testing.assert_close(*slopes)


# ---- dealing


@pytest.mark.parametrize(("count", "micro", "world"), [(7, 2, 2), (8, 8, 1), (8, 1, 2), (3, 2, 4), (64, 4, 4)])
def test_every_row_is_dealt_once_and_every_rank_has_as_many_micro_batches(count, micro, world):
    costs = [(i * 37) % 101 + 1 for i in range(count)]
    dealt = deal(costs, micro, world)
    assert sorted(place for rank in dealt for one in rank for place in one) == list(range(count))
    assert len({len(rank) for rank in dealt}) == 1 and all(len(one) <= micro for rank in dealt for one in rank)


def test_neighbors_in_length_share_a_micro_batch():
    costs = [10, 500, 11, 490, 12, 480, 13, 470]
    assert sorted(sorted(costs[p] for p in one) for one in deal(costs, 4, 1)[0]) == [
        [10, 11, 12, 13],
        [470, 480, 490, 500],
    ]


def test_a_budget_of_tokens_is_kept_but_for_rows_above_it():
    costs = [300, 20, 900, 50, 60, 1500, 40, 700]
    dealt = deal(costs, 1, 2, budget=1000)
    assert sorted(place for rank in dealt for one in rank for place in one) == list(range(8))
    assert [sum(costs[p] for p in one) for rank in dealt for one in rank if len(one) > 1] <= [1000] * 8
    assert all(sum(costs[p] for p in one) <= 1000 or len(one) == 1 for rank in dealt for one in rank)
    assert len(dealt[0]) == len(dealt[1])
