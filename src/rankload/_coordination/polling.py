"""Polling: how often, and for how long. Every wait in rankload is a loop of short ones.

Between two polls Python's signal handlers run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator

from rankload._platform.clock import SuspendAwareTimer
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import ArrivalTimeoutError

_logger = logging.getLogger("rankload")

#: The most that one round of polling may count. A connection attempt takes up to 5 s; more means that we were stopped.
_MAX_ROUND_SECONDS = 6.0


def backoff(world_size: int, sleep: Callable[[float], object] = time.sleep) -> Iterator[float]:
    """Yield forever, sleeping between two rounds; yields the sleep.

    The sleep grows from 1 ms by a third, so that the time lost by it stays below a third of the time waited; to 10 ms
    in the first second, which is as long as most waits between ranks are, and to 100 ms then. In large jobs it grows on
    until all ranks together make 4000 rounds a second, a few percent of what a TCPStore serves.
    """
    delay, slept, shortest = 0.001, 0.0, world_size / 4000
    while True:
        yield delay
        sleep(delay)
        slept += delay
        delay = min(delay * 4 / 3, max(0.01 if slept < 1 else 0.1, shortest))


def until_rank_0_comes(identity: Identity, settings: Settings) -> Iterator[float]:
    """Yield like `backoff` while there is hope that rank 0 makes the call, logging that it has not.

    Raises:
        ArrivalTimeoutError: after ``settings.arrival_seconds``.
    """
    waited, reported = SuspendAwareTimer(_MAX_ROUND_SECONDS), 0.0
    for delay in backoff(identity.world_size):
        yield delay
        waited.count()
        if waited.seconds >= settings.arrival_seconds:
            raise ArrivalTimeoutError(
                f"rank 0 did not make this call within {settings.arrival_seconds:g} s (RANKLOAD_ARRIVAL_SECONDS): "
                "every rank must make it (and "
                "MASTER_ADDR and MASTER_PORT must be the same on all of them)",
                missing="0",
            )
        if waited.seconds - reported >= settings.report_seconds:
            reported = waited.seconds
            if is_voice_of_node(identity, [0]):
                _logger.warning("rankload: rank %d: rank 0 has not made the call yet (%.0f s)", identity.rank, reported)


def is_voice_of_node(identity: Identity, awaited: Container[int]) -> bool:
    """Return whether this rank speaks for its node in a wait: the first local rank that is not itself waited for."""
    if identity.local_rank is None or not identity.is_whole_job:
        return True
    first = identity.rank - identity.local_rank
    return all(rank in awaited for rank in range(first, identity.rank))


def is_on_own_node(identity: Identity, rank: int) -> bool:
    """Return whether another rank is known to be on this rank's node."""
    if identity.local_rank is None or identity.local_world_size is None or not identity.is_whole_job:
        return False
    first = identity.rank - identity.local_rank
    return first <= rank < first + identity.local_world_size


def silence_limit_seconds(settings: Settings) -> float:
    """Return after how long a silence somebody counts as lost.

    A fifth less than ``liveness_seconds``, which bounds the time from the death to the error on the last rank: the
    silence is noticed at the next look, and the news travels.
    """
    return 0.8 * settings.liveness_seconds
