"""Sessions: the same ranks, told apart from whoever used the store before (see `admission`)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from rankload._coordination.admission import Rendezvous, RendezvousHost
from rankload._coordination.draining import keep_word
from rankload._coordination.store import RankStore
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

#: The field of an error that kept a rank from joining.
_WHILE_JOINING = "while_joining"

#: Failed calls that are told to ranks that come late: nobody is so many calls behind.
_FAILURES_KEPT = 8


@dataclass
class Calls:
    """The calls that this process has made with one set of ranks, since their last session ended.

    Every rank makes every call, so all count alike, also over calls in which some could not even join. A rank that
    comes late to a call that has failed is told so, and does not take the others' next call for it.

    Attributes:
        made: their number, with the present one.
        failures: of the last calls that failed, by number, why.
    """

    made: int = 0
    failures: dict[int, RankloadError] = field(default_factory=dict)

    def restart(self) -> None:
        """Count from the beginning: the ranks part, and one of them may be succeeded by another process."""
        self.made = 0
        self.failures.clear()

    def note_failure(self, error: RankloadError) -> None:
        """Remember why the present call fails."""
        self.failures[self.made] = error
        for number in sorted(self.failures)[:-_FAILURES_KEPT]:
            del self.failures[number]


@dataclass
class Session:
    """What the calls of one set of ranks share.

    Attributes:
        store: the ranks' store.
        identity: who this rank is among them.
        prefix: start of every key of this session.
        calls: those that this rank has made, also before this session.
        rendezvous_host: on rank 0, while it admits ranks.
        pid: the process that joined; a forked child must not use its parent's connection.
        remembered: facts that stay true for the session (which directories are shared).
        is_over: the next call needs another session.
    """

    store: RankStore
    identity: Identity
    prefix: str
    calls: Calls = field(default_factory=Calls)
    rendezvous_host: RendezvousHost | None = None
    pid: int = field(default_factory=os.getpid)
    remembered: dict[str, str] = field(default_factory=dict)
    is_over: bool = False
    _joined: dict[int, int] = field(default_factory=dict)

    def call_prefix(self, number: int) -> str:
        """Return the start of every key of a call."""
        return f"{self.prefix}/{number}"

    @property
    def id(self) -> str:
        """Return what tells this session from others of the same ranks."""
        return self.prefix.rpartition("/")[2]

    def announce(self) -> None:
        """Announce that this rank has joined, for which call, and which calls before that have failed.

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
                f"{mine} and {first} both say that they are rank {self.identity.rank}: two jobs share the store at "
                f"{self.store.place}. Give each a MASTER_PORT of its own",
                place=self.store.place,
            )
        self.store.add(f"{self.prefix}/joined")

    def has_everybody(self) -> bool:
        """Return whether every rank has joined."""
        return self.store.add(f"{self.prefix}/joined", 0) >= self.identity.world_size

    def has_begun(self, rank: int) -> bool:
        """Return whether a rank is known to have begun the present call: whether it has joined for that."""
        if rank not in self._joined:
            if (text := self.store.peek(self._joined_key(rank))) is None:
                return False
            self._joined[rank] = int(text.partition(" ")[0])
        return self._joined[rank] == self.calls.made

    def raise_joining_failure(self) -> None:
        """Raise what has kept a rank from joining for the present call; on rank 0."""
        if self.rendezvous_host is not None and (failure := self.rendezvous_host.failure_of(self.calls.made)):
            raise failure

    def has_left_rendezvous(self) -> bool:
        """Leave the meeting point if everybody has joined; tell whether nothing is left to be left.

        Rank 0 calls it before the first call can end anywhere: the next step of any rank may be init_process_group at
        the same address, which must find it free, and find no store that closes soon.
        """
        if (
            self.rendezvous_host is not None
            and self.rendezvous_host.is_at_temporary_store
            and self.rendezvous_host.is_over()
        ):
            self.rendezvous_host = None
        return self.rendezvous_host is None or not self.rendezvous_host.is_at_temporary_store

    def is_ended_by(self, failure: RankloadError | None) -> bool:
        """Return whether the ranks have to meet anew after a call that failed so: they may have lost each other.

        All have read the same verdict, except those that have lost the store: rank 0, frozen for a while, has
        seen nothing of that. A rank that never came has lost nothing, unless rank 0's store was lost to it; nor have
        the others lost anything where a rank could not join.
        """
        if failure is not None and _WHILE_JOINING in failure.fields:
            return False
        if isinstance(failure, ArrivalTimeoutError):
            return self.store.dies_with_rank_0
        return isinstance(failure, (RankLostError, ProgressTimeoutError, StoreLostError))

    def close(self) -> None:
        """Welcome nobody any more."""
        if self.rendezvous_host is not None:
            self.rendezvous_host.stop()

    def give_up_absent_ranks(self) -> None:
        """Let this process end without them."""
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

    A meeting point that rank 0 hosts itself is left again: its address is the one where init_process_group hosts its
    own store, and a second process group fails on the keys of the first if they share a server.

    Args:
        store: where the ranks find each other.
        identity: who this rank is among them.
        group_name: the same on all of them.
        settings: gives the deadline.
        calls: what this rank has made of calls.
        is_current: tells whether new requests may mean this session. The group may have a namesake over
            the same store, whose ranks must not get it.
        former: the session that these ranks had before, if any.

    Raises:
        ArrivalTimeoutError: rank 0 did not answer within ``settings.arrival_seconds``.
        RankloadError: why a rank failed to join; the others that are waiting raise the same.
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
        session.announce()
    except BaseException as error:
        shared = as_shared_error(error, identity)
        shared.fields[_WHILE_JOINING] = True
        tell_joining_failure(store, group_name, shared, calls)
        if identity.rank == 0 and store.is_temporary:  # the others read it there
            keep_word(rendezvous, identity, settings)
        if error is shared or not isinstance(error, Exception):
            raise
        raise shared from error
    return session


def tell_joining_failure(store: RankStore, group_name: str, error: RankloadError, calls: Calls) -> None:
    """Tell the ranks that are meeting why one cannot join them, if the store is still there."""
    with suppress(StoreLostError):
        Rendezvous(store, root_of(group_name)).tell_failure(error, calls.made)


def root_of(group_name: str) -> str:
    """Return the start of every key of a group."""
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
