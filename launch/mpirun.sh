#!/bin/bash
# Train under mpirun, which starts one rank a GPU: Open MPI's, MPICH's or Intel MPI's.
#
#   RANKS=2 RANKLOAD_URL=https://host/model-0a1b2c3d.pth launch/mpirun.sh --steps 100      # options of launch/train.py
#   RANKS=8 MPIRUN='mpirun --hostfile hosts' MASTER_ADDR=gpu1 RANKLOAD_URL=… launch/mpirun.sh
#
# RANKS               number of ranks, on all machines together
# MPIRUN              mpirun and its options (default: mpirun)
# MASTER_ADDR         name of the machine of rank 0, the first in the hostfile (default: in a SLURM job its first node,
#                     elsewhere this machine)
# MASTER_PORT         a port of it that the others can reach (default: 29500, in a SLURM job from its id)
# RANKLOAD_MODEL_DIR  cache directory (default: torch.hub's)
#
# In a SLURM job it takes the job's nodes:
#
#   sbatch --nodes=4 --ntasks-per-node=2 --gpus-per-node=2 --wrap 'RANKS=$SLURM_NTASKS launch/mpirun.sh --steps 100'
set -euo pipefail

read -ra mpirun <<<"${MPIRUN:-mpirun}"
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  # Jobs that share a node must not share a port. Those from 32768 on belong to outgoing connections.
  MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
fi

# mpirun tells a rank its number, but not where rank 0 is. Each mpirun has another option for variables that the ranks of
# other machines are to get; env serves with all of them.
exec "${mpirun[@]}" -n "${RANKS:?set it to the number of ranks}" \
  env MASTER_ADDR="${MASTER_ADDR:-$(hostname)}" MASTER_PORT="${MASTER_PORT:-29500}" \
  "$(command -v python)" "$(realpath "$(dirname "$0")")/train.py" "${RANKLOAD_URL:?set it to the URL of the weights}" \
  ${RANKLOAD_MODEL_DIR:+--model-dir "$RANKLOAD_MODEL_DIR"} "$@"
