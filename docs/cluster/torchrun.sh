#!/bin/bash
# Starts the processes of one node; call it on every node with the same arguments, and HEAD the first node's address:
#   HEAD=node0 NODES=2 DEVICES=8 docs/cluster/torchrun.sh --config run.yaml [--ckpt_path last] [--more options]
# On one machine, HEAD and NODES can be left out.
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:=1}" \
    --nproc-per-node "${DEVICES:?how many processes a node}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:=localhost}:${PORT:=29500}" \
    --rdzv-id "${RUN_ID:=danube}" \
    --max-restarts 0 \
    -m lightning_danube fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES"
