#!/usr/bin/env bash
# What only a GPU can show, as a Markdown table for docs/log.md: about 20 minutes on one H200.
#   scripts/check_gpu.sh | tee check_gpu.md
#   scripts/check_gpu.sh real-language --pairs train.jsonl --test test.jsonl --gsm8k gsm8k.jsonl   # pipeline=smollm2, whole
# On a cluster: srun --gpus=1 --time=0:40:00 scripts/check_gpu.sh. CHECK_GPU_MODEL=tiny tries the script itself on a CPU.
source "$(dirname "${BASH_SOURCE[0]}")/slurm_common.sh" || exit 2
load_cluster
cd "$ROOT" || exit 2
if [[ ${1:-} == real-language ]]; then exec "$PYTHON" scripts/real_language.py "${@:2}"; fi
exec "$PYTHON" -m benchmarks.check_gpu "$@"
