"""Read this process's identity from its launcher's environment variables. Does not import torch."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rankload._coordination.slurm import in_slurm_step, tasks_on_node
from rankload._coordination.slurm import slurm_step_endpoint as slurm_step_endpoint
from rankload._types import Identity
from rankload.errors import ArgumentError


@dataclass(frozen=True)
class Launcher:
    """The environment variables by which one launcher identifies a process. The first one set of several names counts.

    Attributes:
        name: value of ``Identity.launcher``.
        rank: variables for the rank. The launcher is present if one of these is set (and `applies` agrees). No other
            variable counts: batch scripts export WORLD_SIZE for tasks that take their rank from SLURM_PROCID.
        world_size: variables for the number of ranks. Empty if the launcher sets none: then it identifies no process,
            and its rank alone is an error.
        local_rank: variables for the index among the ranks on this node.
        local_world_size: variables for the number of ranks on this node.
        node_rank: variables for the index of this node.
        tasks_per_node: variables for the number of ranks on every node in SLURM's notation, without local_world_size.
        applies: returns False if the variables were set for another process, or another launcher's say more.
    """

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()
    node_rank: tuple[str, ...] = ()
    tasks_per_node: tuple[str, ...] = ()
    applies: Callable[[Launcher, Mapping[str, str]], bool] = lambda launcher, environ: True


#: Marks of srun's MPI plugins (mpi/pmix/pmixp_info.c, mpi/pmi2, mpi/cray_shasta): the step's name, ``<job>.<step>``.
#: Other launchers set these variables to other values, or not at all.
_SRUN_MARKS = {
    "PMIX_NAMESPACE": re.compile(r"slurm\.pmix\.\d+\.\d+"),
    "PMI_JOBID": re.compile(r"\d+\.\d+"),
    "PALS_APID": re.compile(r"\d+\.\d+"),
}


def _not_by_srun(launcher: Launcher, environ: Mapping[str, str]) -> bool:
    """Return whether an MPI launcher set the variables, not ``srun --mpi=pmix``, ``pmi2`` or ``cray_shasta``.

    srun's MPI variables are incomplete (Cray's and PMIx's have no size) and leak into chained batch scripts. The SLURM
    variables say more, or show that this process is not in a step.
    """
    if not any(mark.fullmatch(environ.get(name, "")) for name, mark in _SRUN_MARKS.items()):
        return True
    # an mpiexec inside a task of srun inherits the mark, but sets its own ranks
    rank, world_size = _first_set(launcher.rank, environ), _first_set(launcher.world_size, environ)
    return in_slurm_step(environ) and (
        (rank is not None and environ[rank] != environ.get("SLURM_PROCID"))
        or (world_size is not None and environ[world_size] != environ.get("SLURM_STEP_NUM_TASKS"))
    )


#: The launcher closest to the process comes first. torchrun's workers also see the variables of their agent's launcher.
LAUNCHERS = (
    # https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables". torch's env:// trusts RANK and
    # WORLD_SIZE whoever sets them, and so does rankload.
    Launcher(
        "torchrun",
        rank=("RANK",),
        world_size=("WORLD_SIZE",),
        local_rank=("LOCAL_RANK",),
        local_world_size=("LOCAL_WORLD_SIZE",),
        node_rank=("GROUP_RANK",),
    ),
    # https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html. OMPI_COMM_WORLD_NODE_RANK is not a node
    # rank: it counts the processes of all jobs on this node.
    Launcher(
        "ompi",
        rank=("OMPI_COMM_WORLD_RANK",),
        world_size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_world_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    # PMIx_Init(3): namespace and rank come from the environment, everything else from the PMIx server. So under a
    # plain prterun this process is one rank of an unknown number.
    Launcher("pmix", rank=("PMIX_RANK",), world_size=(), applies=_not_by_srun),
    # HPE PALS (mpiexec on Cray EX under PBS), pals.h, "Environment variables available for applications".
    Launcher(
        "pals",
        rank=("PALS_RANKID",),
        world_size=("PMI_SIZE",),
        local_rank=("PALS_LOCAL_RANKID",),
        local_world_size=("PALS_LOCAL_SIZE",),
        node_rank=("PALS_NODEID",),
        applies=_not_by_srun,
    ),
    # MVAPICH2's mpirun_rsh (mpispawn.c); MVAPICH 3 renamed the prefix (mvp_env_params). Before PMI: mpirun_rsh sets
    # PMI_ID and PMI_SIZE, but no PMI_RANK.
    Launcher(
        "mvapich",
        rank=("MV2_COMM_WORLD_RANK", "MVP_COMM_WORLD_RANK"),
        world_size=("MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE"),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_RANK"),
        local_world_size=("MV2_COMM_WORLD_LOCAL_SIZE", "MVP_COMM_WORLD_LOCAL_SIZE"),
    ),
    # MPICH's Hydra and Intel MPI set MPI_LOCAL*, Cray PMI sets PMI_LOCAL_* (pals.h).
    Launcher(
        "pmi",
        rank=("PMI_RANK",),
        world_size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        local_world_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        applies=_not_by_srun,
    ),
    Launcher(
        "slurm",
        rank=("SLURM_PROCID",),
        world_size=("SLURM_STEP_NUM_TASKS",),
        local_rank=("SLURM_LOCALID",),
        node_rank=("SLURM_NODEID",),
        tasks_per_node=("SLURM_STEP_TASKS_PER_NODE",),
        applies=lambda launcher, environ: in_slurm_step(environ),
    ),
)


def identity_from_environment(environ: Mapping[str, str] | None = None, host: str | None = None) -> Identity:
    """Return this process's identity in its job. Without a launcher, the process is a job of its own.

    The first launcher present may not set the local rank, the ranks on the node, or the node rank. These then come from
    later launchers with the same rank and world size: for example, if a script under srun exports ``RANK`` and
    ``WORLD_SIZE``.

    Args:
        environ: environment variables; default: this process's.
        host: host name; default: this machine's.

    Raises:
        ArgumentError: the variables are incomplete, contradict each other, or are not numbers.
    """
    environ = os.environ if environ is None else environ
    host = socket.gethostname() if host is None else host
    present = [
        launcher for launcher in LAUNCHERS if _first_set(launcher.rank, environ) and launcher.applies(launcher, environ)
    ]
    complete = [launcher for launcher in present if launcher.world_size]
    if not complete:
        if present:
            raise _incomplete(present[0], environ)
        return Identity(0, 1, 0, 1, 0, host, "single")
    identity = _read(complete[0], environ, host)
    for other in complete[1:]:
        identity = _fill(identity, other, environ)
    return identity


def _read(launcher: Launcher, environ: Mapping[str, str], host: str) -> Identity:
    rank = _number(launcher, launcher.rank, environ)
    world_size = _number(launcher, launcher.world_size, environ)
    if rank is None or world_size is None:
        raise _incomplete(launcher, environ)
    local_rank = _number(launcher, launcher.local_rank, environ)
    local_world_size = _number(launcher, launcher.local_world_size, environ)
    node_rank = _number(launcher, launcher.node_rank, environ)
    _check_below(launcher, launcher.rank, launcher.world_size, environ)
    _check_below(launcher, launcher.local_rank, launcher.local_world_size, environ)
    if local_world_size is None and (name := _first_set(launcher.tasks_per_node, environ)):
        local_world_size = tasks_on_node(environ[name], str(node_rank))
    identity = Identity(rank, world_size, local_rank, local_world_size, node_rank, host, launcher.name)
    return _fill_from(identity, Identity(0, 1, 0, 1, 0, host, "single"))


def _fill(identity: Identity, launcher: Launcher, environ: Mapping[str, str]) -> Identity:
    try:
        return _fill_from(identity, _read(launcher, environ, identity.host))
    except ArgumentError:
        return identity  # this launcher did not start the rank: its variables need not make sense


def _fill_from(identity: Identity, other: Identity) -> Identity:
    if (other.rank, other.world_size) != (identity.rank, identity.world_size):
        return identity
    unknown = [name for name in ("local_rank", "local_world_size", "node_rank") if getattr(identity, name) is None]
    return replace(identity, **{name: getattr(other, name) for name in unknown})


def _first_set(names: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    return next((name for name in names if environ.get(name)), None)


def _number(launcher: Launcher, names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    name = _first_set(names, environ)
    if name is None:
        return None
    text = environ[name].strip()
    if not (text.isascii() and text.isdecimal()):
        raise _wrong(launcher, name, environ, "is not a non-negative integer")
    return int(text)


def _check_below(
    launcher: Launcher, names: tuple[str, ...], limits: tuple[str, ...], environ: Mapping[str, str]
) -> None:
    name, limit_name = _first_set(names, environ), _first_set(limits, environ)
    if name and limit_name and int(environ[name]) >= int(environ[limit_name]):
        problem = f"is too large for {limit_name}={environ[limit_name]}: ranks count from 0"
        raise _wrong(launcher, name, environ, problem)


def _incomplete(launcher: Launcher, environ: Mapping[str, str]) -> ArgumentError:
    name = _first_set(launcher.rank, environ) or launcher.rank[0]
    size = " or ".join(launcher.world_size)
    missing = f"{size} is not set" if size else "no variable gives their number"
    advice = "WORLD_SIZE" if launcher.name == "torchrun" else "RANK and WORLD_SIZE"
    problem = f"says that this is one rank of several, but {missing}: export {advice} as well, or unset {name}"
    return _wrong(launcher, name, environ, problem)


def _wrong(launcher: Launcher, name: str, environ: Mapping[str, str], problem: str) -> ArgumentError:
    return ArgumentError(
        f"{name}={environ[name]!r} (a variable of {launcher.name}) {problem}",
        variable=name,
        value=environ[name],
        launcher=launcher.name,
    )
