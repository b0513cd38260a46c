#!/usr/bin/env bash
# Every node of an allocation that you hold: everything after the script's name goes to launch.py.
#   salloc --nodes=2 --gpus-per-node=4 --ntasks-per-node=4
#   scripts/slurm_interactive.sh OVERRIDES...
# Ctrl-C ends the ranks; the same command goes on from the newest checkpoint. Nothing is requeued.
source "$(dirname "${BASH_SOURCE[0]}")/slurm_common.sh" || exit 2
[[ -n ${SLURM_JOB_ID:-} ]] || fail "no allocation here: salloc --nodes=2 --ntasks-per-node=1 first, or sbatch scripts/slurm_multi_node.sh"
prepare
rank_command "$@"
exec "${COMMAND[@]}" </dev/null
