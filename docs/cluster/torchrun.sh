#!/bin/bash
# Starts the processes of one node. Call it on every node with the same arguments, HEAD the first node's address, and NODE
# the number of this node, from 0:
#   HEAD=node0 NODES=2 NODE=1 DEVICES=8 docs/cluster/torchrun.sh --config run.yaml [--ckpt_path last] [--more options]
# On one machine, leave out HEAD, NODES and NODE. An indexed Job of Kubernetes and SLURM number the nodes themselves.
set -euo pipefail

if [ "${NODES:=1}" -gt 1 ]; then
    : "${NODE:=${JOB_COMPLETION_INDEX:-${SLURM_NODEID:?or NODE: the number of this node, from 0}}}"
fi
# The static rendezvous, which is the default: an agent ends as soon as its own ranks have ended. With c10d it asks the
# first node all the time, and waits for the answer for minutes when the link is cut.
exec torchrun \
    --nnodes "$NODES" \
    --node-rank "${NODE:=0}" \
    --nproc-per-node "${DEVICES:?how many processes a node}" \
    --master-addr "${HEAD:=localhost}" \
    --master-port "${PORT:=29500}" \
    --max-restarts 0 \
    -m lightning_danube fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES"
