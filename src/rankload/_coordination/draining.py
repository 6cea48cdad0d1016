"""Tell late ranks why rank 0 cannot host the store, and keep the store until they know."""

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

#: How long rank 0 waits at its end for those that have come. They look more often.
_FAREWELL_SECONDS = 2.0

#: Where the word is, until rank 0 tries again or its process ends.
_left: list[Rendezvous] = []


def leave_word(error: RankloadError, root: str, port: int, identity: Identity, call: int, settings: Settings) -> None:
    """Host a store that says why there is none to meet at: rank 0 could not resolve its address, but others can.

    Its process ends when all have come, or after the liveness limit.
    """
    try:
        store = host_store("localhost", port, settings)
    except CoordinationError:  # the port is taken: the others find out for themselves
        return
    rendezvous = Rendezvous(store, root)
    with suppress(StoreLostError):  # the error that is being raised says more
        prove(store, identity)
        rendezvous.request_to_join()
        rendezvous.tell_failure(as_shared_error(error, identity), call, to_all=True)
        keep_word(rendezvous, identity, settings)


def keep_word(rendezvous: Rendezvous, identity: Identity, settings: Settings) -> None:
    """Keep a store in which this rank 0 has told of its failure, until it tries again or its process ends."""
    _left.append(rendezvous)
    atexit.register(_stay, rendezvous, identity.world_size, settings.liveness_seconds)


def forget_word() -> None:
    """Free the port for another attempt."""
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
