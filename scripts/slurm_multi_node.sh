#!/usr/bin/env bash
# Several nodes: everything after the script's name goes to launch.py.
#   sbatch [sbatch options] scripts/slurm_multi_node.sh OVERRIDES...
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 --time=8:00:00 scripts/slurm_multi_node.sh loss=dpo ...
# --ntasks-per-node is the number of processes on a node: one a GPU, any number on CPU. Before the time limit (USR1) the
# run is checkpointed and the job requeued; the same holds for a preemption that sends SIGTERM first.
#SBATCH --job-name=prefdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

# Slurm runs a copy of this file; scontrol knows where the original lies.
script=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
source "$(dirname "${script:-$SLURM_SUBMIT_DIR/scripts/slurm_multi_node.sh}")/slurm_common.sh" || exit 2
run_batch "$@"
