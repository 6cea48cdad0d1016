"""Sessions: keep a set of ranks apart from all former users of the store (see `admission`)."""

from __future__ import annotations

import atexit
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from rankload._coordination.admission import Rendezvous, RendezvousHost
from rankload._coordination.draining import keep_word
from rankload._coordination.store import RankStore, client_for_requests
from rankload._coordination.store_host import host_neighbour, neighbour
from rankload._coordination.verdict import as_shared_error, tell_failure
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import (
    ArrivalTimeoutError,
    CoordinationError,
    ProgressTimeoutError,
    RankloadError,
    RankLostError,
    StoreLostError,
)

#: Name of a field that marks an error as one that kept a rank from joining.
_WHILE_JOINING = "while_joining"

#: Number of failed calls whose errors are kept for late ranks. No rank is further behind.
_FAILURES_KEPT = 8


@dataclass
class Calls:
    """The calls that this process has made with one set of ranks, since their last session ended.

    Every rank makes every call. So all ranks count the same number, even over calls that some could not join. A rank
    that comes late to a failed call learns of the failure, and does not mistake the others' next call for that call.

    Attributes:
        made: number of calls, including the present one.
        failures: errors of the last failed calls, by call number.
    """

    made: int = 0
    failures: dict[int, RankloadError] = field(default_factory=dict)
    _waits: list[Callable[[float], object]] = field(default_factory=list)

    def restart(self) -> None:
        """Count from zero again: the ranks' session has ended, and a new process may replace one of the ranks."""
        self.made = 0
        self.failures.clear()

    def note_failure(self, error: RankloadError) -> None:
        """Remember why the present call fails."""
        self.failures[self.made] = error
        for number in sorted(self.failures)[:-_FAILURES_KEPT]:
            del self.failures[number]

    def wait_at_exit(self, wait: Callable[[float], object], seconds: float) -> None:
        """Let the exit of this process wait until all ranks have read why the present call fails, up to a limit."""
        atexit.register(wait, seconds)
        self._waits.append(wait)

    def note_success(self) -> None:
        """Wait at exit no longer: all ranks have left the earlier calls, since all have made the present one."""
        for wait in self._waits:
            atexit.unregister(wait)
        self._waits.clear()


@dataclass
class Session:
    """State that the calls of one set of ranks share.

    Attributes:
        store: store of the ranks.
        identity: identity of this rank among them.
        prefix: prefix of every key of this session.
        calls: calls that this rank has made, also before this session.
        rendezvous_host: thread that admits ranks; on rank 0, until all have joined.
        pid: process that joined: a forked child must not use its parent's connection.
        waiting: client of the store for requests that the server may leave unanswered (see `AwaitedKey`). None on rank
            0, which waits for few keys, and in a store without a server.
        remembered: facts that stay true for the session, such as which directories are shared.
        is_over: whether the next call needs another session.
    """

    store: RankStore
    identity: Identity
    prefix: str
    calls: Calls = field(default_factory=Calls)
    rendezvous_host: RendezvousHost | None = None
    pid: int = field(default_factory=os.getpid)
    waiting: RankStore | None = None
    remembered: dict[str, str] = field(default_factory=dict)
    is_over: bool = False
    _joined: dict[int, int] = field(default_factory=dict)

    def call_prefix(self, number: int) -> str:
        """Return the prefix of every key of a call."""
        return f"{self.prefix}/{number}"

    @property
    def id(self) -> str:
        """Return the random id that distinguishes this session from others of the same ranks."""
        return self.prefix.rpartition("/")[2]

    def announce(self) -> None:
        """Publish that this rank has joined, for which call, and which earlier calls failed.

        Raises:
            CoordinationError: another process has joined as the same rank.
        """
        for number, error in self.calls.failures.items():
            tell_failure(self.store, self.call_prefix(number), error)
        mine = f"{self.calls.made} process {os.getpid()} on {self.identity.host}"
        first = self.store.set_first(self._joined_key(self.identity.rank), mine)
        if first != mine:
            mine, first = (text.partition(" ")[2] for text in (mine, first))
            raise CoordinationError(
                f"{mine} and {first} both claim to be rank {self.identity.rank}: two jobs share the store at "
                f"{self.store.place}. Give each job its own MASTER_PORT",
                place=self.store.place,
            )
        self.store.add(f"{self.prefix}/joined")

    def has_everybody(self) -> bool:
        """Return whether every rank has joined."""
        return self.store.add(f"{self.prefix}/joined", 0) >= self.identity.world_size

    def has_begun(self, rank: int) -> bool:
        """Return whether a rank is known to have begun the present call, because it joined for this call."""
        if rank not in self._joined:
            if (text := self.store.peek(self._joined_key(rank))) is None:
                return False
            self._joined[rank] = int(text.partition(" ")[0])
        return self._joined[rank] == self.calls.made

    def process_of(self, rank: int) -> tuple[int, str] | None:
        """Return the process id and host of a rank; None if it has not joined."""
        if (text := self.store.peek(self._joined_key(rank))) is None:
            return None
        _, _, pid, _, host = text.split(" ", 4)
        return int(pid), host

    def raise_joining_failure(self) -> None:
        """Raise the error that kept a rank from joining for the present call, if any. Has an effect only on rank 0."""
        if self.rendezvous_host is not None and (failure := self.rendezvous_host.failure_of(self.calls.made)):
            raise failure

    def has_left_rendezvous(self) -> bool:
        """Close a temporary store for the rendezvous once every rank has joined; return whether none is open.

        Rank 0 calls this before the first call can end on any rank. The next step of a rank may be init_process_group
        at the same address: that address must be free, and not serve a store that closes soon.
        """
        if (
            self.rendezvous_host is not None
            and self.rendezvous_host.is_at_temporary_store
            and self.rendezvous_host.is_over()
        ):
            self.rendezvous_host = None
        return self.rendezvous_host is None or not self.rendezvous_host.is_at_temporary_store

    def is_ended_by(self, failure: RankloadError | None) -> bool:
        """Return whether the ranks must join a new session after this failure, because they may have lost each other.

        All ranks have read the same verdict, except those that lost the store: a rank 0 that was frozen for a while
        does not know of those. A rank that never arrived has lost nothing, unless it lost the store of rank 0. If a
        rank could not join, the other ranks have lost nothing either.
        """
        if failure is not None and _WHILE_JOINING in failure.fields:
            return False
        if isinstance(failure, ArrivalTimeoutError):
            return self.store.dies_with_rank_0
        return isinstance(failure, (RankLostError, ProgressTimeoutError, StoreLostError))

    def close(self) -> None:
        """Stop admitting ranks."""
        if self.rendezvous_host is not None:
            self.rendezvous_host.stop()

    def give_up_absent_ranks(self) -> None:
        """Let this process exit without waiting for ranks that have not joined."""
        if self.rendezvous_host is not None:
            self.rendezvous_host.drain_seconds = 0.0

    def _joined_key(self, rank: int) -> str:
        return f"{self.prefix}/joined/{rank}"


def join(
    store: RankStore,
    identity: Identity,
    group_name: str,
    settings: Settings,
    calls: Calls,
    is_current: Callable[[], bool] = lambda: True,
    former: Session | None = None,
) -> Session:
    """Agree on a session with rank 0. Collective over the ranks of the group, but rank 0 does not wait.

    A store that rank 0 hosts only for the rendezvous is closed later. init_process_group hosts its own store at the
    same address, and a second process group fails on the keys of the first if both share a server.

    Args:
        store: store at which the ranks meet.
        identity: identity of this rank among them.
        group_name: name of the ranks in keys, the same on all of them.
        settings: deadlines.
        calls: calls that this rank has made with these ranks.
        is_current: returns whether new requests may be meant for this session. The group may have a namesake over the
            same store, whose ranks must not get this session.
        former: former session of these ranks, if any.

    Raises:
        ArrivalTimeoutError: rank 0 did not answer within ``settings.arrival_seconds``.
        RankloadError: a rank failed to join; all waiting ranks raise that rank's error.
    """
    rendezvous = Rendezvous(store, root_of(group_name))
    number = rendezvous.request_to_join()
    try:
        if identity.rank == 0:
            if former is not None:
                former.close()
            return _host_session(rendezvous, number, identity, settings, calls, is_current)
        former_id = None if former is None else former.id
        session_id, port = rendezvous.await_admission(number, calls.made, identity, settings, former_id)
        own_store = store if port == "-" else neighbour(store, int(port), settings)
        session = Session(own_store, identity, f"{rendezvous.root}/{session_id}", calls)
        session.waiting = client_for_requests(own_store, settings)
        session.announce()
    except BaseException as error:
        shared = as_shared_error(error, identity)
        shared.fields[_WHILE_JOINING] = True
        tell_joining_failure(store, group_name, shared, calls)
        if identity.rank == 0 and store.is_temporary:  # the other ranks read the failure from this store
            keep_word(rendezvous, identity, settings)
        if error is shared or not isinstance(error, Exception):
            raise
        raise shared from error
    return session


def tell_joining_failure(store: RankStore, group_name: str, error: RankloadError, calls: Calls) -> None:
    """Publish why this rank cannot join, for the ranks that are joining. A lost store is ignored."""
    with suppress(StoreLostError):
        Rendezvous(store, root_of(group_name)).tell_failure(error, calls.made)


def root_of(group_name: str) -> str:
    """Return the prefix of every key of a group."""
    return f"rankload/{group_name}"


def _host_session(
    rendezvous: Rendezvous,
    number: int,
    identity: Identity,
    settings: Settings,
    calls: Calls,
    is_current: Callable[[], bool],
) -> Session:
    store, port = rendezvous.store, "-"
    if store.is_temporary:
        store, hosted_port = host_neighbour(store, settings)
        port = str(hosted_port)
    session_id = secrets.token_hex(8)
    session = Session(store, identity, f"{rendezvous.root}/{session_id}", calls)
    session.announce()
    session.rendezvous_host = RendezvousHost(
        rendezvous, number, f"{session_id} {port}", is_current, session.has_everybody, settings.liveness_seconds
    )
    return session
