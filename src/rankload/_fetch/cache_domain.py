"""Domains: ranks that share a cache directory, or that scope= tells to share a download, and each domain's leader.

Rank 0 always leads its own domain. Rank 0 publishes the kernel, device and inode of its directory, and creates a probe
file with a new name there. A rank whose directory has the same kernel, device and inode shares that directory. Another
directory on a disk of its own machine is not shared. On every other node, one rank looks for the probe file: a new name
is in no client's cache of absent names. If the file is not visible there, the ranks of that directory, or node, form
their own domain.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankload._coordination.channel import Channel
from rankload._coordination.polling import backoff
from rankload._platform.host import kernel_id
from rankload._platform.linux import is_on_local_disk
from rankload._types import Identity, Scope

_logger = logging.getLogger("rankload")

#: How long a node looks for rank 0's probe file. Rank 0 writes the file before it publishes the name, so one look is
#: enough on a coherent filesystem. On a lagging one, a wrong "not shared" costs a second download, never a wrong file.
_PROBE_SECONDS = 1.0

_PROBE_PREFIX = ".rankload-probe-"

#: Age after which no node looks for a probe file any more: the ranks of a call arrive within ``arrival_seconds``.
_PROBE_MAX_AGE_SECONDS = 3600.0

#: How long the other ranks of a node let local rank 0 look first.
_LOCAL_RANK_0_SECONDS = 2.0


@dataclass(frozen=True)
class Domain:
    """Ranks that share one fetch.

    Attributes:
        key: name of the domain within the call.
        leader: rank that fetches.
        is_leader: whether this rank is the leader.
        is_node_local: whether rank 0's directory is on a disk of its own machine, so that no other node shares it.
            Known under ``scope="auto"`` only.
    """

    key: str
    leader: int
    is_leader: bool
    is_node_local: bool = False

    @property
    def key_of_rank_0(self) -> str:
        """Name of rank 0's domain."""
        return "rank0" if self.key.startswith("rank") else "0"


def find_domain(channel: Channel, scope: Scope, directory: Path) -> Domain:
    """Return this rank's domain. Collective over the channel's ranks. The directory must exist."""
    identity = channel.identity
    if identity.world_size == 1 or scope == "process":
        return Domain(f"rank{identity.rank}", identity.rank, is_leader=True)
    if scope == "job":
        return Domain("0", 0, is_leader=identity.rank == 0)
    if identity.rank == 0:
        is_probed = scope == "auto" and not identity.is_on_one_node
        probe = _leave_probe_file(channel, directory) if is_probed else None
        is_local = is_probed and is_node_local(directory)
        channel.post("lead", {"place": _place(identity, scope, directory), "probe": probe, "is_node_local": is_local})
        return Domain("0", 0, is_leader=True, is_node_local=is_local)
    lead = channel.wait_for("lead", from_rank=0)
    leader = _leader_of(channel, scope, directory, lead)
    return Domain(str(leader), leader, is_leader=leader == identity.rank, is_node_local=lead["is_node_local"])


def _leader_of(channel: Channel, scope: Scope, directory: Path, lead: dict[str, Any]) -> int:
    place = _place(channel.identity, scope, directory)
    if place == lead["place"]:
        return 0
    fact = f"leader at {place} under {lead['place']}"
    if (known := channel.remember(fact)) is None:
        known = channel.remember(fact, str(_ask_place(channel, place, lead["probe"], directory)))
    assert known is not None
    return int(known)


def _ask_place(channel: Channel, place: str, probe: str | None, directory: Path) -> int:
    """Let one rank of the place look for rank 0's probe file; return the place's leader."""
    rank, identity = channel.identity.rank, channel.identity
    # if only some ranks of the job make the call, the node's local rank 0 need not be among them
    if identity.is_whole_job and not identity.is_on_one_node and identity.local_rank not in (0, None):
        _leave_it_to_local_rank_0(channel, place)
    prober = channel.claim(f"prober/{place}")
    if prober != rank:
        return int(channel.wait_for(f"leader/{place}", from_rank=prober)["leader"])
    is_shared = probe is not None and not is_node_local(directory) and _sees(directory / probe)
    leader = 0 if is_shared else rank
    channel.post(f"leader/{place}", {"leader": leader})
    _logger.debug("rank %d: %s is %s", rank, directory, "rank 0's too" if leader == 0 else "not shared with rank 0")
    return leader


def _leave_it_to_local_rank_0(channel: Channel, place: str) -> None:
    deadline = time.monotonic() + _LOCAL_RANK_0_SECONDS
    for _ in backoff(channel.identity.world_size):
        if channel.has(f"prober/{place}") or time.monotonic() > deadline:
            return


def is_node_local(directory: Path) -> bool:
    """Return whether a directory is on a disk of this machine, which no other machine can write to."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return is_on_local_disk(descriptor)
        finally:
            os.close(descriptor)
    return False


def _sees(path: Path) -> bool:
    deadline = time.monotonic() + _PROBE_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            list(path.parent.iterdir())  # makes an NFS client revalidate the directory
            # O_NONBLOCK: another user may have put a pipe there, and open(2) would wait for its writer
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            return True
        time.sleep(0.05)
    return False


def _leave_probe_file(channel: Channel, directory: Path) -> str | None:
    """Create a probe file with a new name, until the call ends; return the name, or None in a read-only directory."""
    path = directory / f"{_PROBE_PREFIX}{secrets.token_hex(8)}"
    try:
        path.touch(exist_ok=False)
    except OSError:  # a read-only cache serves each node's own hits
        return None
    channel.on_exit(lambda: path.unlink(missing_ok=True))
    _remove_abandoned_probe_files(path)
    return path.name


def _remove_abandoned_probe_files(own: Path) -> None:
    """Remove old probe files of killed ranks. Probe files are empty, so those of one hour do no harm."""
    with suppress(OSError):
        now = own.stat().st_mtime  # by the clock of the file server, like the other files' times
        for path in own.parent.glob(f"{_PROBE_PREFIX}*"):
            if now - path.stat().st_mtime > _PROBE_MAX_AGE_SECONDS:
                path.unlink()


def _place(identity: Identity, scope: Scope, directory: Path) -> str:
    """Return the name of a node or directory. Ranks of the same place share a fetch without a probe."""
    if scope == "node":
        node = identity.host if identity.node_rank is None else f"{identity.host}-{identity.node_rank}"
        return f"node-{node}"
    status = directory.stat()
    return f"{kernel_id()}-{status.st_dev}-{status.st_ino}"
