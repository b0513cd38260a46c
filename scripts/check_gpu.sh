#!/usr/bin/env bash
# What only a GPU can show, as a Markdown table for docs/log.md: about 20 minutes on one H200.
#   scripts/check_gpu.sh | tee check_gpu.md
# On a cluster: srun --gpus=1 --time=0:40:00 scripts/check_gpu.sh. CHECK_GPU_MODEL=tiny tries the script itself on a CPU.
source "$(dirname "${BASH_SOURCE[0]}")/slurm_common.sh" || exit 2
load_cluster
cd "$ROOT" || exit 2
exec "$PYTHON" -m benchmarks.check_gpu "$@"
