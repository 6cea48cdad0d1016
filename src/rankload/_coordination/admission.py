"""Admit ranks to a session, and report failures to ranks that have not been admitted yet.

Restart counters cannot be trusted: TORCHELASTIC_RESTART_COUNT differs between nodes after a restart, torchrun keeps a
store's keys across restarts, and SLURM keeps the job id across a requeue. So every rank requests to join by adding to a
counter that only grows. Rank 0 admits all requests that it has counted, and publishes the session's random id. An
admission that counts a rank's own request is newer than that request; the same holds for a failure. Ranks ignore older
ones.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from rankload._coordination.polling import backoff, until_rank_0_comes
from rankload._coordination.store import RankStore
from rankload._platform.clock import SuspendAwareTimer
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import RankloadError, StoreLostError, from_wire, to_wire

#: More requests than a store will ever count.
_EVERY_REQUEST = 1 << 62

#: How often a rank that waits for its admission checks whether another rank has failed.
_LOOK_SECONDS = 0.5


class Rendezvous:
    """The keys in a store under which the ranks of one group meet.

    Attributes:
        store: store that holds the keys.
        root: prefix of every key.
    """

    def __init__(self, store: RankStore, root: str) -> None:
        self.store, self.root = store, root

    def request_to_join(self) -> int:
        """Request to join; return the number of the request."""
        return self.store.add(f"{self.root}/join_requests")

    def count_requests(self) -> int:
        """Return the number of requests so far."""
        return self.store.add(f"{self.root}/join_requests", 0)

    def await_admission(
        self, number: int, call: int, identity: Identity, settings: Settings, former: str | None
    ) -> tuple[str, str]:
        """Wait until rank 0 admits this rank.

        Args:
            number: number of this rank's request.
            call: number of the call for which this rank joins.
            identity: identity of this rank.
            settings: deadlines.
            former: id of the session that this rank has left, if any.

        Returns:
            The id of the session, and the port of the session's own store (``-`` without one).

        Raises:
            ArrivalTimeoutError: rank 0 did not make the call within ``settings.arrival_seconds``.
            RankloadError: another rank failed while joining; that rank's error.
        """
        looked_at = time.monotonic()
        for _ in until_rank_0_comes(identity, settings):
            if admission := self.store.peek(f"{self.root}/admission"):
                count, session_id, port = admission.split()
                if int(count) >= number and session_id != former:
                    return session_id, port
            if time.monotonic() - looked_at >= _LOOK_SECONDS:
                looked_at = time.monotonic()
                if failure := self.failure_of(call, number):
                    self.store.add(f"{self.root}/failure/seen")
                    raise failure
        raise AssertionError("until_rank_0_comes() ends by raising")

    def admit(self, count: int, session: str) -> None:
        """Admit the first ``count`` requests to a session, given by its id and the port of its store."""
        self.store.set(f"{self.root}/admission", f"{count} {session}")

    def has_admitted(self, count: int, session: str) -> bool:
        """Return whether the last admission is that of `admit` with the same arguments."""
        return self.store.peek(f"{self.root}/admission") == f"{count} {session}"

    def tell_failure(self, error: RankloadError, call: int, *, to_all: bool = False) -> None:
        """Publish why this rank cannot join, for all ranks that have requested to join so far.

        Args:
            error: error of this rank.
            call: number of the call for which this rank tried to join.
            to_all: publish the failure for all later requests, too.
        """
        count = _EVERY_REQUEST if to_all else self.count_requests()
        self.store.set(f"{self.root}/failure", json.dumps({"requests": count, "call": call, "error": to_wire(error)}))

    def await_readers(self, limit_seconds: float) -> None:
        """Wait until all other ranks that have requested to join have read this rank's failure, up to a limit.

        The store must be new: an older store has counted requests of former sessions, too.
        """
        waited = SuspendAwareTimer(limit_seconds)
        for _ in backoff(1):
            waited.count()
            has_seen = self.store.add(f"{self.root}/failure/seen", 0) >= self.count_requests() - 1
            if has_seen or waited.seconds >= limit_seconds:
                return

    def failure_of(self, call: int, number: int) -> RankloadError | None:
        """Return why a rank failed to join for a call, if it failed after request ``number``; else None."""
        text = self.store.peek(f"{self.root}/failure")
        failure = {} if text is None else json.loads(text)
        if failure.get("call") != call or failure["requests"] < number:
            return None
        error = from_wire(failure["error"])
        error.is_from_another_rank = True
        return error


class RendezvousHost:
    """Rank 0's thread that admits ranks until all have joined.

    One round of the thread costs three store operations, however many ranks there are.

    Args:
        rendezvous: rendezvous at which the ranks request to join.
        number: number of rank 0's own request.
        session: text of an admission: the session's id, and the port of its own store.
        is_current: returns whether new requests may be meant for this session.
        has_everybody: returns whether all ranks have joined.
        drain_seconds: how long this process waits at its exit for ranks that have not joined. If rank 0 fails at once,
            they must still learn why.

    Attributes:
        is_at_temporary_store: whether the rendezvous is at a temporary store (see `RankStore`).
        drain_seconds: as the argument; may be changed later.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        number: int,
        session: str,
        is_current: Callable[[], bool],
        has_everybody: Callable[[], bool],
        drain_seconds: float,
    ) -> None:
        self.is_at_temporary_store, self.drain_seconds = rendezvous.store.is_temporary, drain_seconds
        self._rendezvous, self._number, self._session = rendezvous, number, session
        self._is_current, self._has_everybody = is_current, has_everybody
        self._stop_requested = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankload-rendezvous", daemon=True)
        self._thread.start()
        atexit.register(self._drain)

    def is_over(self) -> bool:
        """Stop the thread if every rank has joined; return whether the thread has ended."""
        if self._thread.is_alive() and self._has_everybody():
            self.stop()
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop the thread."""
        self._stop_requested.set()
        self._thread.join(timeout=5)

    def failure_of(self, call: int) -> RankloadError | None:
        """Return why a rank failed to join for a call, while the thread runs; else None."""
        return self._rendezvous.failure_of(call, self._number) if self._thread.is_alive() else None

    def _drain(self) -> None:
        self._thread.join(timeout=self.drain_seconds)
        # a daemon thread that wakes up inside torch while the interpreter is torn down aborts the process
        self.stop()

    def _run(self) -> None:
        admitted = 0
        with suppress(StoreLostError):  # the rank's own calls report it
            for _ in backoff(1, sleep=self._stop_requested.wait):
                count = self._rendezvous.count_requests()
                if not self._is_current():  # check after the count: so no counted request is meant for a namesake
                    break
                if count > admitted:
                    admitted = count
                    self._rendezvous.admit(count, self._session)
                elif self._has_everybody():
                    break
                elif not self._rendezvous.has_admitted(count, self._session):
                    # an admission of a former session was still on its way, and has overwritten this one
                    self._rendezvous.admit(count, self._session)
                if self._stop_requested.is_set():
                    break
        atexit.unregister(self._drain)
