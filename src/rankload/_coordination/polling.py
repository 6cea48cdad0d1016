"""Polling: how often, and for how long. Every wait in rankload is a loop of short waits.

Python's signal handlers run between two polls.
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

#: Longest time between two looks of a rank for a failure, in a job of any size: all ranks have to hear within 2 s.
LARGE_JOB_LOOK_SECONDS = 1.0

#: Longest time that one round of polling may count. A connection attempt takes up to 5 s; a longer round means that
#: this process was stopped.
_MAX_ROUND_SECONDS = 6.0


def backoff(world_size: int, sleep: Callable[[float], object] = time.sleep) -> Iterator[float]:
    """Yield forever, and sleep between two rounds. Yields the length of the next sleep in seconds.

    The sleep grows from 1 ms by a third each round, so that the time lost stays below a third of the time waited. It
    grows to 10 ms in the first second, since most waits between ranks are over by then, and to 100 ms afterwards. In
    large jobs it grows further, until all ranks together make 4000 rounds per second: a few percent of what a TCPStore
    can serve. Their first sleep is longer, too, up to 10 ms, so that the first rounds of all ranks are not a burst.

    Args:
        world_size: number of ranks that poll the same store.
        sleep: called with the seconds to sleep.
    """
    slept, shortest = 0.0, world_size / 4000
    delay = max(0.001, min(shortest / 6, 0.01))
    while True:
        yield delay
        sleep(delay)
        slept += delay
        delay = min(delay * 4 / 3, max(0.01 if slept < 1 else 0.1, shortest))


def look_interval_seconds(
    world_size: int, shortest_seconds: float, longest_seconds: float = LARGE_JOB_LOOK_SECONDS
) -> float:
    """Return how often each rank may read a key during a long wait.

    All ranks together read it 250 times per second, so that a wait of a second costs a rank the same in a job of any
    size. In jobs so large that more than ``longest_seconds`` would pass between two reads of a rank, they read it more.
    """
    return max(shortest_seconds, min(world_size / 250, longest_seconds))


def until_rank_0_comes(identity: Identity, settings: Settings) -> Iterator[float]:
    """Yield like `backoff` while this rank waits for rank 0 to make the call, and log the wait.

    Raises:
        ArrivalTimeoutError: ``settings.arrival_seconds`` have passed.
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
    """Return whether this rank logs for its node in a wait: the first local rank that is not itself awaited."""
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
    """Return the time without a heartbeat after which a rank counts as lost.

    ``liveness_seconds`` bounds the time from a rank's death to the error on the last rank. The limit is a fifth less:
    another rank notices the silence only at its next look, and the error has to reach all ranks.
    """
    return 0.8 * settings.liveness_seconds
