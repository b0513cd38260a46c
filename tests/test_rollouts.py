"""Methods that learn from the policy's own responses: sampling, rewards, resume, layouts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

import launch
import models
from dataloader import Tokens
from engine.export import save_model
from generation.on_policy import RowSampler, sample_rows
from tests.support import rewards
from tests.support.bigram import trainer_of
from tests.support.helpers import composed, rows_of, write_pairs
from tests.test_sharding import SGD, SGD_ATOL, two
from trainers import sampling
from trainers.basic import BasicTrainer
from trainers.batches import Item
from trainers.grpo import group_advantages
from trainers.rollouts import row_seed, sampled_logps, with_response
from trainers.sampling import Said

ONLINE = {
    "ppo": ["loss=ppo", "loss.verifier=tests.support.rewards:share_of_e"],
    "grpo": ["loss=grpo", "loss.n=4", "loss.verifier=tests.support.rewards:share_of_e"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with 12 pairs and a student that has seen them for a moment."""
    folder = tmp_path_factory.mktemp("rollouts")
    write_pairs(folder / "pairs.jsonl", 12)
    launch.run_task(composed(*common(folder), "exp_name=start", "n_steps=10", "lr=3e-3"))
    launch.run_task(
        composed(*common(folder), "exp_name=teacher", "n_steps=60", "lr=3e-3", f"model.load_from={folder}/start/FINAL")
    )
    return folder


def common(folder: Path) -> list[str]:
    return [
        f"cache_dir={folder}",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={folder}/pairs.jsonl",
        "model.max_length=96",
        "model.max_prompt_length=48",
    ]


def online(folder: Path, *overrides: str) -> list[str]:
    start = [
        f"model.load_from={folder}/start/FINAL",
        "loss.max_new_tokens=12",
        "model.batch_size=4",
        "log_every=1",
        "lr=1e-3",
    ]
    return [*common(folder), *start, *overrides]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "FINAL" / "model.safetensors")


# ---- sampling


def test_a_row_takes_the_token_at_its_uniform_number():
    scores = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().repeat(5, 1)
    sampler = RowSampler(torch.tensor([[0.0], [0.199], [0.2], [0.69], [0.9999999]], dtype=torch.float64), 3)
    chosen = sampler(torch.zeros(5, 3, dtype=torch.long), scores).argmax(-1).tolist()
    assert chosen == [0, 0, 2, 2, 3]  # the token without probability is nobody's


def test_samples_follow_the_distribution():
    torch.manual_seed(0)
    scores = torch.randn(1, 7)
    uniforms = torch.rand(20_000, 1, dtype=torch.float64)
    chosen = RowSampler(uniforms, 0)(torch.zeros(20_000, 0, dtype=torch.long), scores.expand(20_000, 7)).argmax(-1)
    counts = torch.bincount(chosen, minlength=7) / 20_000
    torch.testing.assert_close(counts, scores[0].softmax(-1), atol=0.01, rtol=0)  # 3 standard errors


def test_a_response_does_not_depend_on_its_batch(base):
    config = launch.settings_of(composed(*common(base), f"model.load_from={base}/start/FINAL")).model
    model, tokenizer = models.load_model(config, trainable=False), models.load_tokenizer(config)
    prompts = [tokenizer.encode(text) for text in ("a", "some longer prompt", "bee cat", "a")]
    seeds = [row_seed(1, 1, i, 0) for i in range(4)]
    together = sample_rows(model, tokenizer, prompts, seeds, 16, models.stop_ids(tokenizer, model), False)
    alone = [
        sample_rows(model, tokenizer, [p], [s], 16, models.stop_ids(tokenizer, model), False)[0]
        for p, s in zip(prompts, seeds, strict=True)
    ]
    assert together == alone and together[0] != together[3]


def test_a_group_is_compared_with_itself():
    rewards = torch.tensor([1.0, 0.0, 5.0, 5.0, 2.0], dtype=torch.float64)
    groups = ["a", "a", "b", "b", "c"]
    torch.testing.assert_close(
        group_advantages(rewards, groups, "none", 1e-4), torch.tensor([0.5, -0.5, 0, 0, 0], dtype=torch.float64)
    )
    scaled = group_advantages(rewards, groups, "std", 0.1)
    torch.testing.assert_close(scaled, torch.tensor([0.5 / 0.6, -0.5 / 0.6, 0, 0, 0], dtype=torch.float64))


# ---- an engine beside the policy: tests/test_rollouts_vllm.py runs one


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=dpo"], "loss=dpo as it is set learns from the data's responses, and nobody would ask the engine"),
        (["loss=grpo", "loss.online=false"], "loss=grpo as it is set learns from the data's responses"),
        ([*ONLINE["grpo"], "save_every=3"], "save_every=3: .* every 2 steps .* a multiple of 2 works"),
        ([*ONLINE["grpo"], "rollout.backend=hf"], "rollout.refresh_every=2: with rollout.backend=hf the policy itself"),
    ],
)
def test_an_engine_is_refused_where_it_cannot_answer_or_nobody_asks_it(overrides, message, base, monkeypatch):
    monkeypatch.setattr(sampling, "find_spec", lambda name: name)  # as if vLLM were there: it is not started
    asked = ["rollout.backend=vllm", "rollout.refresh_every=2", "exp_name=refused", *overrides]
    with pytest.raises(ValueError, match=message):
        launch.run_task(composed(*common(base), *asked))


def test_a_run_stops_where_the_next_step_hands_weights_over(monkeypatch):
    monkeypatch.setattr(sampling, "find_spec", lambda name: name)
    asked = ["rollout.backend=vllm", "rollout.refresh_every=2", "loss.rollout_epochs=3", *ONLINE["grpo"][1:]]
    trainer = trainer_of("grpo", *asked)
    assert [step for step in range(1, 13) if trainer.may_stop(step)] == [6, 12]


def test_ratios_are_to_those_who_sampled():
    own = torch.tensor([-1.0, -2.0, -3.0])
    fresh, older = Item((Tokens([1, 2, 3], [False, True, True]),)), Item((Tokens([1, 2], [False, True]),))
    assert sampled_logps([fresh, older], own) is own
    older = with_response(older, [1], Said([2], "length", [-0.5]))
    assert sampled_logps([fresh, older], own).tolist() == [-1.0, -2.0, -0.5]
    filler = with_response(fresh._replace(source=-1), [1], Said([2], "stop", [-0.5]))
    assert sampled_logps([fresh, filler, older], own).tolist() == [-1.0, -2.0, -0.5]


# ---- layouts and resume


@pytest.mark.parametrize("name", ONLINE)
def test_micro_batches_change_neither_responses_nor_parameters(name, base):
    for parts in (1, 4):
        run = [*ONLINE[name], f"exp_name={name}_by_{parts}", "n_steps=3", f"model.gradient_accumulation_steps={parts}"]
        run += SGD  # AdamW would blow up the rounding of gradients near zero
        launch.run_task(composed(*online(base, *run)))
    one, four = (weights(base / f"{name}_by_{parts}") for parts in (1, 4))
    for key, value in one.items():
        torch.testing.assert_close(value, four[key], atol=SGD_ATOL, rtol=0)  # measured: 1.2e-7
    rewards = [
        [row["reward/train"] for row in rows_of(base / f"{name}_by_{parts}" / "metrics.jsonl")] for parts in (1, 4)
    ]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)  # float32 labels
    assert len(set(rewards[0])) > 1


@pytest.mark.distributed
def test_two_shards_response_and_learn_as_one_process(base):
    run = [*ONLINE["ppo"], "n_steps=2", *SGD]
    sharded = two(online(base, *run, "exp_name=two"), base)
    launch.run_task(composed(*online(base, *run, "exp_name=one")))
    sharded.output()
    for key, value in weights(base / "one").items():
        torch.testing.assert_close(value, weights(base / "two")[key], atol=SGD_ATOL, rtol=0)


def test_an_interrupted_run_goes_on_to_the_same_bits(base, monkeypatch):
    run = [*ONLINE["ppo"], "n_steps=8", "loss.rollout_batches=2", "loss.rollout_epochs=2", "save_every=4"]
    launch.run_task(composed(*online(base, *run, "exp_name=whole")))
    step = BasicTrainer._step

    def interrupted(self: BasicTrainer, number: int) -> int:
        if number == 7:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(BasicTrainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch.run_task(composed(*online(base, *run, "exp_name=cut")))
    launch.run_task(composed(*online(base, *run, "exp_name=cut")))
    one, two = weights(base / "whole"), weights(base / "cut")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    # 8 steps learn twice from each of 4 batches of 4 prompts
    assert rows_of(base / "whole" / "metrics.jsonl")[-1]["examples"] == 16


# ---- what lands on disk, what is refused


def test_the_value_head_stays_out_of_final(base):
    lora = ["++model.use_peft=true", "++model.peft.lora_r=2"]
    launch.run_task(composed(*online(base, *ONLINE["ppo"], "exp_name=lora", "n_steps=1", *lora)))
    _, report = AutoModelForCausalLM.from_pretrained(base / "lora" / "FINAL", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_offline_methods_learn_from_rewards_in_the_data(base):
    rows = [{"prompt": f"say {i // 3}", "response": "ha" * (1 + i % 3), "reward": float(i % 3)} for i in range(9)]
    (base / "rewarded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    responses = [
        {"prompt": row["prompt"], "teacher_response": row["response"], "reward": row["reward"]} for row in rows
    ]
    (base / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in responses))
    for name, data, more in (
        ("ppo", "rewarded", ["loss.online=false", "loss.rollout_epochs=4"]),
        ("grpo", "rewarded", ["loss.online=false", "++cache_reference_logprobs=true"]),
        (
            "reward-weighted-distill",
            "responses",
            [f"loss.teachers=[{base}/teacher/FINAL,{base}/start/FINAL]", "loss.kl_weight=0.5"],
        ),
    ):
        run = [
            f"loss={name}",
            f"exp_name=offline_{name}",
            f"datasets.local.train={base}/{data}.jsonl",
            "n_steps=24",
            "scheduler=constant",
        ]
        launch.run_task(
            composed(
                *common(base),
                f"model.load_from={base}/start/FINAL",
                "model.batch_size=9",
                "lr=1e-3",
                "log_every=1",
                *run,
                *more,
            )
        )
        logged = rows_of(base / f"offline_{name}" / "metrics.jsonl")
        assert logged[0]["reward/train"] == pytest.approx(1.0)
        assert logged[-1]["loss/train"] < logged[0]["loss/train"]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_lineages_command_line_learns_from_the_labels_of_the_data(name, base):
    """`loss=ppo` alone: chosen responses are worth 1, rejected ones 0; with a verifier the policy answers."""
    test = f"datasets.local.test={base}/pairs.jsonl"
    run = [*common(base), f"model.load_from={base}/start/FINAL", f"loss={name}", "model.batch_size=24", "log_every=1"]
    launch.run_task(composed(*run, f"exp_name={name}_typed", "n_steps=1", test))
    assert rows_of(base / f"{name}_typed" / "metrics.jsonl")[0]["reward/train"] == pytest.approx(0.5)
    assert "; responses: the data's\n" in (base / f"{name}_typed" / "objective.txt").read_text()
    judged = [
        "loss.verifier=tests.support.rewards:share_of_e",
        "loss.max_new_tokens=4",
        f"exp_name={name}_judged",
        "n_steps=1",
    ]
    launch.run_task(composed(*run, *judged))
    objective = (base / f"{name}_judged" / "objective.txt").read_text()
    assert "; responses: the policy's own, rewards by tests.support.rewards:share_of_e\n" in objective


def test_a_reward_model_gives_rollouts_the_scores_that_task_label_gives(base):
    """One of a third party, whose padding is its end of turn: the score is taken at the end of turn all the same."""
    tokenizer = models.load_tokenizer(launch.settings_of(composed(*common(base))).model)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"num_labels": 1, "pad_token_id": tokenizer.eos_token_id}
    with models.seeded(5):
        model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special))
    tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(base / "third_party")
    tokenizer.save_pretrained(base / "third_party")
    texts = ("ant", "beebee", "catcatcat")
    given = base / "given.jsonl"
    given.write_text(
        "".join(json.dumps({"prompt": f"say {text}", "response": text, "reward": 0}) + "\n" for text in texts)
    )
    label = ["task=label", f"label.responses={given}", f"label.reward_model={base}/third_party", "exp_name=labels"]
    launch.run_task(composed(*common(base), *label))
    scores = [row["reward"] for row in rows_of(base / "labels" / "LABEL" / "labeled.jsonl")]
    run = ["loss=ppo", "loss.online=false", f"loss.reward_model={base}/third_party", "exp_name=scored", "n_steps=1"]
    launch.run_task(composed(*online(base, *run, f"datasets.local.train={given}")))
    logged = rows_of(base / "scored" / "metrics.jsonl")[0]["reward/train"]
    assert logged == pytest.approx(sum(scores) / 3, abs=1e-6) and len(set(scores)) == 3


def test_a_verifier_sees_no_token_that_ends_the_turn(base):
    """A model may name a second end of turn that its tokenizer does not know as one."""
    config = launch.settings_of(composed(*common(base), f"model.load_from={base}/start/FINAL")).model
    tokenizer = models.load_tokenizer(config)
    ends = list(range(ord("a"), ord("z") + 1))  # bytes: nearly every response ends at its first letter
    model = models.load_model(config, trainable=True)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *tokenizer.convert_tokens_to_ids(list(map(chr, ends))),
    ]
    save_model(model, tokenizer, base / "many_ends")
    rewards.SEEN.clear()
    run = ["loss=ppo", "loss.verifier=tests.support.rewards:remembered", "exp_name=ends", "n_steps=1"]
    launch.run_task(composed(*online(base, *run, f"model.load_from={base}/many_ends")))
    assert rewards.SEEN and not any(letter in text for text in rewards.SEEN for letter in map(chr, ends))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=ppo", "loss.online=true"], "loss.online=true needs somebody who scores"),
        (["loss=ppo", "loss.online=perhaps"], "loss.online='perhaps' is not known; choose one of auto, true, false"),
        (
            ["loss=grpo", "loss.verifier=tests.support.rewards:share_of_e", "loss.n=1"],
            "a group needs at least 2 responses",
        ),
        (
            [*ONLINE["ppo"], "loss.rollout_batches=3", "save_every=4"],
            "save_every=4: a rollout lasts 3 steps .* a multiple of 3 works",
        ),
        ([*ONLINE["ppo"], "cache_reference_logprobs=true"], "reference log-probabilities cannot be cached"),
        (["loss=ppo", "loss.verifier=tests.support.rewards:nobody"], "tests.support.rewards has no function 'nobody'"),
        (
            ["loss=ppo", "loss.verifier=tests.support.rewards:raises"],
            "loss.verifier=tests.support.rewards:raises failed on the response .*no such order",
        ),
        (["loss=grpo", "loss.online=false"], "compares responses to the same prompt|a row has no reward"),
        (["loss=gkd", "loss.teacher=assets/shop_tokenizer"], "another tokenizer than the policy"),
    ],
)
def test_what_cannot_work_is_refused(base, overrides, message):
    prompts = [] if "loss.online=false" not in overrides else [f"datasets.local.train={base}/one_each.jsonl"]
    rows = [{"prompt": f"say {i}", "response": "ha", "reward": 1.0} for i in range(3)]
    (base / "one_each.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"refused_{abs(hash(tuple(overrides)))}"
    extra = [] if "loss=gkd" in overrides else ["loss.max_new_tokens=4"]
    with pytest.raises(ValueError, match=message):
        launch.run_task(
            composed(
                *common(base), f"model.load_from={base}/start/FINAL", f"exp_name={name}", *extra, *prompts, *overrides
            )
        )


# ---- that they do what they are for


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gkd", "opd", "online-adpa"])
def test_on_policy_distillation_comes_nearer_to_the_teacher(name, base):
    """The exact reverse KL on the student's own responses falls, from prompts alone."""
    (base / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("ant", "bee", "cat", "dog"))
    )
    teacher = [f"loss.teacher={base}/teacher/FINAL", f"datasets.local.train={base}/prompts.jsonl", "scheduler=constant"]
    online_adpa = ["loss=online-adpa", f"loss.reference_teacher={base}/start/FINAL", "loss.advantage_floor=0"]
    settings = {
        "gkd": ["loss=gkd", "loss.on_policy=1", "loss.beta=1"],
        "opd": ["loss=opd", "loss.n=4"],
        "online-adpa": [*online_adpa, "loss.rollout_batches=2"],
    }[name]
    launch.run_task(composed(*online(base, *settings, *teacher, f"exp_name={name}", "n_steps=30")))
    found = []
    for folder in (
        base / "start",
        base / name,
    ):  # judged by the other method's first step: KL to the teacher on own responses
        judged = [
            "loss=gkd",
            "loss.on_policy=1",
            "loss.beta=1",
            "n_steps=1",
            "lr=1e-12",
            f"exp_name={folder.name}_judged_{name}",
        ]
        launch.run_task(composed(*online(base, *judged, *teacher, f"model.load_from={folder}/FINAL")))
        found.append(rows_of(base / f"{folder.name}_judged_{name}" / "metrics.jsonl")[0]["loss/train"])
    assert found[1] < 0.8 * found[0]
