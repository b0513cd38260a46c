"""Golden inputs of preference losses -> calls of our functions (paired, token-level, unpaired, reward)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from functional import full_kl, gather_logps, log_collision, row_sums, token_logps
from teacher.entries import topk_kl
from tests.golden.common import Outputs, Skip, Variant, forward_pair, gradient, response_tokens
from trainers.aot import partners
from trainers.bco import bco_loss, mpo_loss
from trainers.dpo import divergence_score, dpo_loss, shared_length_weights, wpo_weights
from trainers.kto import kto_loss
from trainers.log_ratio import (
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    nca_loss,
    robust_dpo_loss,
    sppo_loss,
)
from trainers.paired import humanline, logistic_loss
from trainers.reference_free import log_odds, orpo_loss, simpo_loss, slic_loss
from trainers.token_level import cvar, quantile, reference_risk, tdpo_loss
from trainers.tvkd import OF_STUDENT, event_values, value_rewards, with_rest

NOT_OURS = "not a method of ours"


def aot(own: Tensor, other: Tensor, beta: float, smoothing: float) -> Tensor:
    """Sort through the ranks that the trainer uses; losses come back by rank, as the reference has them."""
    real = torch.ones(len(own), dtype=torch.bool)
    own_sorted, other_sorted = own.detach().double().sort().values, other.detach().double().sort().values
    partner_of_own = partners(own.detach(), real, own_sorted, other_sorted)
    partner_of_other = partners(other.detach(), real, other_sorted, own_sorted)
    losses = logistic_loss(beta * (own - partner_of_own), smoothing)
    back = logistic_loss(beta * (partner_of_other - other), smoothing)
    order = own.detach().argsort()
    # Each loss has its value once and the gradients of both of its sides, whichever row they stand in.
    return losses[order] + back[other.detach().argsort()] - back[other.detach().argsort()].detach()


def family_losses(name: str, params: dict[str, Any], u: Tensor, v: Tensor, logps: list[Tensor], shift: float) -> Tensor:
    """Return the losses [B] of a sequence-level loss by the reference's name; logps: c, r, rc, rr."""
    beta, smoothing = params["beta"], params.get("label_smoothing", 0.0)
    c, r, rc, rr = logps
    simple: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: dpo_loss(u, v, beta, smoothing, params.get("gamma_margin_inside_beta", 0.0)),
        "robust": lambda: robust_dpo_loss(u, v, beta, smoothing),
        "exo_pair": lambda: exo_loss(u, v, beta, smoothing or 1e-3),
        "hinge": lambda: hinge_loss(u, v, beta),
        "ipo": lambda: ipo_loss(u, v, beta),
        "sppo_hard": lambda: sppo_loss(u, v, beta),
        "nca_pair": lambda: nca_loss(u, v, beta),
        "apo_zero": lambda: apo_zero_loss(u, v, beta),
        "apo_down": lambda: apo_down_loss(u, v, beta),
        "discopop": lambda: discopop_loss(u, v, beta, params.get("discopop_tau", 0.05)),
        "bco_pair": lambda: bco_loss(u, v, beta, shift),
        "aot_unpaired": lambda: aot(u, v, beta, smoothing),
        "aot": lambda: aot(c - r, rc - rr, beta, smoothing),
    }
    if name not in simple:
        raise Skip(f"{NOT_OURS}: {name}")
    return simple[name]()


def b_adpa_dpo_family(variant: Variant) -> Outputs:
    params, inputs = variant["params"], variant["inputs"]
    policy = [inputs[f"policy_{side}_logps"].requires_grad_() for side in ("chosen", "rejected")]
    reference = [inputs[f"reference_{side}_logps"] for side in ("chosen", "rejected")]
    u, v = policy[0] - reference[0], policy[1] - reference[1]
    name, beta = params["loss_type"], params["beta"]
    rewards = [beta * u.detach(), beta * v.detach()]
    score_u, score_v = u, v
    if params.get("reference_free"):
        score_u, score_v = policy  # CPO: a uniform reference
    divergence = {"alpha_divergence": "alpha", "js_divergence": "js"}.get(params.get("f_divergence", ""), "reverse_kl")
    scores = [divergence_score(s, divergence, params.get("alpha_coef", 1.0)) for s in (score_u, score_v)]
    shift = 0.0
    if name == "bco_pair":
        earlier = [variant["all"][params["follows"]]["outputs"]] if "follows" in params else []
        seen = [*(r for o in earlier for r in (o["chosen_rewards"], o["rejected_rewards"])), *rewards]
        shift = float(torch.cat(seen).mean())
    ours = {"aot_pair": "aot_unpaired"}.get(name, name)  # quirk 26: the names changed places
    losses = family_losses(ours, params, *scores, [*policy, *reference], shift)
    outputs = {
        "losses": losses,
        "loss": losses.mean(),
        "grad_chosen_logps": gradient(losses.mean(), policy[0]),
        "grad_rejected_logps": gradient(losses.mean(), policy[1]),
        "chosen_rewards": rewards[0],
        "rejected_rewards": rewards[1],
    }
    return {**outputs, "running_mean_delta": shift} if name == "bco_pair" else outputs


def b_cpo_simpo_orpo(variant: Variant) -> Outputs:
    params, inputs, name = variant["params"], variant["inputs"], variant["name"]
    chosen, rejected = (inputs[f"policy_{side}_logps"].requires_grad_() for side in ("chosen", "rejected"))
    beta, smoothing = params["beta"], params.get("label_smoothing", 0.0)
    if name == "orpo_odds_ratio":
        losses = beta * orpo_loss(chosen, rejected)
        grads = {f"grad_{s}_logps": gradient(losses.mean(), x) for s, x in (("chosen", chosen), ("rejected", rejected))}
        odds = log_odds(chosen) - log_odds(rejected)
        return {
            "loss_contribution": losses.mean(),
            "beta_logsigmoid_log_odds": -losses,
            "mean_log_odds": odds.mean(),
            **grads,
        }
    kind = params.get("loss_type", "simpo" if name == "open_instruct_simpo" else "sigmoid")
    gamma = params["gamma_beta_ratio"] * beta if "gamma_beta_ratio" in params else params.get("simpo_gamma", 0.0)
    losses = {
        "sigmoid": lambda: logistic_loss(beta * (chosen - rejected), smoothing),
        "hinge": lambda: hinge_loss(chosen, rejected, beta),
        "ipo": lambda: ipo_loss(chosen, rejected, beta),
        "simpo": lambda: simpo_loss(chosen, rejected, beta, gamma, params.get("alpha", 0.0), smoothing),
    }[kind]()
    return {
        "losses": losses,
        "loss": losses.mean(),
        "grad_chosen_logps": gradient(losses.mean(), chosen),
        "grad_rejected_logps": gradient(losses.mean(), rejected),
    }


def b_orpo_cpo_full(variant: Variant) -> Outputs:
    params, inputs = variant["params"], variant["inputs"]
    if variant["name"] == "orpo":
        raise Skip("quirk 29: its NLL covers the prompt")
    chosen, rejected, nll, logits = forward_pair(inputs)
    if params.get("loss_type") == "simpo":
        counts = [(inputs[f"{side}_labels"][:, 1:] != -100).sum(1) for side in ("chosen", "rejected")]
        losses = simpo_loss(chosen / counts[0], rejected / counts[1], params["beta"], params["simpo_gamma"])
    else:
        losses = logistic_loss(params["beta"] * (chosen - rejected))
    loss = losses.mean() + params["cpo_alpha"] * nll
    return {"loss": loss, "grad_logits": gradient(loss, logits)}


def b_trl_dpo(variant: Variant) -> Outputs:
    params, inputs, name = variant["params"], variant["inputs"], variant["name"]
    if name == "sigmoid_label_smoothing_ignored":
        raise Skip("quirk 22: label_smoothing is ignored by sigmoid")
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    policy = inputs["policy_logits"].requires_grad_()
    sums, tokens = [], None
    for logits in (policy, inputs["reference_logits"]):
        flat, targets, rows = response_tokens(logits, labels)
        logps = token_logps(flat, targets)
        if "ld_alpha" in params:
            logps = shared_length_weights(rows, len(labels) // 2, params["ld_alpha"]) * logps
        sums += row_sums(logps, rows, len(labels)).chunk(2)
        tokens = tokens or row_sums(torch.ones_like(logps), rows, len(labels)).chunk(2)
    c, r, rc, rr = sums
    u, v = c - rc, r - rr
    assert tokens is not None
    kind = params["loss_type"]
    if name == "mpo_mix":  # quirk 19: its bco_pair has no shift
        flat, targets, rows = response_tokens(policy, labels)
        nll = -token_logps(flat, targets)[rows < len(labels) // 2].mean()
        weights = params["loss_weights"]
        loss = mpo_loss(u, v, params["beta"], 0.0, *weights[:2]).mean() + weights[2] * nll
    elif kind == "sft":
        flat, targets, rows = response_tokens(policy, labels)
        logps = token_logps(flat, targets)
        loss = -logps[rows < len(labels) // 2].mean()
    elif name in ("forward_kl", "js", "alpha", "alpha_coef1_is_reverse_kl"):
        kinds = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
        divergence, alpha = (
            kinds[params["f_divergence_type"]],
            1 - params.get("f_alpha_divergence_coef", 0.0),
        )  # quirk 17
        divergence = "reverse_kl" if divergence == "alpha" and alpha == 0 else divergence
        loss = dpo_loss(*(divergence_score(x, divergence, alpha) for x in (u, v)), params["beta"]).mean()
    elif name == "wpo":
        flat, targets, rows = response_tokens(policy.detach(), labels)
        aligned = row_sums(token_logps(flat, targets) - log_collision(flat), rows, len(labels)).chunk(2)
        weights = wpo_weights(aligned[0] / tokens[0] + aligned[1] / tokens[1], clamp=False)
        loss = (weights * dpo_loss(u, v, params["beta"])).mean()
    elif kind in ("ipo", "sigmoid_norm"):
        mean_u, mean_v = u / tokens[0], v / tokens[1]
        loss = (ipo_loss if kind == "ipo" else dpo_loss)(mean_u, mean_v, params["beta"]).mean()
    else:
        loss = family_losses(kind, params, u, v, [c, r, rc, rr], 0.0).mean()  # quirk 19: its bco_pair has no shift
    outputs = {"loss": loss}
    if "grad_logits" in variant["outputs"]:
        outputs["grad_logits"] = gradient(loss, policy)
    return outputs


TVKD_KINDS = {
    "entropy": "student_entropy",
    "sum": "lse",
    "max": "max",
    "expectation": "student_expectation",
    "margin": "margin",
}


def tvkd_side(variant: Variant, flat: Tensor, targets: Tensor, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return log pi(y_t) [N] by events, the values [N], and those behind the last token of each row [B].

    Quirk of the case: a label outside of the cached ids has the probability of the whole rest, and behind a row that is
    not full comes a padding state of 1e-8 in every event, of the student, too; its entropy is 0.
    """
    params, inputs = variant["params"], variant["inputs"]
    entries = [entry for row in inputs[f"teacher_{side}_cache"] for entry in row]
    ids = torch.tensor([e["indices"] for e in entries])
    teacher = torch.tensor([[*e["values"], e["remaining_probs_sum"]] for e in entries], dtype=torch.float64).log()
    student = with_rest(gather_logps(flat, ids))
    found = ids == targets[:, None]
    place = torch.where(found.any(-1), found.long().argmax(-1), ids.shape[-1])
    weights = params["qadapter_alpha"], params["qadapter_alpha_1"], params["qadapter_alpha_tilde"]
    kind = TVKD_KINDS[params.get("qadapter_softvalue_type", "sum")]
    nothing = torch.full((1, teacher.shape[-1]), 1e-8, dtype=torch.float64).log()
    behind = event_values(kind, nothing, nothing, *weights)
    full = inputs[f"{side}_labels"][:, -1] != -100
    terminal = torch.zeros(len(full), dtype=torch.float64) if kind in OF_STUDENT else torch.where(full, 0.0, behind)
    return student.gather(1, place[:, None])[:, 0], event_values(kind, teacher, student, *weights), terminal


def d_tvkd(variant: Variant) -> Outputs:
    params, inputs = variant["params"], variant["inputs"]
    form = params.get("qadapter_loss_type", "")
    if form in ("full_dpo", "adv", "tpkd_ref"):
        raise Skip(f"quirk 15: a form of the code's that no paper states: {form}")
    chosen, rejected, nll, logits = forward_pair(inputs)
    size, rewards = len(chosen), []
    for i, side in enumerate(("chosen", "rejected")):
        labels = inputs[f"{side}_labels"]
        flat, targets, rows = response_tokens(logits[i * size : (i + 1) * size, : labels.shape[1]], labels)
        logps, values, terminal = tvkd_side(variant, flat, targets, side)
        if form == "tpkd":  # quirk 15: the shifted values are computed and not used
            rewards.append(params["tpkd_beta"] * row_sums(logps, rows, size))
        else:
            rewards.append(value_rewards(logps, values, rows, size, params.get("qadapter_gamma", 1.0), terminal))
    loss = params["distillation_weight"] * params["qadapter_distil_weight"] * dpo_loss(*rewards, 1.0).mean()
    if "dpo_weight" in params:
        u, v = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
        loss = loss + params["dpo_weight"] * dpo_loss(u, v, params["beta"]).mean()
    for i, side in enumerate(("chosen", "rejected")):
        if f"{side}_distil_weight" in params:
            entries = [entry for row in inputs[f"teacher_{side}_cache"] for entry in row]
            ids, probabilities = (torch.tensor([e[key] for e in entries]) for key in ("indices", "values"))
            labels = inputs[f"{side}_labels"]
            flat, _, _ = response_tokens(logits[i * size : (i + 1) * size, : labels.shape[1]], labels)
            loss = loss + params[f"{side}_distil_weight"] * topk_kl(flat, ids, probabilities.double().log()).mean()
    outputs = {"loss": loss}
    if "grad_all_logits" in variant["outputs"]:
        outputs["grad_all_logits"] = gradient(loss, logits)
    return outputs


def token_ratios(inputs: dict[str, Any], prefix: str, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (policy log-probs, log-ratios, rows) [N] of the labeled tokens, from policy_ and reference_ logits."""
    flat, targets, rows = response_tokens(inputs[f"policy_{prefix}logits"], labels)
    reference, _, _ = response_tokens(inputs[f"reference_{prefix}logits"], labels)
    logps = token_logps(flat, targets)
    return logps, logps - token_logps(reference, targets), rows


def clip(params: dict[str, Any]) -> Any:
    bounds = {key: params.get(key, 0.0) for key in ("log_epsilon_P", "log_epsilon_R")}
    return SimpleNamespace(humanline=params.get("humanline", False), **bounds)


def halos_paired(variant: Variant) -> Outputs:
    params, inputs, name = variant["params"], variant["inputs"], variant["name"]
    if name in ("slic", "slic_humanline"):
        raise Skip("quirk 34: the reference adds tensors of two shapes")
    if name == "simpo_humanline":
        raise Skip("quirk 36: clamped log-probabilities make the loss constant")
    sums, plain, tokens = [], [], []
    for side in ("chosen", "rejected"):
        inputs[f"policy_{side}_logits"].requires_grad_()
        logps, ratios, rows = token_ratios(inputs, f"{side}_", inputs[f"{side}_labels"])
        size = len(inputs[f"{side}_labels"])
        sums.append(row_sums(humanline(ratios, clip(params)), rows, size))
        plain.append(row_sums(logps, rows, size))
        tokens.append(row_sums(torch.ones_like(logps), rows, size))
    means = [s / n for s, n in zip(sums, tokens, strict=True)]
    kind = name.split("_")[0]
    if kind == "ipo":
        losses = ipo_loss(*means, params["tau"])
    elif kind == "simpo":
        averaged = [s / n for s, n in zip(plain, tokens, strict=True)]
        losses = simpo_loss(*averaged, params["beta"], params["gamma_beta_ratio"] * params["beta"])
    elif kind == "slic":
        losses = slic_loss(*plain, params["beta"]) - params["lambda_coef"] * plain[0]
    else:
        losses = dpo_loss(*sums, params["beta"], params.get("epsilon", 0.0))
    outputs = {"losses": losses, "loss": losses.mean()}
    for side in ("chosen", "rejected"):
        if f"grad_policy_{side}_logits" in variant["outputs"]:
            outputs[f"grad_policy_{side}_logits"] = gradient(losses.mean(), inputs[f"policy_{side}_logits"])
    return outputs


def kto_outputs(
    variant: Variant, labels: Tensor, other_labels: Tensor, desirable: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses [B], z_0, ratios [B]) of a KTO case."""
    params, inputs = variant["params"], variant["inputs"]
    inputs["policy_logits"].requires_grad_()
    _, ratios, rows = token_ratios(inputs, "", labels)
    _, other, other_rows = token_ratios(inputs, "KL_", other_labels)
    ratio_sums = row_sums(humanline(ratios, clip(params)), rows, len(labels))
    point = row_sums(humanline(other, clip(params)), other_rows, len(other_labels)).mean().clamp_min(0).detach()
    if variant["name"].startswith(("kto_zero", "apo_zero")):
        point = torch.zeros_like(point)
    weights = params["desirable_weight"], params["undesirable_weight"]
    return kto_loss(ratio_sums, desirable.bool(), point, params["beta"], *weights), point, ratio_sums


def halos_kto(variant: Variant) -> Outputs:
    inputs = variant["inputs"]
    desirable = inputs["is_chosen"].bool()
    if variant["name"] == "kto_tokenwise_KL":
        raise Skip("quirk 37: a token-wise KL that exists in one fork only")
    losses, point, ratios = kto_outputs(variant, inputs["labels"], inputs["KL_labels"], desirable)
    outputs = {
        "losses_chosen_then_rejected": torch.cat([losses[desirable], losses[~desirable]]),
        "chosen_rewards": ratios[desirable],
        "rejected_rewards": ratios[~desirable],
    }
    for name, value in (("loss", losses.mean()), ("loss_sum", losses.sum()), ("KL_estimate", point), ("KL", point)):
        if name in variant["outputs"]:
            outputs[name] = value
    for name, scalar in (("grad_policy_logits", losses.mean()), ("grad_policy_logits_of_sum", losses.sum())):
        if name in variant["outputs"]:
            outputs[name] = gradient(scalar, inputs["policy_logits"])
    return outputs


def trl_kto(variant: Variant) -> Outputs:
    inputs = variant["inputs"]
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    other = inputs["KL_input_ids"].masked_fill(inputs["KL_completion_mask"] == 0, -100)
    losses, _, _ = kto_outputs(variant, labels, other, inputs["label"])
    return {"loss": losses.mean(), "grad_logits": gradient(losses.mean(), inputs["policy_logits"])}


def radpo(variant: Variant) -> Outputs:
    params, inputs, name = variant["params"], variant["inputs"], variant["name"]
    if params.get("is_cal_risk_distribution_logps"):
        raise Skip("quirk 46: log-probabilities replaced by a constant quantile")
    labels, logits = inputs["labels"], inputs["policy_logits"].requires_grad_()
    flat, targets, rows = response_tokens(logits, labels)
    reference, _, _ = response_tokens(inputs["reference_logits"], labels)
    logps = token_logps(flat, targets)
    kl = full_kl(flat, reference, chunk=3)
    z, reference_logps = reference.log_softmax(-1) - flat.log_softmax(-1), reference.log_softmax(-1)
    torch.testing.assert_close(cvar(z, reference_logps, 1.0), kl)  # the paper's form at level 1 is the KL
    level = params.get("confidence_level", 0.0)
    torch.testing.assert_close(quantile(z, 1 - level), torch.quantile(z, 1 - level, dim=-1))
    risk = kl if name.startswith("tdpo") else reference_risk(z, reference_logps, level, params["is_split_risk_ratio"])
    size = len(labels)
    margins = row_sums(logps - token_logps(reference, targets), rows, size)
    divergence = row_sums(risk, rows, size).chunk(2)
    losses = tdpo_loss(
        *margins.chunk(2), *divergence, params["beta"], 1 if params["alpha"] is None else 2, params["alpha"] or 0.0
    )
    outputs = {
        "losses": losses,
        "loss_mean": losses.mean(),
        "logps_margin": margins,
        "position_kl": row_sums(kl, rows, size),
    }
    if "position_risk_ratio" in variant["outputs"]:
        outputs["position_risk_ratio"] = row_sums(risk, rows, size)
    if "grad_policy_logits_of_sum" in variant["outputs"]:
        outputs["grad_policy_logits_of_sum"] = gradient(losses.sum(), logits)
    return outputs


def reward_pair(variant: Variant) -> Outputs:
    inputs = variant["inputs"]
    chosen, rejected = inputs["chosen_reward"].requires_grad_(), inputs["rejected_reward"].requires_grad_()
    margin = inputs["margin"] if variant["params"]["margin_used"] else 0.0
    loss = logistic_loss(chosen - rejected - margin).mean()
    return {"loss": loss, "grad_chosen": gradient(loss, chosen), "grad_rejected": gradient(loss, rejected)}


def halos_bradley_terry(variant: Variant) -> Outputs:
    inputs = variant["inputs"]
    chosen, rejected = inputs["chosen_logits"].requires_grad_(), inputs["rejected_logits"].requires_grad_()
    loss = logistic_loss(chosen[:, 1] - rejected[:, 1]).mean()
    return {
        "loss": loss,
        "grad_chosen_logits": gradient(loss, chosen),
        "grad_rejected_logits": gradient(loss, rejected),
    }
