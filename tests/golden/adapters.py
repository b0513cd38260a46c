"""From golden inputs to calls of our functions. An adapter returns the outputs it computed, by the case's names.

Letters: B rows, T tokens, N response tokens (flat), V vocabulary. `Skip` names why a variant is not ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.optimizer import learning_rate_scale
from functional import entropies, gather_logps, log_collision, row_sums, token_logps
from teacher.entries import expected_advantage, hybrid_distance, sorted_distance, topk_kl, topk_logps
from tests.golden import policy_gradient, preference
from tests.golden.common import Outputs, Skip, Variant, forward_pair, gradient, response_tokens
from trainers.dpo import dpo_loss, wpo_weights
from trainers.log_ratio import ipo_loss


def dense(values: Tensor, labels: Tensor) -> Tensor:
    """Put flat token values [N] back into [B, T-1], 0 elsewhere."""
    mask = labels[:, 1:] != -100
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask, values)


def a_logps(variant: Variant) -> Outputs:
    inputs, name = variant["inputs"], variant["name"]
    logits, labels = inputs["logits"].requires_grad_(), inputs["labels"]
    flat, targets, rows = response_tokens(logits, labels)
    logps = token_logps(flat, targets, chunk=3)
    sums = row_sums(logps, rows, len(labels))
    if name == "halos_token_logps":
        return {
            "token_logps": dense(logps, labels),
            "seq_logps_sum": sums,
            "grad_logits_of_total_sum": gradient(sums.sum(), logits),
        }
    if name == "token_entropy":
        return {"entropy": entropies(logits[:, :-1].reshape(-1, logits.shape[-1])).view(len(labels), -1)}
    lengths = (labels[:, 1:] != -100).sum(1)
    seq = sums / lengths if variant["params"]["average_log_prob"] else sums
    return {"seq_logps": seq, "grad_logits_of_total_sum": gradient(seq.sum(), logits)}


def a_adpa_forward(variant: Variant) -> Outputs:
    inputs = variant["inputs"]
    chosen, rejected, nll, logits = forward_pair(inputs)
    counts = [(inputs[f"{side}_labels"][:, 1:] != -100).sum(1) for side in ("chosen", "rejected")]
    if variant["name"] in ("length_normalized", "ipo_average"):
        chosen, rejected = chosen / counts[0], rejected / counts[1]
        return {"chosen_logps": chosen, "rejected_logps": rejected, "nll_loss_chosen": nll}
    if variant["name"] == "wpo_weights":
        aligned, size = [], len(chosen)
        for i, side in enumerate(("chosen", "rejected")):
            labels = inputs[f"{side}_labels"]
            flat, targets, rows = response_tokens(logits[i * size : (i + 1) * size, : labels.shape[1]], labels)
            aligned.append(row_sums(token_logps(flat, targets) - log_collision(flat, 3), rows, size) / counts[i])
        return {"policy_weights": wpo_weights(aligned[0] + aligned[1], clamp=True), "chosen_logps": chosen}
    scalar = chosen.sum() - rejected.sum() + nll
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "nll_loss_chosen": nll,
        "grad_logits_of_sumC_minus_sumR_plus_nll": gradient(scalar, logits),
    }


def flat_cache(rows: list[list[dict[str, Any]]]) -> tuple[Tensor, Tensor]:
    """Return ids [N, K] and values [N, K] of a cached list."""
    entries = [entry for row in rows for entry in row]
    ids = torch.tensor([e["indices"] for e in entries])
    return ids, torch.tensor([e["values"] for e in entries], dtype=torch.float64)


DCKD_QUIRKS = {
    "cache_one_short": "quirk 4: uncached positions count",
    "cache_one_long": "quirk 5: surplus cache rows are dropped",
    "out_of_vocab_indices": "quirk 5: ids outside the vocabulary are clamped",
    "rejected_mode": "quirk 13: rejected mode",
}


def d_dckd(variant: Variant) -> Outputs:
    if variant["name"] in DCKD_QUIRKS:
        raise Skip(DCKD_QUIRKS[variant["name"]])
    inputs = variant["inputs"]
    logits = inputs["student_logits"].requires_grad_()
    labels = torch.cat([inputs["labels"][:, :1], inputs["shifted_labels"]], dim=1)
    flat, _, _ = response_tokens(logits, labels)
    cache = [
        row for row, mask in zip(inputs["cache"], inputs["shifted_labels"], strict=True) if bool((mask != -100).any())
    ]
    ids, probabilities = flat_cache(cache)
    loss = topk_kl(flat, ids, probabilities.log(), "bucket", chunk=4).mean()
    outputs = {"kl_loss": loss}
    if "grad_student_logits" in variant["outputs"]:
        outputs["grad_student_logits"] = gradient(loss, logits)
    return outputs


def d_margin(variant: Variant) -> Outputs:
    inputs, name = variant["inputs"], variant["name"]
    labels = inputs["labels"]
    if name == "margins":
        raise Skip("quirk 2: the fallback takes the wrong teacher's minimum")
    if name == "adpa_reference_clamped":
        raise Skip("quirk 1: advantages are clamped to [1e-8, 1]")
    aligned, _, _ = response_tokens(inputs["dpo_teacher_logits"], labels)
    reference, _, _ = response_tokens(inputs["ref_teacher_logits"], labels)
    if name == "margins_full_vocab_truth":
        ids, logps, _ = topk_logps(aligned, variant["params"]["k"])
        values = logps - gather_logps(reference, ids)
        want_ids, want = flat_cache(variant["outputs"]["margins"])  # in the order of other margins: both by id here
        variant["outputs"]["ids"], order = want_ids.sort()
        variant["outputs"]["values"] = want.gather(1, order)
        ids, order = ids.sort()
        return {"ids": ids, "values": values.gather(1, order)}
    raise Skip("quirk 2: its advantages are those of the fallback")


def adpa_unclamped(variant: Variant) -> Outputs:
    inputs = variant["inputs"]
    student, labels = inputs["student_logits"].requires_grad_(), inputs["labels"]
    flat, _, _ = response_tokens(student, labels)
    margins = variant["all"]["margins"]["outputs"]["margins"]
    ids, values = flat_cache(margins)  # the case's own advantages: their fallback is quirk 2, the loss on them is not
    loss = -expected_advantage(flat, ids, values, chunk=4).mean()
    # The case flattens its own advantages; ours are fed from `margins`, whose positions and ids are the same.
    return {"adpa_loss": loss, "grad_student_logits": gradient(loss, student)}


def full_preference(
    params: dict[str, Any], inputs: dict[str, Any], chosen: Tensor, rejected: Tensor, logits: Tensor
) -> Tensor:
    """Return the preference losses [B] of a D_adpa_full variant: DPO or IPO, averaged or weighted as it says."""
    u, v, size = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"], len(chosen)
    aligned, counts = [], []
    for i, side in enumerate(("chosen", "rejected")):
        labels = inputs[f"{side}_labels"]
        flat, targets, rows = response_tokens(logits[i * size : (i + 1) * size, : labels.shape[1]].detach(), labels)
        counts.append((labels[:, 1:] != -100).sum(1))
        aligned.append(row_sums(token_logps(flat, targets) - log_collision(flat), rows, size) / counts[i])
    if params.get("loss_type") == "ipo":  # the policy's side is averaged over tokens, the case's reference is already
        return ipo_loss(
            chosen / counts[0] - inputs["ref_chosen_logps"],
            rejected / counts[1] - inputs["ref_rejected_logps"],
            params["beta"],
        )
    if params.get("dpo_length_normalization"):
        u, v = chosen / counts[0] - inputs["ref_chosen_logps"], rejected / counts[1] - inputs["ref_rejected_logps"]
    losses = dpo_loss(u, v, params["beta"], margin=params.get("simpo_gamma", 0.0))
    return wpo_weights(aligned[0] + aligned[1], clamp=True) * losses if params.get("use_weighting") else losses


def d_adpa_full(variant: Variant) -> Outputs:
    params, inputs = variant["params"], variant["inputs"]
    known = {
        "beta",
        "k",
        "layout",
        "sft_on_chosen",
        "dpo_weight",
        "distillation_weight",
        "chosen_distil_weight",
        "rejected_distil_weight",
        "use_weighting",
        "dpo_length_normalization",
        "simpo_gamma",
        "loss_type",
    }
    if "adpa_weight" in params:
        raise Skip("quirk 1: advantages are clamped to [1e-8, 1]")
    if "kl_penalty_weight" in params:
        raise Skip("quirk 8: a signed single-sample estimate called KL")
    if set(params) - known:
        raise Skip(f"not a method of ours: {sorted(set(params) - known)[0]}")
    chosen, rejected, nll, logits = forward_pair(inputs)
    loss = params.get("sft_on_chosen", 0.0) * nll
    if "dpo_weight" in params:
        loss = loss + params["dpo_weight"] * full_preference(params, inputs, chosen, rejected, logits).mean()
    size = len(chosen)
    for i, side in enumerate(("chosen", "rejected")):
        weight = params.get("distillation_weight", 0.0) * params.get(f"{side}_distil_weight", 0.0)
        if weight:
            labels = inputs[f"{side}_labels"]
            flat, _, _ = response_tokens(logits[i * size : (i + 1) * size, : labels.shape[1]], labels)
            ids, probabilities = flat_cache(inputs[f"teacher_{side}_cache"])
            loss = loss + weight * topk_kl(flat, ids, probabilities.log(), "bucket").mean()
    outputs = {"loss": loss}
    if "grad_all_logits" in variant["outputs"]:
        outputs["grad_all_logits"] = gradient(loss, logits)
    return outputs


def d_compress(variant: Variant) -> Outputs:
    raise Skip(
        "quirk 20: probabilities are stored, with a remainder that may be negative; ours stores log-probabilities"
    )


def gold_uld(variant: Variant) -> Outputs:
    inputs, params = variant["inputs"], variant["params"]
    student, labels, temperature = inputs["student_logits"].requires_grad_(), inputs["labels"], params["temperature"]
    if params["token_merge_strategy"] == "bayesian":  # the logits that predict the answers
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        columns = columns - 1
    else:  # quirk 32: the logits at the answers
        rows, columns = (labels != -100).nonzero(as_tuple=True)
    teacher = (inputs["teacher_logits"][rows, columns] / temperature).log_softmax(-1)
    scaled = student[rows, columns] / temperature
    if params["hybrid"]:
        assert params["matched_ids"] == "teacher id i <-> student id i for i<10"
        ids, matched = torch.arange(teacher.shape[-1]), 10
        share = matched / teacher.shape[-1]
        weights = params["hybrid_weights"] or (share, 1 - share)
        ids = ids.masked_fill(ids >= matched, -1).expand_as(teacher)
        shared = torch.arange(scaled.shape[-1]) < matched
        tokens = hybrid_distance(scaled, ids, teacher, shared, params["beta"], tuple(weights), chunk=2)
    else:
        tokens = sorted_distance(scaled, teacher, chunk=2)
    size = len(labels)  # the case averages a response, then responses; ours averages spans
    loss = (row_sums(tokens, rows, size) / row_sums(torch.ones_like(tokens), rows, size)).mean()
    outputs = {"loss": loss}
    if "grad_student_logits" in variant["outputs"]:
        outputs["grad_student_logits"] = gradient(loss, student)
    return outputs


def halos_sft(variant: Variant) -> Outputs:
    logits = variant["inputs"]["policy_logits"].requires_grad_()
    flat, targets, _ = response_tokens(logits, variant["inputs"]["labels"])
    loss = -token_logps(flat, targets).mean()
    return {"loss": loss, "grad_policy_logits": gradient(loss, logits)}


def grad_accum(variant: Variant) -> Outputs:
    if variant["name"] != "token_mean_over_global_batch":
        raise Skip("quirk 43: means of means, which we do not compute")
    inputs = variant["inputs"]
    weight = inputs["weight"].requires_grad_()
    counts = sum(int((labels[:, 1:] != -100).sum()) for labels in inputs["labels"])
    loss = torch.zeros((), dtype=torch.float64)
    for hidden, labels in zip(inputs["hidden"], inputs["labels"], strict=True):
        flat, targets, _ = response_tokens(hidden @ weight, labels)
        loss = loss - token_logps(flat, targets).sum() / counts
    grad = gradient(loss, weight)
    return {"loss": loss, "grad_weight": grad, "global_grad_norm": grad.norm()}


def lr_schedules(variant: Variant) -> Outputs:
    names = {
        "hf_linear": "linear",
        "hf_cosine": "cosine",
        "hf_constant": "constant",
        "hf_constant_with_warmup": "constant",
    }
    if variant["name"].startswith("halos"):
        raise Skip("quirk 43: warm-up that starts at a tenth")
    if variant["name"] not in names:
        raise Skip(f"not one of ours: {variant['name']}")
    params = variant["params"]
    total, warmup = params["num_training_steps"], params.get("num_warmup_steps", 0)
    rates = [params["base_lr"] * learning_rate_scale(i, total, warmup, names[variant["name"]]) for i in range(total)]
    return {"lr_used_at_step": rates}


def optimizers(variant: Variant) -> Outputs:
    params = variant["params"]
    classes = {
        "adamw": torch.optim.AdamW,
        "adamw_clip1": torch.optim.AdamW,
        "adam_l2": torch.optim.Adam,
        "rmsprop": torch.optim.RMSprop,
    }
    if variant["name"] not in classes:
        raise Skip(f"not one of ours: {variant['name']}")
    weight = torch.nn.Parameter(variant["inputs"]["initial_params"].clone())
    own = {key: params[key] for key in ("lr", "eps", "weight_decay")}
    own |= {"betas": tuple(params["betas"])} if "betas" in params else {"alpha": params["alpha"]}
    optimizer = classes[variant["name"]]([weight], **own)
    steps = []
    for grad in variant["inputs"]["grads"]:
        weight.grad = grad.clone()
        if params["clip"]:
            torch.nn.utils.clip_grad_norm_([weight], params["clip"])
        optimizer.step()
        steps.append(weight.detach().clone())
    return {"params_after_step": torch.stack(steps)}


ADAPTERS: dict[str, Callable[[Variant], Outputs]] = {
    "A_logps": a_logps,
    "A_adpa_forward": a_adpa_forward,
    "B_adpa_dpo_family": preference.b_adpa_dpo_family,
    "B_trl_dpo_logits": preference.b_trl_dpo,
    "B_cpo_simpo_orpo": preference.b_cpo_simpo_orpo,
    "B_orpo_cpo_full": preference.b_orpo_cpo_full,
    "B_reward_pair": preference.reward_pair,
    "B_trl_kto": preference.trl_kto,
    "C_halos_paired": preference.halos_paired,
    "C_halos_kto": preference.halos_kto,
    "C_radpo_kto": preference.halos_kto,
    "C_radpo": preference.radpo,
    "C_halos_bradley_terry": preference.halos_bradley_terry,
    "C_halos_sft": halos_sft,
    "C_halos_grpo": policy_gradient.halos_grpo,
    "C_halos_ppo": policy_gradient.halos_ppo,
    "D_gold_uld": gold_uld,
    "D_gkd_jsd": policy_gradient.gkd_jsd,
    "D_opd_minillm": policy_gradient.opd,
    "D_compress": d_compress,
    "D_dckd_kl": d_dckd,
    "D_adpa_margin": d_margin,
    "D_adpa_full": d_adpa_full,
    "D_tvkd": preference.d_tvkd,
    "F_grad_accum": grad_accum,
    "F_lr_schedules": lr_schedules,
    "F_optimizers": optimizers,
}


def outputs_of(stem: str, variant: Variant) -> Outputs:
    """Run the adapter of a case file; Skip says why there is none."""
    family = stem.split("_seed")[0]
    if family.startswith("E_"):
        raise Skip("tokenization of a reference (SmolLM2's tokenizer is not in the case)")
    if family == "B_dlla_dpo":
        raise Skip("quirk 50: token means over the prompt, a step without ratio, clip or value function")
    if family not in ADAPTERS:
        raise Skip(f"method not built yet: {family}")
    if family == "D_adpa_margin" and variant["name"] == "adpa_unclamped":
        return adpa_unclamped(variant)
    return ADAPTERS[family](variant)
