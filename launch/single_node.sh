#!/bin/bash
# Train on one machine, one rank a GPU.
#
#   RANKLOAD_URL=https://host/model-0a1b2c3d.pth launch/single_node.sh --steps 100    # options of launch/train.py
#
# RANKLOAD_MODEL_DIR  cache directory (default: torch.hub's)
# RANKS_PER_NODE      number of ranks (default: one a GPU; without a GPU, one a CPU core)
set -euo pipefail

# --standalone: torchrun picks a free port, so several such jobs may run on one machine.
exec python -m torch.distributed.run --standalone --nproc-per-node="${RANKS_PER_NODE:-auto}" \
  "$(dirname "$0")/train.py" "${RANKLOAD_URL:?set it to the URL of the weights}" \
  ${RANKLOAD_MODEL_DIR:+--model-dir "$RANKLOAD_MODEL_DIR"} "$@"
