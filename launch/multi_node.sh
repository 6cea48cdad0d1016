#!/bin/bash
# Train on several machines without a scheduler: run the same line on each of them.
#
#   FIRST_NODE=gpu1 NODES=4 RANKLOAD_URL=https://host/model-0a1b2c3d.pth launch/multi_node.sh --steps 100
#
# FIRST_NODE          hostname of one of the machines, spelled as `hostname` spells it there
# NODES               number of machines; nothing starts before all of them have run the line
# RENDEZVOUS_PORT     a port of FIRST_NODE that the others can reach (default: 29400)
# RANKLOAD_MODEL_DIR  cache directory (default: torch.hub's); may differ between machines
# RANKS_PER_NODE      ranks on each machine (default: one a GPU; without a GPU, one a CPU core)
set -euo pipefail

# Only the agent whose own hostname resolves as FIRST_NODE does hosts the rendezvous; under an alias all of them wait for
# another to do it. The id keeps apart two jobs that use one rendezvous.
exec python -m torch.distributed.run --nnodes="${NODES:?}" --nproc-per-node="${RANKS_PER_NODE:-auto}" \
  --rdzv-backend=c10d --rdzv-endpoint="${FIRST_NODE:?}:${RENDEZVOUS_PORT:-29400}" --rdzv-id=rankload \
  "$(dirname "$0")/train.py" "${RANKLOAD_URL:?set it to the URL of the weights}" \
  ${RANKLOAD_MODEL_DIR:+--model-dir "$RANKLOAD_MODEL_DIR"} "$@"
