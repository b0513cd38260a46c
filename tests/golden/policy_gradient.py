"""Golden cases of losses that learn from rewards of responses, and of divergences from a live teacher."""

import torch
from torch import Tensor

from functional import generalized_jsd, token_logps
from tests.golden.common import Outputs, Skip, Variant, gradient, response_tokens
from trainers.distillm2 import skew_kl
from trainers.grpo import group_advantages, grpo_losses, reference_kl
from trainers.opd import distillation_advantages, prefix_weights, scaled_logps
from trainers.policy_gradient import clipped_losses, discounted_sums
from trainers.ppo import gae, value_losses, whitened


def halos_grpo(variant: Variant) -> Outputs:
    inputs, params = variant["inputs"], variant["params"]
    logits = inputs["policy_logits"].requires_grad_()
    flat, targets, rows = response_tokens(logits, inputs["labels"])
    logps = token_logps(flat, targets)
    # quirk 42 is an option: std_epsilon 0.01, and the ratio to the reference is what loss.online=false has
    reference = token_logps(response_tokens(inputs["reference_logits"], inputs["labels"])[0], targets)
    per_response = group_advantages(inputs["scores"], inputs["prompt_group"], "std", 0.01)
    torch.testing.assert_close(per_response, inputs["advantages"])
    advantages, ratios = per_response[rows], logps - reference
    if params["humanline"]:
        ratios = ratios.clamp(params["log_epsilon_P"], params["log_epsilon_R"])
    losses = grpo_losses(logps, ratios, reference, advantages, params["epsilon"], params["beta"])
    loss = losses.mean()
    return {
        "loss": loss,
        "mean_token_kl": reference_kl(logps, reference).mean(),
        "grad_policy_logits": gradient(loss, logits),
        "mean_abs_weighted_advantage": (advantages * ratios.exp()).abs().mean(),
        "mean_abs_advantage": per_response.abs().mean(),
    }


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask > 0].mean()


def halos_ppo(variant: Variant) -> Outputs:
    if variant["name"] == "radpo_fork":
        raise Skip(
            "quirk 42: the critic leaves the current reward out, the clip is [c, 1/c], the drift has the other sign"
        )
    inputs, params = variant["inputs"], variant["params"]
    mask, values, rewards = inputs["masks"], inputs["old_values"], inputs["rewards"]
    advantages = gae(rewards, values, mask, params["gamma"], params["lam"]) * mask
    mean = _masked_mean(advantages, mask)
    normalized = whitened(advantages, float(mean), float(_masked_mean((advantages - mean) ** 2, mask)))
    targets = discounted_sums(rewards * mask, params["gamma"])  # loss.value_target=rewards_to_go
    logits, new_values = inputs["new_logits"].requires_grad_(), inputs["new_values"].requires_grad_()
    flat, tokens, _ = response_tokens(logits, inputs["labels"])
    old = token_logps(response_tokens(inputs["old_logits"], inputs["labels"])[0], tokens)
    drift = token_logps(flat, tokens) - old
    clamped = drift.clamp(params["log_epsilon_P"], params["log_epsilon_R"]) if params["humanline"] else drift
    on = mask > 0
    policy = clipped_losses(clamped, normalized[on], params["cliprange"]).mean()
    critic = value_losses(new_values[on], values[on], targets[on], None).mean()
    loss = policy + params["critic_coef"] * critic + params["KL_coef"] * drift.mean()
    return {
        "normalized_advantages": normalized * mask,
        "returns": (advantages + values) * mask,
        "discounted_future_rewards": targets * mask,
        "loss": loss,
        "grad_policy_logits": gradient(loss, logits),
        "grad_values": gradient(loss, new_values),
    }


def gkd_jsd(variant: Variant) -> Outputs:
    inputs, params, name = variant["inputs"], variant["params"], variant["name"]
    student = inputs["student_logits"].requires_grad_()
    if params.get("reduction") == "mean":
        raise Skip("quirk 30: reduction 'mean' divides by tokens x vocabulary")
    on = inputs["labels"] != -100
    if name == "gjsd_all_masked":
        on = torch.zeros_like(on)
    if name.endswith("no_labels"):
        on = torch.ones_like(on)  # quirk 30 there: divided by rows, not by tokens
    tokens = generalized_jsd(
        student[on], inputs["teacher_logits"][on], params["beta"], params.get("temperature", 1.0), chunk=4
    )
    if params["beta"] in (0.0, 1.0) and params.get("temperature", 1.0) == 1:  # loss=distillm2 at alpha 0
        reverse = params["beta"] == 1.0
        torch.testing.assert_close(skew_kl(student[on], inputs["teacher_logits"][on], 0.0, reverse, 3), tokens)
    number = params.get("num_items_in_batch", len(student) if name.endswith("no_labels") else int(on.sum()))
    loss = (
        tokens.sum() if params.get("reduction") == "sum" else tokens.sum() / max(1, number)
    )  # as in the loop: no token, no loss
    outputs: Outputs = {"loss": loss}
    if "grad_student_logits" in variant["outputs"]:
        outputs["grad_student_logits"] = gradient(loss, student)
    return outputs


def opd(variant: Variant) -> Outputs:
    inputs, params, name = variant["inputs"], variant["params"], variant["name"]
    mask = inputs["mask"].bool()
    own, teacher = (inputs[f"{who}_token_logps"] * mask for who in ("student", "teacher"))
    if name in ("opd_per_token_advantage", "opd_discounted_future_sum"):
        teacher = scaled_logps(teacher, own - 1.0, 1.0)  # loss=gopd at reward_scale 1 is the case, whatever pi_ref
        advantages = distillation_advantages(own, teacher, params["discount"])
        if name == "opd_per_token_advantage":
            return {"advantages": advantages, "mean_reverse_kl_estimate": -advantages[mask].mean()}
        return {"advantages": advantages}
    student = inputs["student_logits"].requires_grad_()
    if name == "opd_policy_gradient_loss":
        logps = token_logps(student[mask], inputs["completion_ids"][mask])
        advantages = distillation_advantages(own, teacher, 0.0)[mask]
        # the case has no ratio: at ratio 1 value and gradient of ours are -A and -A grad log pi, its value is -A log pi
        return {
            "grad_student_logits": gradient(clipped_losses(logps - logps.detach(), advantages, 0.2).mean(), student)
        }
    if name in ("exact_per_token_reverse_kl", "minillm_single_step_loss"):
        divergence = generalized_jsd(student.flatten(0, 1), inputs["teacher_logits"].flatten(0, 1), 1.0).view(
            mask.shape
        )
        if name == "exact_per_token_reverse_kl":
            return {"reverse_kl": divergence}
        loss = divergence[mask].mean()
        return {"loss": loss, "grad_student_logits": gradient(loss, student)}
    if name.startswith("iw_opd"):
        plain = distillation_advantages(own, teacher, 0.0)
        weights = prefix_weights(plain, params["iw_opd_gamma"], params["iw_opd_epsilon"])
        logps = token_logps(student[mask], inputs["completion_ids"][mask])
        outputs: Outputs = {"loss": -(logps * (weights * plain)[mask]).mean()}
        if "grad_student_logits" in variant["outputs"]:  # of ours at ratio 1, see opd_policy_gradient_loss
            ours = clipped_losses(logps - logps.detach(), (weights * plain)[mask], 0.2).mean()
            outputs["grad_student_logits"] = gradient(ours, student)
        return outputs
    if name in ("minillm_advantage_gamma1.0_noln", "minillm_advantage_gamma0.0_ln"):  # where quirk 31 changes nothing
        return {"advantages": distillation_advantages(own, teacher, params["gamma"])}
    if name.startswith("minillm_advantage"):
        raise Skip("quirk 31: gamma to the absolute position, padding unmasked")
    raise Skip(f"not a method of ours: {name.split('_beta')[0]}")
