#!/usr/bin/env bash
# Pre-training under torchrun, on one machine or several: run the same line on each of them.
#
#   scripts/launch/torchrun.sh small --training.zero-stage 2
#   NNODES=2 MASTER_ADDR=node-a scripts/launch/torchrun.sh small --training.zero-stage 3
#
# Several machines must see the same run directory (a shared file system). A machine that is lost ends the run; the same
# line goes on from the last checkpoint, on another number of processes with --training.resume-other-world-size.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need torchrun

if [ "$NNODES" -eq 1 ]; then
    exec torchrun --standalone "--nproc_per_node=$NPROC" "$SCRIPT" "$@"
fi
exec torchrun "--nnodes=$NNODES" "--nproc_per_node=$NPROC" --rdzv_backend=c10d \
    "--rdzv_id=${RDZV_ID:-ernie-elastic}" "--rdzv_endpoint=$MASTER_ADDR:$MASTER_PORT" "$SCRIPT" "$@"
