# shellcheck shell=bash
# What the launchers share. MASTER_ADDR and MASTER_PORT name the first machine; NNODES machines with NPROC processes each
# (one per GPU; without GPUs two). Every variable can be set before.

NNODES="${NNODES:-1}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"
# One thread per process: NPROC processes share the cores of a machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Processes on this machine: one per GPU that it shows, 2 without one.
processes_per_machine() {
    local gpus=0
    if command -v nvidia-smi >/dev/null 2>&1; then
        gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
    fi
    if [ "$gpus" -gt 0 ]; then echo "$gpus"; else echo 2; fi
}

NPROC="${NPROC:-$(processes_per_machine)}"
# shellcheck disable=SC2034  # the files that source this one start it
SCRIPT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/pretrain.py"

# Stop with a message that says what is missing.
need() {
    command -v "$1" >/dev/null 2>&1 || {
        echo "$(basename "$0"): $1 is not on PATH; activate the environment that the package is installed in" >&2
        exit 2
    }
}
