"""The launch environment: what a launcher sets against the config, CPU builds on GPU machines, variables before torch,
timeouts.
"""

import os
import subprocess
import sys
from datetime import timedelta

import pytest

from engine import environment
from engine.processes import PATIENCE
from tests.support.helpers import ROOT, composed, free_port, launch

MODEL = {"gradient_accumulation_steps": 2, "policy_dtype": "auto", "max_grad_norm": 1.0}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "model.gradient_accumulation_steps=2"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "model.policy_dtype=bfloat16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "float32 or bfloat16"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "model.max_grad_norm=1.0"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "model.compile=true"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true"),
    ],
)
def test_a_launcher_that_contradicts_the_config_is_refused_with_the_key_to_set(variables, words):
    with pytest.raises(ValueError) as caught:
        environment.check_launcher(variables, MODEL)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_MIXED_PRECISION": "no"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
        {"ACCELERATE_DYNAMO_BACKEND": "NO"},
    ],
)
def test_a_launcher_that_agrees_is_accepted(variables):
    environment.check_launcher(variables, MODEL)
    environment.check_launcher({"ACCELERATE_MIXED_PRECISION": "bf16"}, {**MODEL, "policy_dtype": "bfloat16"})


def test_launch_refuses_it_before_a_model_loads(tmp_path):
    done = launch(
        "loss=sft", "model=tiny", f"cache_dir={tmp_path}", env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}
    )
    assert done.returncode == 2 and "model.gradient_accumulation_steps=1" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_cpu_build_on_a_machine_with_a_gpu_is_refused(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: one'\n")
    smi.chmod(0o755)
    there = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    raw = composed("loss=sft", "model=tiny")
    if environment.cuda_of_torch() is not None:
        pytest.skip("this torch is no CPU build")
    with pytest.raises(ValueError, match="install.sh --cuda"):
        environment.check(there, raw)
    with pytest.raises(ValueError, match="install.sh --cuda"):
        environment.check(there, {**raw, "pipeline": {"name": "quickstart"}})
    environment.check({**there, "CUDA_VISIBLE_DEVICES": ""}, raw)  # the CPU is wanted
    environment.check(there, {**raw, "task": "report"})  # runs no model
    environment.check(there, {**raw, "dry_run": True})
    smi.write_text("#!/bin/sh\nexit 9\n")  # a login node: the driver's program without a GPU
    if not environment.has_gpu({"PATH": "/nowhere"}):
        environment.check(there, raw)


WATCH = """
import os, runpy, sys
names = sys.argv[1].split(",")
def watch(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print(*(os.environ.get(name) for name in names), flush=True)
        os._exit(0)
sys.addaudithook(watch)
sys.argv = ["launch.py", "loss=sft", "model=tiny", *sys.argv[2:]]
runpy.run_path("launch.py", run_name="__main__")
"""


@pytest.mark.parametrize("own", [None, "fork"])
def test_what_vllm_needs_is_set_when_torch_is_imported_and_a_users_setting_wins(tmp_path, own):
    chosen = {"VLLM_WORKER_MULTIPROC_METHOD": own} if own else {}
    kept = {key: value for key, value in os.environ.items() if key not in environment.BEFORE_TORCH}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, ",".join(environment.BEFORE_TORCH), f"cache_dir={tmp_path}"],
        cwd=ROOT,
        env={**kept, **chosen},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", own or "spawn"], done.stderr


@pytest.mark.slow
def test_ranks_wait_for_hours():
    program = (
        "import torch; from engine.processes import Processes; processes = Processes();"
        "from torch.distributed import group;"
        "print(group.WORLD._get_backend(processes.device).options._timeout.total_seconds());"
        "torch.distributed.destroy_process_group()"
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **alone}, capture_output=True, text=True
    )
    assert float(done.stdout) == PATIENCE.total_seconds() >= timedelta(hours=2).total_seconds()


def test_one_place_opens_process_groups():
    for path in [*(ROOT / "tasks").glob("*.py"), *(ROOT / "engine").glob("*.py"), *(ROOT / "trainers").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        opened = any(name in text for name in ("PartialState(", "Accelerator(", "init_process_group("))
        assert not opened or path.name == "processes.py", path
