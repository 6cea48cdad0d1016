"""Find the ranks that take part in a call, and the session that they share."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rankload._coordination.channel import Channel
from rankload._coordination.draining import forget_word, leave_word
from rankload._coordination.environment_store import environment_endpoint, store_from_environment
from rankload._coordination.launchers import identity_from_environment
from rankload._coordination.rank_channel import RankChannel
from rankload._coordination.rendezvous import Calls, Session, join, root_of, tell_joining_failure
from rankload._coordination.signals import TerminationAsException
from rankload._coordination.single_process import SingleProcessChannel
from rankload._coordination.store import RankStore, client_of_group, store_of_group, uses_agent_store
from rankload._coordination.verdict import as_shared_error
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import ArgumentError, ArrivalTimeoutError, CoordinationError, StoreLostError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: torch.testing's backend for one process that simulates a job of many: the other ranks do not exist.
_FAKE_BACKEND = "fake"

#: Name of the ranks in keys if there is no process group.
_ENVIRONMENT = "environment"

#: How long a rank that cannot join tries to publish its error.
_LAST_WORD_SECONDS = 2.0


@dataclass
class _Membership:
    """State of this process for one set of ranks.

    Attributes:
        calls: calls made with these ranks.
        session: present session; None before a join.
        former: session before that, if any.
    """

    calls: Calls = field(default_factory=Calls)
    session: Session | None = None
    former: Session | None = None


_groups: WeakKeyDictionary[ProcessGroup, _Membership] = WeakKeyDictionary()
_environments: dict[tuple[Identity, str], _Membership] = {}


def open_channel(group: ProcessGroup | None, settings: Settings) -> Channel:
    """Open the channel for one call: of the given group, else of the default group, else of the launcher's job.

    Collective over those ranks. Without a store, or with one rank, the channel is that of a single process. The same
    holds in a DataLoader's worker, which has the environment of its rank and, if forked, the process group.

    Raises:
        ArgumentError: this rank is not a member of the group.
        ArrivalTimeoutError: rank 0 did not make the call in time.
    """
    if _is_dataloader_worker():
        return open_single_process_channel()
    group = group if group is not None else _default_group()
    termination = TerminationAsException()
    termination.install()
    try:
        session = _session_of_environment(settings) if group is None else _session_of_group(group, settings)
    finally:
        termination.restore()
    return open_single_process_channel() if session is None else RankChannel(session, settings)


def open_single_process_channel() -> SingleProcessChannel:
    """Open the channel of a process that acts without other ranks. Not collective."""
    return SingleProcessChannel(replace(own_identity(), rank=0, world_size=1, job_size=None))


def own_identity() -> Identity:
    """Return this process's identity in the job: from the default process group, else from the launcher.

    Devices are chosen by this identity. The process group comes first: a launcher that did not start the other ranks
    would make every rank local rank 0.
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
        raise ArgumentError("this rank is not a member of group=: make this call on the group's members only")
    if dist.get_world_size(group) == 1 or dist.get_backend(group) == _FAKE_BACKEND:
        return None
    identity = _identity_in_group(group)
    member = _groups.setdefault(group, _Membership())
    return _next_session(member, identity, lambda: _join_group(group, identity, settings, member))


def _next_session(member: _Membership, identity: Identity, join_anew: Callable[[], Session | None]) -> Session | None:
    """Count one more call; return its session, or None if the ranks cannot meet: without a store, or after a fork."""
    last = member.session or member.former
    if last is not None and last.pid != os.getpid():
        return None
    if member.session is not None and member.session.is_over:
        member.former, member.session = member.session, None
        member.calls.restart()
    member.calls.made += 1
    if member.session is None:
        try:
            member.session = join_anew()
        except BaseException as error:
            member.calls.note_failure(as_shared_error(error, identity))
            raise
    return member.session


def _join_group(group: ProcessGroup, identity: Identity, settings: Settings, member: _Membership) -> Session:
    name, known = _name_of(group), weakref.ref(group)
    try:
        store = store_of_group(group, settings)
    except BaseException as error:
        # there may be no connection or thread of our own: the group's client can still publish the error
        with suppress(Exception):
            own_client = RankStore(client_of_group(group), "the group", False, _LAST_WORD_SECONDS)
            tell_joining_failure(own_client, name, as_shared_error(error, identity), member.calls)
        raise

    def is_current() -> bool:
        return not _has_namesake(name, known())

    return join(store, identity, name, settings, member.calls, is_current, member.former)


def _session_of_environment(settings: Settings) -> Session | None:
    identity = identity_from_environment()
    if identity.world_size == 1:
        return None
    rendezvous = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    member = _environments.setdefault((identity, rendezvous), _Membership())
    return _next_session(member, identity, lambda: _join_by_environment(identity, settings, member))


def _join_by_environment(identity: Identity, settings: Settings, member: _Membership) -> Session | None:
    try:
        return _join_at_endpoint(identity, settings, member)
    except StoreLostError as lost:
        if identity.rank == 0 or uses_agent_store(os.environ) or lost.fields.get("place") != _place(identity):
            raise
        # the lost store was a process group's at the same port, which rank 0 was about to destroy: rank 0 now opens
        # its own there
        hurried = replace(settings, arrival_seconds=min(settings.arrival_seconds, settings.liveness_seconds))
        try:
            return _join_at_endpoint(identity, hurried, member)
        except ArrivalTimeoutError:
            raise lost from None


def _join_at_endpoint(identity: Identity, settings: Settings, member: _Membership) -> Session | None:
    forget_word()
    try:
        store = store_from_environment(identity, settings)
    except CoordinationError as error:
        if identity.rank == 0 and (endpoint := environment_endpoint(identity)):
            leave_word(error, root_of(_ENVIRONMENT), endpoint[1], identity, member.calls.made, settings)
        raise
    if store is None:
        return None
    return join(store, identity, _ENVIRONMENT, settings, member.calls, former=member.former)


def _place(identity: Identity) -> str:
    endpoint = environment_endpoint(identity)
    return "" if endpoint is None else f"{endpoint[0]}:{endpoint[1]}"


def _has_namesake(name: str, group: ProcessGroup | None) -> bool:
    """Return whether another group of that name exists. Further requests to join are meant for that group."""
    from torch.distributed import distributed_c10d

    for other in list(distributed_c10d._world.pg_map):
        with suppress(KeyError, ValueError):  # the other group is being destroyed
            if other is not group and _name_of(other) == name:
                return True
    return False


def _identity_in_group(group: ProcessGroup) -> Identity:
    """Return this process's identity: rank and size from the group, everything else from the launcher."""
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
    """Return the launcher's identity for a process with a group. The group counts more than incomplete variables."""
    try:
        return identity_from_environment()
    except ArgumentError:
        return Identity(0, 1, None, None, None, socket.gethostname(), "group")


def _name_of(group: ProcessGroup) -> str:
    """Return a name for the group: the same on all members, and different for groups of other ranks."""
    import torch.distributed as dist

    members = ",".join(map(str, dist.get_process_group_ranks(group)))
    return f"{group.group_name}-{hashlib.sha256(members.encode()).hexdigest()[:8]}"
