#!/usr/bin/env bash
# Pre-training under DeepSpeed's launcher. It is started on one machine and reaches the others by ssh.
#
#   scripts/launch/deepspeed.sh small --training.zero-stage 2
#   HOSTFILE=hostfile scripts/launch/deepspeed.sh small --training.zero-stage 3
#
# HOSTFILE has one line per machine: `node-a slots=8`. The package must lie at the same path on each of them.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need deepspeed

# The launcher would add --local_rank to the command line; the processes read LOCAL_RANK instead.
options=(--no_local_rank "--master_port=$MASTER_PORT")
if [ -n "${HOSTFILE:-}" ]; then
    options+=("--hostfile=$HOSTFILE")
else
    options+=("--num_gpus=$NPROC")
fi
exec deepspeed "${options[@]}" "$SCRIPT" "$@"
