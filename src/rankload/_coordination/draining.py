"""Tell late ranks why rank 0 failed to join, and keep rank 0's store until they have read the reason."""

from __future__ import annotations

import atexit
import time
from contextlib import suppress

from rankload._coordination.admission import Rendezvous
from rankload._coordination.environment_store import prove
from rankload._coordination.polling import backoff
from rankload._coordination.store_host import host_store
from rankload._coordination.verdict import as_shared_error
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import CoordinationError, RankloadError, StoreLostError

#: How long rank 0 waits at exit for the other ranks to read the reason. They poll more often than that.
_FAREWELL_SECONDS = 2.0

#: Rendezvous that hold a reason, until rank 0 tries again or its process ends.
_left: list[Rendezvous] = []


def leave_word(error: RankloadError, root: str, port: int, identity: Identity, call: int, settings: Settings) -> None:
    """Host a store that only says why rank 0 failed: rank 0 cannot resolve its own address, but other ranks can.

    The process of rank 0 exits when all ranks have come, or after the liveness limit.

    Args:
        error: error of rank 0.
        root: prefix of the rendezvous's keys.
        port: port of the store.
        identity: identity of rank 0.
        call: number of the call that failed.
        settings: deadlines.
    """
    try:
        store = host_store("localhost", port, settings)
    except CoordinationError:  # the port is taken: the other ranks notice that themselves
        return
    rendezvous = Rendezvous(store, root)
    with suppress(StoreLostError):  # the error that is being raised is more useful
        prove(store, identity)
        rendezvous.request_to_join()
        rendezvous.tell_failure(as_shared_error(error, identity), call, to_all=True)
        keep_word(rendezvous, identity, settings)


def keep_word(rendezvous: Rendezvous, identity: Identity, settings: Settings) -> None:
    """Keep a store in which this rank 0 has published its failure, until it tries again or its process ends."""
    _left.append(rendezvous)
    atexit.register(_stay, rendezvous, identity.world_size, settings.liveness_seconds)


def forget_word() -> None:
    """Close the kept stores, so that their port is free for another attempt."""
    _left.clear()


def _stay(rendezvous: Rendezvous, world_size: int, limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    with suppress(StoreLostError):
        for _ in backoff(world_size):
            if rendezvous not in _left or time.monotonic() > deadline:
                return
            if rendezvous.count_requests() >= world_size:
                rendezvous.await_readers(_FAREWELL_SECONDS)
                return
