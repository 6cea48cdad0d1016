"""Sessions: the same ranks, told apart from whoever used the store before.

Restart counters cannot be trusted: TORCHELASTIC_RESTART_COUNT differs between nodes after a restart, torchrun keeps a
store's keys across restarts, SLURM keeps the job id across a requeue. So every rank says hello by adding to a counter
that only grows, and rank 0 welcomes all whom it has counted, with the session's random id: a welcome that counts a
rank's own hello was given after it. What was there before is never believed.
"""

from __future__ import annotations

import atexit
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from rankload._errors import ArrivalTimeoutError, ProgressTimeoutError, RankloadError, RankLostError, StoreLostError
from rankload._job.polling import backoff, until_rank_0_comes
from rankload._job.store import RankStore, host_neighbour, neighbour
from rankload._settings import Settings
from rankload._types import Identity


@dataclass
class Session:
    """What the calls of one set of ranks share.

    Attributes:
        store: the ranks' store.
        identity: who this rank is among them.
        prefix: start of every key of this session.
        greeter: on rank 0, while it answers hellos.
        pid: the process that joined; a forked child must not use its parent's connection.
        calls: number of calls made; equal on all ranks, since every rank makes every call.
        remembered: facts that stay true for the session (which directories are shared).
        is_over: the next call needs another session.
    """

    store: RankStore
    identity: Identity
    prefix: str
    greeter: Greeter | None = None
    pid: int = field(default_factory=os.getpid)
    calls: int = 0
    remembered: dict[str, str] = field(default_factory=dict)
    is_over: bool = False

    def next_call_prefix(self) -> str:
        """Return the key prefix of this rank's next call."""
        self.calls += 1
        return f"{self.prefix}/{self.calls}"

    def has_left_meeting_point(self) -> bool:
        """Leave the meeting point if everybody has joined; tell whether nothing is left to be left.

        Rank 0 calls it before the first call can end anywhere: the next step of any rank may be init_process_group at
        the same address, which must find it free, and find no store that closes soon.
        """
        if self.greeter is not None and self.greeter.is_at_temporary_place and self.greeter.is_over():
            self.greeter = None
        return self.greeter is None or not self.greeter.is_at_temporary_place

    def is_ended_by(self, failure: RankloadError | None) -> bool:
        """Tell whether after a call that failed so the ranks have to meet anew: they may have lost each other.

        They all have read the same verdict, but for those to whom the store was lost: rank 0, frozen for a while, has
        seen nothing of that. Who never came has lost nothing, unless to it rank 0's store was.
        """
        if isinstance(failure, ArrivalTimeoutError):
            return self.store.dies_with_rank_0
        return isinstance(failure, (RankLostError, ProgressTimeoutError, StoreLostError))

    def close(self) -> None:
        """Welcome nobody any more."""
        if self.greeter is not None:
            self.greeter.stop()

    def give_up_absent_ranks(self) -> None:
        """Let this process end without them."""
        if self.greeter is not None:
            self.greeter.see_off_seconds = 0.0


def join(
    meeting_point: RankStore,
    identity: Identity,
    group_name: str,
    settings: Settings,
    is_current: Callable[[], bool] = lambda: True,
    former: Session | None = None,
) -> Session:
    """Agree on a session id with rank 0. Collective over the ranks of the group, but rank 0 does not wait.

    A meeting point that rank 0 hosts itself is left again: its address is the one where init_process_group hosts its
    own store, and a second process group fails on the keys of the first if they share a server.

    Args:
        meeting_point: the store where the ranks find each other.
        identity: who this rank is among them.
        group_name: the same on all of them.
        settings: gives the deadline.
        is_current: tells whether the group still exists. A group that was destroyed may have a namesake over the
            same store, whose ranks must not get its session.

    Raises:
        ArrivalTimeoutError: rank 0 did not answer within ``settings.arrival_seconds``.
    """
    root = f"rankload/{group_name}"
    if identity.rank == 0:
        if former is not None:
            former.close()
        return _host_session(meeting_point, identity, root, settings, is_current)
    session_id, port = _say_hello(meeting_point, root, identity, settings, former)
    store = meeting_point if port == "-" else neighbour(meeting_point, int(port), settings)
    store.add(f"{root}/{session_id}/joined")
    return Session(store, identity, _prefix(root, session_id))


def _prefix(root: str, session_id: str) -> str:
    return f"{root}/{session_id}"


def _host_session(
    meeting_point: RankStore, identity: Identity, root: str, settings: Settings, is_current: Callable[[], bool]
) -> Session:
    session_id = secrets.token_hex(8)
    store, port = host_neighbour(meeting_point, settings) if meeting_point.is_temporary else (meeting_point, "-")
    prefix = _prefix(root, session_id)
    greeter = Greeter(meeting_point, root, f"{session_id} {port}", is_current, settings.liveness_seconds)

    def has_everybody() -> bool:
        return store.add(f"{prefix}/joined", 0) >= identity.world_size - 1

    greeter.greet_until(has_everybody)
    return Session(store, identity, prefix, greeter)


def _say_hello(
    store: RankStore, root: str, identity: Identity, settings: Settings, former: Session | None
) -> tuple[str, str]:
    """Return the session's id, and the port of its own store."""
    number = store.add(f"{root}/hellos")
    for _ in until_rank_0_comes(identity, settings):
        if welcome := store.peek(f"{root}/welcome"):
            count, session_id, port = welcome.split()
            is_over = former is not None and former.prefix == _prefix(root, session_id)
            if int(count) >= number and not is_over:
                return session_id, port
    raise AssertionError("until_rank_0_comes() ends by raising")


class Greeter:
    """Rank 0's thread that welcomes ranks until every one of them has joined.

    A look costs two or three operations, however many ranks there are.

    Attributes:
        see_off_seconds: how long this process waits at its end for ranks that have not joined. When rank 0 fails at
            once, they must still learn why.
    """

    def __init__(
        self,
        store: RankStore,
        root: str,
        session: str,
        is_current: Callable[[], bool],
        see_off_seconds: float,
    ) -> None:
        self.is_at_temporary_place, self.see_off_seconds = store.is_temporary, see_off_seconds
        self._store, self._root, self._session, self._is_current = store, root, session, is_current
        self._stop_requested = threading.Event()
        self._has_everybody: Callable[[], bool] = lambda: True
        self._thread = threading.Thread(target=self._run, name="rankload-greeter", daemon=True)

    def greet_until(self, has_everybody: Callable[[], bool]) -> None:
        """Start the thread."""
        self._has_everybody = has_everybody
        atexit.register(self._see_off)
        self._thread.start()

    def is_over(self) -> bool:
        """End the thread if every rank has joined; tell whether it has ended."""
        if self._thread.is_alive() and self._has_everybody():
            self.stop()
        return not self._thread.is_alive()

    def _see_off(self) -> None:
        self._thread.join(timeout=self.see_off_seconds)
        # a daemon thread that wakes up inside torch while the interpreter is torn down aborts the process
        self.stop()

    def stop(self) -> None:
        """End the thread."""
        self._stop_requested.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        welcomed = 0
        with suppress(StoreLostError):  # the rank's own calls report it
            for _ in backoff(1, sleep=self._stop_requested.wait):
                count = self._store.add(f"{self._root}/hellos", 0)
                if not self._is_current():  # asked after the look: who says hello to a namesake does so later
                    break
                welcome = f"{count} {self._session}"
                if count > welcomed:
                    welcomed = count
                    self._store.set(f"{self._root}/welcome", welcome)
                elif self._has_everybody():
                    break
                elif self._store.peek(f"{self._root}/welcome") != welcome:
                    # one that was on its way from a former session has come behind ours
                    self._store.set(f"{self._root}/welcome", welcome)
                if self._stop_requested.is_set():
                    break
        atexit.unregister(self._see_off)
