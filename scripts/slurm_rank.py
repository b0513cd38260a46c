"""One process of a Slurm step: turn Slurm's variables into torch's and accelerate's, then become launch.py.

    slurm_rank.py OVERRIDES...          started by srun, once a rank
    slurm_rank.py --free-port JOB_ID    print a port that is free on this node

torchrun and `accelerate launch` put an agent between Slurm and the ranks: it dies of SIGUSR1 and turns the exit code
that requeues into 1. So srun starts the ranks, and accelerate's settings are taken from its YAML by its own code.
"""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST_PORT, NUM_PORTS = 20_000, 10_000  # below the range that Linux hands out by itself (from 32768)
ACCELERATORS = ("/dev/nvidia0", "/dev/kfd")


def free_port(job_id: int) -> int:
    """Return the first free TCP port of this node, searching from one derived from the job's number."""
    for attempt in range(NUM_PORTS):
        port = FIRST_PORT + (job_id * 16 + attempt) % NUM_PORTS
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ValueError(f"no free port from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} on {socket.gethostname()}")


def rank_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """Return what torch.distributed reads of Slurm's variables; nothing for a single process."""
    world = int(slurm.get("SLURM_STEP_NUM_TASKS", slurm.get("SLURM_NTASKS", "1")))
    if world == 1:
        return {}
    local, visible = int(slurm["SLURM_LOCALID"]), slurm.get("CUDA_VISIBLE_DEVICES")
    if visible and local >= len(visible.split(",")):
        raise ValueError(
            f"process {local} of this node sees the GPUs {visible} only. Use --gpus-per-node (not --gpus-per-task), "
            "with --ntasks-per-node as large"
        )
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": slurm.get("SLURM_NTASKS_PER_NODE", "1"),
        "NODE_RANK": slurm["SLURM_NODEID"],
    }


def accelerate_variables(config_file: Path, nodes: int, world: int) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file` would set for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    # A machine rank of 1 keeps accelerate from probing a port: the rendezvous is ours.
    line = ["--config_file", str(config_file), "--num_machines", str(max(nodes, 2)), "--num_processes", str(world)]
    line += ["--machine_rank", "1", "--deepspeed_multinode_launcher", "standard", str(ROOT / "launch.py")]
    args, defaults, precision_from_file = _validate_launch_command(launch_command_parser().parse_args(line))
    if args.use_deepspeed:
        keys = [*defaults.deepspeed_config, *(["mixed_precision"] if precision_from_file else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(keys)  # as accelerate's launch_command does
        env = prepare_deepspeed_cmd_env(args)[1]
    else:
        env = prepare_multi_gpu_env(args)
    return {key: value for key, value in env.items() if os.environ.get(key) != value}


def main() -> None:
    """Set the variables and become launch.py, so that Slurm's signals and the exit code meet nobody in between."""
    if sys.argv[1:2] == ["--free-port"]:
        print(free_port(int(sys.argv[2])))
        return
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    os.environ.update(rank_variables(os.environ))
    if os.environ.get("ACCELERATE_CONFIG"):
        file = Path(os.environ["ACCELERATE_CONFIG"])
        file = file if file.is_file() else ROOT / file
        if not file.is_file():
            raise ValueError(f"ACCELERATE_CONFIG={os.environ['ACCELERATE_CONFIG']} is not there")
        nodes, world = int(os.environ["SLURM_NNODES"]), int(os.environ.get("WORLD_SIZE", "1"))
        os.environ.update(accelerate_variables(file, nodes, world))
    elif not any(Path(device).exists() for device in ACCELERATORS):
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.execv(sys.executable, [sys.executable, "-u", str(ROOT / "launch.py"), *sys.argv[1:]])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
