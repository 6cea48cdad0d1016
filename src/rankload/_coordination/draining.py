"""Word from a rank 0 that cannot host the job's store where the others look for it, for those that get there."""

from __future__ import annotations

import atexit
import time
from contextlib import suppress

from rankload._coordination.admission import MeetingPoint
from rankload._coordination.environment_store import prove
from rankload._coordination.polling import backoff
from rankload._coordination.store_host import host_store
from rankload._coordination.verdict import as_shared_error
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import CoordinationError, RankloadError, StoreLostError

#: How long rank 0 waits at its end for those that have come. They look more often.
_FAREWELL_SECONDS = 2.0

#: Where the word is, until rank 0 tries again or its process ends.
_left: list[MeetingPoint] = []


def leave_word(error: RankloadError, root: str, port: int, identity: Identity, call: int, settings: Settings) -> None:
    """Host a store that says why there is none to meet at: rank 0 could not resolve its address, but others can.

    Its process ends when all have come, or after the liveness limit.
    """
    try:
        store = host_store("localhost", port, settings)
    except CoordinationError:  # the port is taken: the others find out for themselves
        return
    meeting_point = MeetingPoint(store, root)
    with suppress(StoreLostError):  # the error that is being raised says more
        prove(store, identity)
        meeting_point.say_hello()
        meeting_point.tell_failure(as_shared_error(error, identity), call, to_all=True)
        keep_word(meeting_point, identity, settings)


def keep_word(meeting_point: MeetingPoint, identity: Identity, settings: Settings) -> None:
    """Keep a store in which this rank 0 has told of its failure, until it tries again or its process ends."""
    _left.append(meeting_point)
    atexit.register(_stay, meeting_point, identity.world_size, settings.liveness_seconds)


def forget_word() -> None:
    """Free the port for another attempt."""
    _left.clear()


def _stay(meeting_point: MeetingPoint, world_size: int, limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    with suppress(StoreLostError):
        for _ in backoff(world_size):
            if meeting_point not in _left or time.monotonic() > deadline:
                return
            if meeting_point.count_hellos() >= world_size:
                meeting_point.await_readers(_FAREWELL_SECONDS)
                return
