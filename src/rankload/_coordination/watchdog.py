"""Watch other ranks during one long wait: which ranks, how often, and what to log."""

from __future__ import annotations

import logging

from rankload._coordination.heartbeat import PeerMonitor
from rankload._coordination.polling import (
    is_on_own_node,
    is_voice_of_node,
    look_interval_seconds,
    silence_limit_seconds,
)
from rankload._platform.clock import SuspendAwareTimer
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import ArrivalTimeoutError

_logger = logging.getLogger("rankload")

#: How many keys one rank reads per second. A rank that works reads fewer.
_LOOKS_PER_SECOND = 500
_LOOKS_PER_SECOND_AT_WORK = 200

#: Longest time between two looks, in a job of any size. A rank is lost `silence_limit_seconds` after a heartbeat:
#: a fifth of ``liveness_seconds`` (6 s by default) is left to notice that.
_LONGEST_INTERVAL_SECONDS = 4.0


class Watchdog:
    """Watches other ranks during one wait, and logs the wait once per ``report_seconds``.

    One rank per node logs at WARNING (`is_voice_of_node`), the others at DEBUG.

    Only rank 0 watches all ranks. The others watch rank 0 or their leader. A look is due every heartbeat, and less
    often in a large job: rank 0 reads one key per rank, and all others read rank 0's.

    Only time in which this process is awake counts. A scheduler may suspend and resume the job: then all heartbeats are
    unchanged after an hour, and no rank is dead.

    Args:
        watches: monitors of the watched ranks.
        settings: deadlines.
        identity: identity of this rank.
        while_working: whether this rank works instead of waiting. Then it looks less often and logs nothing, and no
            rank can be too late.
    """

    def __init__(
        self, watches: list[PeerMonitor], settings: Settings, identity: Identity, *, while_working: bool = False
    ) -> None:
        self._watches, self._identity, self._settings, self._is_working = watches, identity, settings, while_working
        looks_per_second = _LOOKS_PER_SECOND_AT_WORK if while_working else _LOOKS_PER_SECOND
        shortest_seconds = max(min(settings.heartbeat_seconds, 0.5), len(watches) / looks_per_second)
        self._interval_seconds = min(
            look_interval_seconds(identity.world_size, shortest_seconds, _LONGEST_INTERVAL_SECONDS),
            _LONGEST_INTERVAL_SECONDS,
        )
        # a longer time between two looks means that this process was stopped or starved, and others perhaps, too
        self._watched = SuspendAwareTimer(max(2 * self._interval_seconds, silence_limit_seconds(settings) / 4))
        self._reported_at = 0.0
        self._bytes_reported = 0

    def is_due(self) -> bool:
        """Return whether it is time for the next look."""
        return self._watched.uncounted_seconds >= self._interval_seconds

    def look(self) -> None:
        """Read and judge the status of every watched rank.

        Raises:
            ArrivalTimeoutError: some ranks have not made this call within ``arrival_seconds``.
            RankLostError: a rank was killed or is frozen (see `PeerMonitor.look`).
            ProgressTimeoutError: a rank makes no progress (see `PeerMonitor.look`).
        """
        elapsed = self._watched.count()
        for watch in self._watches:
            watch.look(elapsed)
        if self._is_working:
            return
        absent = _ranges([watch.rank for watch in self._watches if watch.is_absent])
        if absent and self._watched.seconds >= self._settings.arrival_seconds:
            raise ArrivalTimeoutError(
                f"{_named(absent)} did not make this call within {self._settings.arrival_seconds:g} s "
                "(RANKLOAD_ARRIVAL_SECONDS): every rank must make it, and in the same order; for a call on one rank "
                "alone (if rank == 0:) use rankload.hub",
                missing=absent,
            )
        if self._watched.seconds - self._reported_at >= self._settings.report_seconds:
            self._log(absent, self._watched.seconds - self._reported_at)
            self._reported_at = self._watched.seconds

    def _log(self, absent: str, elapsed_seconds: float) -> None:
        is_voice = is_voice_of_node(self._identity, [watch.rank for watch in self._watches])
        busy = [watch for watch in self._watches if watch.status and watch.status.progress.phase != "done"]
        if absent:
            waited = f"{self._watched.seconds:.0f} of {self._settings.arrival_seconds:g} s"
            self._say(f"{_named(absent)} to make this call ({waited})", is_quiet=not is_voice)
        elif busy:
            first = busy[0]
            assert first.status is not None
            done = first.status.progress.bytes_done
            rate = (done - self._bytes_reported) / elapsed_seconds / 1e6
            self._bytes_reported = done
            # a rank on this node that downloads shows its own progress bar
            is_shown = first.status.progress.phase == "downloading" and is_on_own_node(self._identity, first.rank)
            doing = first.describe() + (f", {rate:.0f} MB/s" if rate >= 0.5 else "")
            more = f" (and {len(busy) - 1} more ranks)" if len(busy) > 1 else ""
            self._say(f"{doing}{more}", is_quiet=is_shown or not is_voice)

    def _say(self, awaited: str, *, is_quiet: bool) -> None:
        level = logging.DEBUG if is_quiet else logging.WARNING
        _logger.log(level, "rankload: rank %d is waiting for %s", self._identity.rank, awaited)


def _named(ranks: str) -> str:
    """Return ranks with the noun: ``rank 3``, ``ranks 1-3, 7``."""
    return f"rank {ranks}" if ranks.isdecimal() else f"ranks {ranks}"


def _ranges(ranks: list[int], limit: int = 20) -> str:
    """Return ranks as text, such as ``1-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(texts[:limit]) + (", …" if len(texts) > limit else "")
