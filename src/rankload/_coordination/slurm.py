"""Interpret SLURM's environment variables: whether this process is a task of a step, its nodes, an address to meet at.

The variables are those of srun(1), "Output environment variables". Does not import torch or call SLURM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rankload.errors import ArgumentError

#: SLURM numbers the steps of srun from 0. Batch scripts, salloc's shells and SLURM's own services are steps from
#: SLURM_MAX_NORMAL_STEP_ID up (slurm.h; 0xfffffffa is the interactive step).
_FIRST_PSEUDO_STEP = 0xFFFFFFF0

#: Ports for a step's store. They are above the privileged ports, and below the ephemeral range (32768-60999 on Linux),
#: in which an outgoing connection might hold the port already. 29400 and 29500, which torchrun and torch use by
#: default, are outside, too.
STEP_PORTS = range(10_000, 10_000 + 16_381)


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Return whether srun started this process, or one of its ancestors, as a task of this job.

    SLURM_PROCID alone proves nothing: batch scripts and the shells of ``salloc`` have it, too. sbatch exports the
    variables of the calling shell. So a batch script that a task submitted, as in chained jobs, starts with the
    SLURM_STEP_* variables of a job that may have ended. SLURM_GTIDS, the ranks on this node, is fresh even then, and
    contradicts them. It cannot contradict a step with one task on its first node, because the script has one as well:
    such a script must ``unset SLURM_STEP_ID``.
    """
    step_id = environ.get("SLURM_STEP_ID", "")
    if not step_id.isdecimal() or int(step_id) >= _FIRST_PSEUDO_STEP:
        return False
    tasks = tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), environ.get("SLURM_NODEID", ""))
    ranks_here = environ.get("SLURM_GTIDS")
    return tasks is None or ranks_here is None or len(ranks_here.split(",")) == tasks


def slurm_step_endpoint(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return an address at which the ranks of this step can meet: the first host, and a port from job and step id.

    Every task computes the same address. The port is 10000 + (31 * job id + step id) mod 16381, which differs between
    neighbouring jobs, and between the steps of a job. Rank 0 is on the first host unless the user chose
    ``--distribution=arbitrary``. Returns None outside a step that srun started.

    Raises:
        ArgumentError: SLURM_STEP_NODELIST is not a host list.
    """
    hosts, job_id = environ.get("SLURM_STEP_NODELIST"), environ.get("SLURM_JOB_ID", "")
    if not hosts or not job_id.isdecimal() or not in_slurm_step(environ):
        return None
    port = STEP_PORTS[(31 * int(job_id) + int(environ["SLURM_STEP_ID"])) % len(STEP_PORTS)]
    return first_host(hosts), port


def first_host(hostlist: str) -> str:
    """Return the first host of a host list: ``node01`` of ``node[01-04,7],login``.

    Raises:
        ArgumentError: ``hostlist`` is not a host list.
    """
    first = re.match(r"(?:[^][,\s]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+(?=,|$)", hostlist)
    if first is None:
        raise ArgumentError(f"SLURM_STEP_NODELIST={hostlist!r} is not a host list like node[1-4]", value=hostlist)
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])


def tasks_on_node(tasks_per_node: str, node_rank: str) -> int | None:
    """Return the number of tasks on a node from a list like ``2(x3),1``; None if the list does not cover that node."""
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
