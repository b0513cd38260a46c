# Sourced by the other scripts of this folder: the cluster's settings, the rendezvous, the ranks, the requeue.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REQUEUE_CODE=85  # engine/preemption.py: checkpointed on a warning, start me again

fail() { echo "error: $*" >&2; exit 2; }

load_cluster() { # sets PYTHON and what cluster.env holds
    local file="${CLUSTER_ENV:-$ROOT/scripts/cluster.env}" name
    # shellcheck source=/dev/null
    if [[ -e $file ]]; then source "$file"; elif [[ -n ${CLUSTER_ENV:-} ]]; then fail "CLUSTER_ENV=$file is not there"; fi
    for name in ${MODULES:-}; do module load "$name" || fail "module load $name (from $file) failed"; done
    PYTHON="${VENV:-$ROOT/.venv}/bin/python"
    [[ -x $PYTHON ]] || fail "no Python at $PYTHON: run ./install.sh, or set VENV in $file"
    export ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-}"
}

check_layout() { # one process a GPU, or the ranks would share or waste them
    local gpus="${SLURM_GPUS_ON_NODE:-0}" tasks="${SLURM_NTASKS_PER_NODE:-1}"
    if ((gpus > 0 && gpus != tasks)); then
        fail "$gpus GPUs but $tasks processes on a node: use --gpus-per-node=$gpus --ntasks-per-node=$gpus"
    fi
}

rendezvous() { # sets MASTER_ADDR, MASTER_PORT: the first node, and a port found free there
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" \
        "$PYTHON" "$ROOT/scripts/slurm_rank.py" --free-port "$SLURM_JOB_ID" </dev/null) || fail "no free port on $MASTER_ADDR"
    export MASTER_ADDR MASTER_PORT
}

prepare() { load_cluster; check_layout; rendezvous; }

# One task is one rank: a signal reaches it, its exit code is seen, and the first failure ends all of them.
rank_command() { # sets COMMAND
    COMMAND=(srun --kill-on-bad-exit=1 --ntasks="${SLURM_NTASKS:-1}")
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then COMMAND+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
    if ((${SLURM_NTASKS:-1} > 1)); then COMMAND+=(--label); fi
    COMMAND+=("$PYTHON" "$ROOT/scripts/slurm_rank.py" "$@")
}

run_batch() { # run_batch OVERRIDES...: prepare, run the ranks, hand on Slurm's warning, requeue or end with their code
    local warned=false code=0 step
    prepare
    # Written by rank 0, which runs on this node: srun may report a rank that it ended itself instead of the code.
    export PREFDISTILL_REQUEUE_NOTE="${TMPDIR:-/tmp}/prefdistill-$SLURM_JOB_ID.requeue"
    rm -f "$PREFDISTILL_REQUEUE_NOTE"
    rank_command "$@"
    "${COMMAND[@]}" </dev/null &
    step=$!
    trap 'warned=true; kill -USR1 "$step" 2>/dev/null' USR1 TERM
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done
    wait "$step" || code=$?
    trap - USR1 TERM
    if ((code == REQUEUE_CODE)) || [[ -e $PREFDISTILL_REQUEUE_NOTE ]] || { $warned && ((code > 128)); }; then
        rm -f "$PREFDISTILL_REQUEUE_NOTE"
        requeue
    fi
    exit "$code"
}

requeue() { # put the job back into the queue; a canceled one stays canceled
    local restarts="${SLURM_RESTART_COUNT:-0}" state
    state=$(scontrol show job -o "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')
    if [[ -n $state && $state != JobState=RUNNING ]]; then return; fi
    if ((restarts >= ${MAX_RESTARTS:-100})); then echo "not requeued: $restarts restarts already (MAX_RESTARTS)" >&2; return; fi
    echo "requeue of job $SLURM_JOB_ID after $restarts restarts; it goes on from its newest checkpoint"
    for _ in 1 2 3; do scontrol requeue "$SLURM_JOB_ID" && return; sleep 5; done  # a busy controller answers late
    echo "error: the job could not be requeued; submit it again, nothing is lost" >&2
}
