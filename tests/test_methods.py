"""Every loss trains the tiny model: its own objective falls; and the command lines of the lineage run as typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import launch
from tests.support.chain import chain_of
from tests.support.helpers import ROOT, composed, free_port, rows_of, write_pairs

LOSSES = sorted(path.stem for path in (ROOT / "config" / "loss").glob("*.yaml"))
# Where a default is meant for large models or long runs, a value at which 20 steps of a tiny one move.
SETTINGS = {"sppo-hard": ["loss.beta=0.05"], "adpa": ["loss.gamma=0.5"], "gkd": ["loss.on_policy=0"]}
SETTINGS |= {name: ["loss.on_policy=0"] for name in ("aligndistil", "opsd")}
# Those that learn from rewards have another aim than a falling loss: test_rollouts.py shows that they reach it.
REWARDED = {"ppo", "grpo", "opd", "iw-opd", "gopd", "online-adpa", "reward-weighted-distill"}
# Options with another objective, which has to fall, too.
OTHERS = [
    ("adpa", ["loss.objective=regularized", "loss.sft_weight=0"]),
    ("adpa", ["loss.objective=regularized", "loss.kl_reference=start", "loss.target_temperature=0.3"]),
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> dict[str, str]:
    found = chain_of(tmp_path_factory.mktemp("methods"))
    common = [f"cache_dir={found['base']}", "model=tiny", "datasets=[local]", f"datasets.local.train={found['data']}"]
    for who in ("teacher", "start"):
        found[f"tokens_{who}"] = f"{found['base']}/tokens_{who}/CACHE"
        model = f"model.load_from={found['base']}/{who}/FINAL"
        launch.run_task(composed(*common, "task=cache", "cache.quantity=token_logp", f"exp_name=tokens_{who}", model))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [*((name, []) for name in LOSSES if name not in REWARDED), *OTHERS])
def test_twenty_steps_lower_the_objective(name, options, chain):
    folder = f"falls_{name}_{len(options)}"
    paths = {
        "dckd": [f"loss.teacher_cache={chain['base']}/cache/CACHE"],
        "adpa": [f"loss.generations={chain['generations']}", f"loss.advantages={chain['base']}/adv/CACHE"],
        "gkd": [f"loss.teacher={chain['base']}/teacher/FINAL"],
        "distillm2": [f"loss.teacher={chain['base']}/teacher/FINAL"],
        "aligndistil": [
            f"loss.teacher={chain['base']}/teacher/FINAL",
            f"loss.reverse_teacher={chain['base']}/start/FINAL",
        ],
        "dadpo": [f"loss.teacher_cache={chain['tokens_teacher']}"],
        "pad": [f"loss.teacher_cache={chain['tokens_teacher']}"],
        "ctpd": [
            f"loss.teacher_cache={chain['tokens_start']}",
            f"loss.positive_cache={chain['tokens_teacher']}",
            f"loss.negative_cache={chain['tokens_start']}",
        ],
        "tvkd": [f"loss.teacher_cache={chain['base']}/cache/CACHE", "loss.value=lse", "loss.value_temperature=2.0"],
    }
    run = [
        f"cache_dir={chain['base']}",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={chain['data']}",
        chain["start"],
        f"loss={name}",
        f"exp_name={folder}",
        "lr=1e-3",
        "n_steps=20",
        "log_every=5",
        "scheduler=constant",
        "model.batch_size=22",
        *paths.get(name, []),
        *SETTINGS.get(name, []),
        *options,
    ]
    launch.run_task(composed(*run))
    rows = rows_of(Path(chain["base"]) / folder / "metrics.jsonl")
    assert rows[-1]["loss/train"] < rows[0]["loss/train"] - 1e-4  # every step sees all 22 rows
    assert all(torch.isfinite(torch.tensor(row["grad_norm"])) for row in rows)
    objective = (Path(chain["base"]) / folder / "objective.txt").read_text()
    assert objective.startswith(f"loss={name}: L = ") and "{" not in objective


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True])
def test_a_reward_model_is_an_ordinary_folder(tmp_path, peft):
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    lora = ["++model.use_peft=true", "++model.peft.lora_r=4"] if peft else []
    run = [
        "loss=bradley-terry",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"cache_dir={tmp_path}",
        "exp_name=rm",
    ]
    launch.run_task(composed(*run, f"datasets.local.test={data}", "n_steps=8", "lr=3e-3", *lora))
    folder = tmp_path / "rm" / "FINAL"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.config.architectures == ["LlamaForSequenceClassification"]
    right = 0
    for row in rows_of(data):
        texts = [
            tokenizer.apply_chat_template(row[side], tokenize=False).rstrip("\n") for side in ("chosen", "rejected")
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            together = model(**batch).logits[:, 0]
            alone = [model(**tokenizer(t, return_tensors="pt", add_special_tokens=False)).logits[0, 0] for t in texts]
        torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)  # padding is found as padding
        right += int(together[0] > together[1])
    logged = rows_of(tmp_path / "rm" / "metrics.jsonl")[-1]["rewards_eval/accuracies"]
    assert right / 12 == pytest.approx(logged)  # an ordinary user's scores are the trainer's
    assert logged > 0.6
    # A reward model goes on from a reward model: its head is read, not drawn anew.
    launch.run_task(
        composed(
            *run[:-1],
            "exp_name=more",
            f"++model.load_from={folder}",
            "n_steps=1",
            "lr=1e-9",
            "do_first_eval=true",
            f"datasets.local.test={data}",
        )
    )
    assert rows_of(tmp_path / "more" / "metrics.jsonl")[0]["rewards_eval/accuracies"] == pytest.approx(logged)


@pytest.mark.slow
def test_a_synced_reference_follows_and_resumes(tmp_path):
    """With sync_reference=1 every step starts at ln 2; after a kill the reference is that of the checkpoint."""
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    run = [
        "loss=dpo",
        "model=tiny",
        "datasets=[local]",
        f"datasets.local.train={data}",
        f"cache_dir={tmp_path}",
        "lr=1e-3",
        "n_steps=6",
    ]
    run += ["log_every=1", "model.batch_size=8", "scheduler=constant", "warmup=0"]
    launch.run_task(composed(*run, "exp_name=synced", "sync_reference=1"))
    launch.run_task(composed(*run, "exp_name=still"))
    losses = {
        name: [row["loss/train"] for row in rows_of(tmp_path / name / "metrics.jsonl")] for name in ("synced", "still")
    }
    assert losses["synced"] == pytest.approx([0.693147] * 6, abs=1e-5) and losses["still"][-1] < 0.69
    launch.run_task(composed(*run, "exp_name=slow", "sync_reference=2", "sync_reference_rate=0.5"))
    interrupted = composed(*run, "exp_name=again", "sync_reference=2", "sync_reference_rate=0.5", "save_every=3")
    with pytest.MonkeyPatch.context() as patch:
        from trainers.basic import BasicTrainer

        step = BasicTrainer._step
        patch.setattr(
            BasicTrainer, "_step", lambda self, n: (_ for _ in ()).throw(KeyboardInterrupt) if n == 5 else step(self, n)
        )
        with pytest.raises(KeyboardInterrupt):
            launch.run_task(interrupted)
    launch.run_task(interrupted)
    one, two = ([row["loss/train"] for row in rows_of(tmp_path / name / "metrics.jsonl")] for name in ("slow", "again"))
    assert one == two


@pytest.mark.distributed
def test_the_command_lines_of_the_lineage_run_as_typed(tmp_path, chain):
    """HALOs', Ra-DPO's and Archangel's spellings: hh texts, run_count, load_from, ++keys, a port; on two CPU
    processes.
    """
    texts = [
        {"chosen": f"\n\nHuman: say {i}\n\nAssistant: yes {i}", "rejected": f"\n\nHuman: say {i}\n\nAssistant: no"}
        for i in range(8)
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    final = chain["start"].split("=")[1]
    two = [
        "accelerate",
        "launch",
        "--config_file",
        "accelerate_config/cpu_2.yaml",
        "--main_process_port",
        free_port(),
        "launch.py",
    ]
    data = ["datasets=[hh]", f"datasets.hh.train={tmp_path}/hh.jsonl", "datasets.hh.test=null"]
    small = [
        f"++cache_dir={tmp_path}",
        "++model.batch_size=4",
        "++model.max_length=128",
        "++model.max_prompt_length=64",
        "++model.policy_dtype=float32",
    ]
    start = [f"++model.name_or_path={final}", f"++model.load_from={final}"]
    commands = [
        [*two, "loss=dpo", "model=pythia", *data, "exp_name=HH_py14_sft_dpo", "run_count=run1", *start, *small],
        [
            *two,
            "loss=ra-dpo",
            "model=pythia",
            *data,
            "exp_name=ra",
            "run_count=run1",
            *start,
            "++loss.confidence_level=0.99",
            *small,
        ],
        [
            "launch.py",
            "loss=kto",
            "model=llama",
            "datasets=[ultrabin]",
            f"datasets.ultrabin.train={chain['data']}",
            "datasets.ultrabin.test=null",
            "exp_name=kto",
            "++lr=5e-6",
            "++loss.beta=0.1",
            "++model.use_peft=true",
            "++model.peft.lora_r=128",
            "++cache_reference_logprobs=true",
            "++save_every=2",
            "++intermediate_checkpoints=true",
            f"++model.name_or_path={final}",
            *small,
        ],
    ]
    bin_folder = Path(sys.executable).parent
    for command in commands:
        program = (
            [sys.executable, *command] if command[0] == "launch.py" else [str(bin_folder / command[0]), *command[1:]]
        )
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{bin_folder}:{os.environ['PATH']}"}
        run = subprocess.run(program, capture_output=True, text=True, timeout=240, cwd=ROOT, env=env)
        assert run.returncode == 0, run.stderr[-3000:]
        assert command[0] == "launch.py" or "strategy=ddp, 2 process(es)" in run.stdout
    for folder in ("HH_py14_sft_dpo/run1", "ra/run1", "kto"):
        assert (tmp_path / folder / "FINAL" / "model.safetensors").is_file()
    assert (tmp_path / "kto" / "step-2" / "model.safetensors").is_file()
