"""Which ranks take part in a call, and the session that they share."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rankload._errors import ArgumentError, StoreLostError
from rankload._job.channel import RankChannel
from rankload._job.environment import identity_from_environment
from rankload._job.lone import LoneChannel
from rankload._job.session import Session, join
from rankload._job.store import store_from_environment, store_of_group
from rankload._settings import Settings
from rankload._types import Identity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_sessions_of_groups: WeakKeyDictionary[ProcessGroup, Session] = WeakKeyDictionary()
_sessions_of_environments: dict[tuple[Identity, str], Session] = {}


def open_channel(group: ProcessGroup | None, settings: Settings) -> LoneChannel | RankChannel:
    """Open the channel for one call: of the given group, else of the default group, else of the launcher's job.

    Collective over those ranks. Without a store to meet at, or with a single rank, the channel is a lone one; so it is
    in a DataLoader's worker, which has its rank's environment and, if forked, its process group.

    Raises:
        ArgumentError: this rank is no member of the group.
        ArrivalTimeoutError: rank 0 does not make the call.
    """
    if _is_dataloader_worker():
        return open_lone_channel()
    group = group if group is not None else _default_group()
    session = _session_of_environment(settings) if group is None else _session_of_group(group, settings)
    return open_lone_channel() if session is None else RankChannel(session, settings)


def open_lone_channel() -> LoneChannel:
    """Open the channel of a process that acts without the others. Not collective."""
    return LoneChannel(replace(own_identity(), rank=0, world_size=1, job_size=None))


def own_identity() -> Identity:
    """Find out who this process is in the job, which the default process group knows best.

    Devices are chosen by it: to a launcher that has not started the others, every rank is local rank 0.
    """
    world = _default_group()
    if world is None:
        return identity_from_environment()
    return _launched_identity() if world.size() == 1 else _identity_in_group(world)


def _is_dataloader_worker() -> bool:
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


def _default_group() -> ProcessGroup | None:
    # a process that has not imported torch.distributed has no process group; do not import it to find out
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    group: ProcessGroup = distributed.group.WORLD
    return group


def _session_of_group(group: ProcessGroup, settings: Settings) -> Session | None:
    import torch.distributed as dist

    if dist.get_rank(group) < 0:
        raise ArgumentError("this rank is no member of group=: call it on the group's members only")
    if dist.get_world_size(group) == 1:
        return None
    session = _sessions_of_groups.get(group)
    if session is None or session.is_over:
        store, known = store_of_group(group, settings), weakref.ref(group)
        identity, name = _identity_in_group(group), _name_of(group)
        session = join(store, identity, name, settings, lambda: _exists(known()), session)
        _sessions_of_groups[group] = session
    return session if session.pid == os.getpid() else None


def _session_of_environment(settings: Settings) -> Session | None:
    identity = identity_from_environment()
    if identity.world_size == 1:
        return None
    meeting_point = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    session = _sessions_of_environments.get((identity, meeting_point))
    if session is None or session.is_over:
        session = _join_by_environment(identity, settings, session)
        if session is None:
            return None
        _sessions_of_environments[identity, meeting_point] = session
    return session if session.pid == os.getpid() else None


def _join_by_environment(identity: Identity, settings: Settings, former: Session | None) -> Session | None:
    for is_last in (False, True):
        store = store_from_environment(identity, settings)
        if store is None:
            return None
        try:
            return join(store, identity, "environment", settings, former=former)
        except StoreLostError:
            if is_last or identity.rank == 0 or not store.dies_with_rank_0:
                raise
            # a process group's store at the same port, which rank 0 was about to destroy: now it opens its own
            settings = replace(settings, arrival_seconds=min(settings.arrival_seconds, settings.liveness_seconds))
    raise AssertionError("the last attempt returns or raises")


def _exists(group: ProcessGroup | None) -> bool:
    from torch.distributed import distributed_c10d

    return group is not None and group in distributed_c10d._world.pg_map


def _identity_in_group(group: ProcessGroup) -> Identity:
    """Take rank and size from the group, and what the group does not know from the launcher."""
    import torch.distributed as dist

    launched = _launched_identity()
    is_same_job = launched.world_size == dist.get_world_size()
    known = launched if is_same_job else replace(launched, local_rank=None, local_world_size=None, node_rank=None)
    return replace(
        known,
        rank=dist.get_rank(group),
        world_size=dist.get_world_size(group),
        job_size=dist.get_world_size(),
        launcher="group",
    )


def _launched_identity() -> Identity:
    """Return what the launcher tells, for a process that has a group: it counts more than variables that say half."""
    try:
        return identity_from_environment()
    except ArgumentError:
        return Identity(0, 1, None, None, None, socket.gethostname(), "group")


def _name_of(group: ProcessGroup) -> str:
    """Name the group alike on all its members, and unlike any group of other ranks."""
    import torch.distributed as dist

    members = ",".join(map(str, dist.get_process_group_ranks(group)))
    return f"{group.group_name}-{hashlib.sha256(members.encode()).hexdigest()[:8]}"
