"""What an audit's figures say in words: which stated bars are missed, and what that looks like."""

import re
from collections.abc import Mapping
from typing import Any

from settings.teacher_sections import AuditConfig

# Nats by which log-probabilities of a numeric path were seen to be off float32's (docs/cache_format.md), rounded up.
PATH_ERRORS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.7}
MASS_MISSED = 1e-3  # probability by which near ties at rank K may lower the mass kept
TEMPERATURE = (0.02, 0.999)  # entries are called those of another temperature where a line fits this well
WHAT = {
    "teacher_digest": "teacher",
    "reference_digest": "reference teacher",
    "tokenizer_digest": "tokenizer",
    "template_digest": "chat template",
}


def path_error(precisions: list[str]) -> float:
    """Return how far entries of these numeric paths may be from each other; one that is not known counts as the
    coarsest.
    """
    named = [re.findall(r"(float32|bfloat16|float16)", text) or ["bfloat16"] for text in precisions]
    return max(PATH_ERRORS[name] for names in named for name in names)


def missed_bars(audit: Mapping[str, Any], config: AuditConfig) -> list[str]:
    """Return a sentence for each bar that an audit's figures miss; none: the cache keeps what it states."""
    return [*_identity(audit), *_entries(audit, config), *_learning(audit, config), *_drift(audit)]


def _identity(audit: Mapping[str, Any]) -> list[str]:
    return [
        f"another {WHAT[key]}: the cache was made with {key}={pair['cache']}, this run asked {pair['asked']}"
        for key, pair in audit["identity"].items()
        if pair["cache"] != pair["asked"]
    ]


def _entries(audit: Mapping[str, Any], config: AuditConfig) -> list[str]:
    figures, found = audit["figures"], []
    error, allowed = figures["error"], audit["allowed_error"]
    if error["beyond_stated"] > allowed:
        found.append(
            f"stored against exact: an entry is {error['max']:.4g} nats off, {error['beyond_stated']:.4g} beyond what "
            f"the codec states, and the numeric paths explain {allowed:.4g}"
        )
    temperature, fit = figures["temperature"], figures["fit"]
    far, straight = TEMPERATURE
    stated = audit["cache"]["temperature"]
    if temperature is not None and fit > straight and abs(temperature / stated - 1) > far:
        found.append(
            f"another temperature: the entries look like temperature {temperature:.3f}, the cache states {stated:g}"
        )
    if figures["mass_missed"] > MASS_MISSED:
        found.append(
            f"not the top entries: so many ids of this teacher could hold {figures['mass_missed']:.4f} more of its mass"
        )
    if error["tail"] > max(allowed, 2e-3):
        found.append(f"the stored tail is off the mass outside the entries by up to {error['tail']:.4f}")
    if figures["mass"]["mean"] < config.min_mass:
        found.append(
            f"mass kept: {figures['mass']['mean']:.4f} on average, audit.min_mass={config.min_mass:g}: more entries "
            "(cache.top_k) would keep more"
        )
    return found


def _learning(audit: Mapping[str, Any], config: AuditConfig) -> list[str]:
    figures, found = audit["figures"], []
    kl = figures.get("kl")
    if kl and abs(kl["gap"]) > config.max_kl_gap:
        found.append(
            f"KL: truncated {kl['truncated']:.4f}, exact {kl['exact']:.4f} nats, a gap beyond "
            f"audit.max_kl_gap={config.max_kl_gap:g}"
        )
    gradient = figures.get("dckd_gradient")
    if gradient and gradient["cosine"] is not None and gradient["cosine"] < config.min_cosine:
        found.append(
            f"the gradient of DCKD from the entries has cosine {gradient['cosine']:.5f} with the exact one, "
            f"audit.min_cosine={config.min_cosine:g}"
        )
    stored = (figures.get("advantages") or {}).get("stored")
    if stored and stored["wrong_sign_mass"] > config.max_sign_errors:
        found.append(
            f"advantages: entries with {stored['wrong_sign_mass']:.2%} of the teacher's probability have the wrong "
            f"sign, audit.max_sign_errors={config.max_sign_errors:g}"
        )
    return found


def _drift(audit: Mapping[str, Any]) -> list[str]:
    found, coverage = [], audit["drift"].get("coverage")
    if coverage and coverage["held"] < coverage["rows"]:
        found.append(
            f"drift: of {coverage['rows']} sequences that this run's data, tokenizer and template make, the cache "
            f"holds {coverage['held']}"
        )
    return found


def verdict_line(missed: list[str]) -> str:
    """Say the verdict in a line."""
    if not missed:
        return "verdict: every bar is met"
    return f"verdict: {len(missed)} bar{'s' * (len(missed) > 1)} missed: " + "; ".join(missed)
