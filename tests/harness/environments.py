"""The variables by which launchers tell a process who it is, and their removal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

# Set by launchers and schedulers around the tests; a test that wants one sets it itself.
LAUNCHER_NAMES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "NODE_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "OMP_NUM_THREADS",
    }
)
LAUNCHER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "PALS_", "MPI_", "MV2_")

# What would lead a request or a cache away from the test.
STRAY_NAMES = frozenset(
    name
    for lower in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
    for name in (lower, lower.upper())
) | {"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "NETRC", "TRANSFORMERS_CACHE"}
STRAY_PREFIXES = ("RANKLOAD_", "TORCH_", "HF_", "AWS_")


def is_stray(name: str) -> bool:
    """Whether the variable would make a test depend on where it was started."""
    return name in LAUNCHER_NAMES | STRAY_NAMES or name.startswith(LAUNCHER_PREFIXES + STRAY_PREFIXES)


def clean_environment() -> dict[str, str]:
    """This process's environment without launcher variables.

    Whatever else the test itself has set, ``RANKLOAD_*`` too, is what it wants its ranks to see.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER_PREFIXES)
    }


@dataclass(frozen=True)
class Place:
    """Where one rank stands in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nodes: int


def places(world_size: int, nodes: int | Sequence[int]) -> list[Place]:
    """Spreads ranks over nodes, as torchrun numbers them: node by node.

    Args:
        nodes: Their number, for equal ones, or the number of ranks on each.
    """
    if isinstance(nodes, int):
        if world_size % nodes:
            raise ValueError(f"{world_size} ranks do not spread evenly over {nodes} nodes: give the ranks of each")
        nodes = [world_size // nodes] * nodes
    if sum(nodes) != world_size:
        raise ValueError(f"nodes of {list(nodes)} ranks do not make {world_size} ranks")
    spots = [(node, local, size) for node, size in enumerate(nodes) for local in range(size)]
    return [Place(rank, world_size, local, size, node, len(nodes)) for rank, (node, local, size) in enumerate(spots)]


def torch_variables(place: Place, port: int) -> dict[str, str]:
    """What ``init_process_group("env://")`` reads: as set by hand or by a launcher without an agent."""
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def torchrun_variables(place: Place, port: int) -> dict[str, str]:
    """What torchrun (torch 2.13, c10d rendezvous) sets; the store on ``port`` is its agent's."""
    return {
        **torch_variables(place, port),
        "GROUP_RANK": str(place.node_rank),
        "GROUP_WORLD_SIZE": str(place.nodes),
        "ROLE_RANK": str(place.rank),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(place.world_size),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "a-test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
