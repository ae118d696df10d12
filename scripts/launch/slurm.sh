#!/usr/bin/env bash
# Pre-training on several machines of a SLURM cluster: one torchrun per machine.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/launch/slurm.sh small --training.zero-stage 2
#
# A job that is requeued goes on from its last checkpoint; add --training.resume-other-world-size where the number of
# machines may change.
#SBATCH --job-name=ernie-elastic
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --output=%x-%j.out
set -euo pipefail

# SLURM runs a copy of this file from its spool; the submit directory is the checkout.
launch="${ERNIE_ELASTIC_LAUNCH:-${SLURM_SUBMIT_DIR:-.}/scripts/launch}"
if [ ! -f "$launch/torchrun.sh" ]; then
    echo "slurm.sh: $launch/torchrun.sh is missing; submit from the checkout, or set ERNIE_ELASTIC_LAUNCH" >&2
    exit 2
fi
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}"
export MASTER_ADDR
# A port of its own for each job, in case two share a machine.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export NNODES="$SLURM_JOB_NUM_NODES" RDZV_ID="$SLURM_JOB_ID"
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    export NPROC="$SLURM_GPUS_ON_NODE"
fi
# Every part ends when one fails, so that the job is seen to have failed.
exec srun --kill-on-bad-exit=1 "$launch/torchrun.sh" "$@"
