"""What SLURM's environment variables mean: whether this is a task of a step, its nodes, a place to meet.

The variables are those of srun(1), "Output environment variables". No torch, no call to SLURM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rankload.errors import ArgumentError

#: SLURM numbers the steps that srun starts from 0. Batch scripts, salloc's shells and its own services are steps
#: from SLURM_MAX_NORMAL_STEP_ID up (slurm.h; 0xfffffffa is the interactive step).
_FIRST_PSEUDO_STEP = 0xFFFFFFF0

#: Where a step's store listens. Above the privileged ports, and below the ephemeral range (32768-60999 on Linux),
#: where an outgoing connection might hold the port already; outside too are 29400 and 29500, which torchrun and
#: torch use by default.
STEP_PORTS = range(10_000, 10_000 + 16_381)


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether srun started this process, or an ancestor of it, as a task of this very job.

    SLURM_PROCID alone proves nothing: batch scripts have it too, and the shells of ``salloc``. And sbatch exports
    the variables of the shell it is called in, so a batch script that a task submitted (chained jobs do that) begins
    its life with the SLURM_STEP_* of a job that may have ended. SLURM_GTIDS, the ranks on this node, is fresh even
    there and contradicts them. It cannot where the other step had one task on its first node, as the script itself
    has: such a script must ``unset SLURM_STEP_ID``.
    """
    step_id = environ.get("SLURM_STEP_ID", "")
    if not step_id.isdecimal() or int(step_id) >= _FIRST_PSEUDO_STEP:
        return False
    tasks = tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), environ.get("SLURM_NODEID", ""))
    ranks_here = environ.get("SLURM_GTIDS")
    return tasks is None or ranks_here is None or len(ranks_here.split(",")) == tasks


def slurm_step_endpoint(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return where the ranks of this step can meet: its first host, and a port made from job and step id.

    Every task computes the same; neighbouring jobs, and the steps of one job, get different ports:
    10000 + (31 * job id + step id) mod 16381. None outside a step that srun started. Rank 0 is on the first host
    unless the user chose ``--distribution=arbitrary``.

    Raises:
        ArgumentError: SLURM_STEP_NODELIST cannot be read.
    """
    hosts, job_id = environ.get("SLURM_STEP_NODELIST"), environ.get("SLURM_JOB_ID", "")
    if not hosts or not job_id.isdecimal() or not in_slurm_step(environ):
        return None
    port = STEP_PORTS[(31 * int(job_id) + int(environ["SLURM_STEP_ID"])) % len(STEP_PORTS)]
    return first_host(hosts), port


def first_host(hostlist: str) -> str:
    """Return the first host of a host list: ``node01`` of ``node[01-04,7],login``.

    Raises:
        ArgumentError: it is no host list.
    """
    first = re.match(r"(?:[^][,\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+(?=,|$)", hostlist)
    if first is None:
        raise ArgumentError(f"SLURM_STEP_NODELIST={hostlist!r} is no list of hosts like node[1-4]", value=hostlist)
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])


def tasks_on_node(tasks_per_node: str, node_rank: str) -> int | None:
    """Read one node's number from a list like ``2(x3),1``; None where it says nothing about that node."""
    if not node_rank.isdecimal():
        return None
    nodes = 0
    for run in tasks_per_node.split(","):
        parsed = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run.strip())
        if parsed is None:
            return None
        nodes += int(parsed[2] or 1)
        if int(node_rank) < nodes:
            return int(parsed[1])
    return None
