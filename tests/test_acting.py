"""A key of a loss that nothing would read beside the others is refused, where it was changed."""

import pytest

import launch
from settings.acting import RULES
from settings.help import choices, values_of
from settings.paths import CONFIG
from tests.support.bigram import PATHS
from tests.support.helpers import composed


def settings_of(name: str, *overrides: str) -> None:
    data = ["datasets=[local]", "datasets.local.train=tests/test_acting.py"]
    launch.settings_of(composed(f"loss={name}", "model=tiny", *data, *PATHS.get(name, []), *overrides))


@pytest.mark.parametrize(
    "name, in_vain, beside",
    [
        ("adpa", "loss.kl_weight=0.1", "loss.objective=regularized"),
        ("adpa", "loss.kl_reference=start", "loss.objective=regularized"),
        ("dpo", "loss.alpha=0.3", "loss.divergence=alpha"),
        ("dpo", "loss.log_epsilon_R=0.4", "loss.humanline=true"),
        ("kto", "loss.log_epsilon_P=-0.4", "loss.humanline=true"),
        ("grpo", "loss.scale=none loss.std_epsilon=0.01 loss.verifier=worlds.shop:check", "loss.scale=std"),
        ("tdpo", "loss.variant=1 loss.alpha=0.7", "loss.variant=2"),
        ("cpo", "loss.preference=hinge loss.label_smoothing=0.1", "loss.preference=sigmoid"),
        ("tvkd", "loss.form=released loss.humanline=true", "loss.form=shaped"),
        ("tvkd", "loss.form=released loss.beta=0.3", "loss.form=shaped"),
        ("tvkd", "loss.value_temperature=2.0", "loss.value=lse"),
        ("dckd", "loss.hybrid_beta=0.2 loss.alignment=bytes loss.teacher_tokenizer=none", "loss.span_loss=gold"),
        ("opd", "loss.min_coverage=0.5", "loss.alignment=bytes"),
    ],
)
def test_a_key_that_nobody_would_read_is_refused_with_what_makes_it_act(name, in_vain, beside):
    with pytest.raises(ValueError, match=f"read with {beside}"):
        settings_of(name, *in_vain.split())
    settings_of(name, *in_vain.split(), beside)


def test_values_of_the_yaml_are_taken_as_they_are():
    for name in choices("loss"):
        settings_of(name)
    settings_of("adpa", "loss.kl_weight=1.0", "loss.kl_reference=reference_teacher")  # as pipelines write them out


def test_every_rule_is_about_keys_that_some_loss_has():
    sections = [values_of(CONFIG / "loss" / f"{name}.yaml") for name in choices("loss")]
    for rule in RULES:
        assert any(rule.other in one and set(rule.keys) <= one.keys() for one in sections), rule


def test_weights_stored_in_bfloat16_are_not_said_to_compute_in_float32():
    narrow = ["model.master_dtype=bfloat16"]
    settings_of("dpo", *narrow)
    settings_of("dpo", *narrow, "model.policy_dtype=bfloat16")
    with pytest.raises(ValueError, match=r"model.policy_dtype=float32 with model.master_dtype=bfloat16"):
        settings_of("dpo", *narrow, "model.policy_dtype=float32")
