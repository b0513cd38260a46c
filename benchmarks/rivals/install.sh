#!/usr/bin/env bash
# Make the rivals' environment, apart from .venv: `benchmarks/rivals/install.sh [FOLDER]` (default: .cache/rivals, which
# git ignores). benchmarks/run.py finds it there, or by RIVALS_PYTHON=FOLDER/bin/python.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
folder="${1:-$root/.cache/rivals}"
uv="$root/.venv/bin/uv"
[[ -x "$uv" ]] || { echo "install.sh: error: no $uv: run ./install.sh first" >&2; exit 1; }
# uv does not read pip's configuration: where pip finds wheels on the disk (the CPU build of torch), uv is to find them.
options=()
index="${PIP_INDEX_URL:-$("$root/.venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}"
[[ -z "$index" ]] || options+=(--index-url "$index")
for place in ${PIP_FIND_LINKS:-$("$root/.venv/bin/python" -m pip config get global.find-links 2>/dev/null || true)}; do
    options+=(--find-links "$place")
done
if ((${#options[@]} == 0)) && ! nvidia-smi -L >/dev/null 2>&1; then options+=(--torch-backend cpu); fi
[[ -x "$folder/bin/python" ]] || "$uv" venv --quiet --python "$("$root/.venv/bin/python" -c 'import sys; print(sys.executable)')" "$folder"
export UV_LINK_MODE="${UV_LINK_MODE:-copy}"
"$uv" pip install --quiet --python "$folder/bin/python" ${options[@]+"${options[@]}"} -r "$here/requirements.txt"
"$folder/bin/python" -c 'import trl; print("rivals: TRL", trl.__version__)'
echo "rivals: $folder/bin/python"
