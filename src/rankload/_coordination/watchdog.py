"""Watch over one long wait: which ranks, how often, and what is logged."""

from __future__ import annotations

import logging

from rankload._coordination.heartbeat import PeerMonitor
from rankload._coordination.polling import is_on_own_node, is_voice_of_node, silence_limit_seconds
from rankload._platform.clock import SuspendAwareTimer
from rankload._settings import Settings
from rankload._types import Identity
from rankload.errors import ArrivalTimeoutError

_logger = logging.getLogger("rankload")

#: Keys that a rank reads at most, a percent of what a TCPStore serves; and while it has work of its own to do.
_LOOKS_PER_SECOND = 500
_LOOKS_PER_SECOND_AT_WORK = 200


class Watchdog:
    """Watches over other ranks during one wait, and logs it once per ``report_seconds``.

    The node's voice logs at WARNING, the other ranks at DEBUG.

    Only rank 0 watches everybody; the others watch rank 0 or their leader. A look is due every heartbeat, less often
    in a large job: rank 0 reads one key a rank.

    Time counts only as far as this process is awake: in a job that a scheduler suspends and resumes, everybody's beat
    is unchanged after an hour, and nobody is dead.

    Args:
        watches: over whom.
        settings: deadlines.
        identity: this rank's.
        while_working: this rank does not wait for them, it works: it looks less often, logs nothing, and nobody is too
            late yet.
    """

    def __init__(
        self, watches: list[PeerMonitor], settings: Settings, identity: Identity, *, while_working: bool = False
    ) -> None:
        self._watches, self._identity, self._settings, self._is_working = watches, identity, settings, while_working
        looks_per_second = _LOOKS_PER_SECOND_AT_WORK if while_working else _LOOKS_PER_SECOND
        self._interval_seconds = max(min(settings.heartbeat_seconds, 0.5), len(watches) / looks_per_second)
        # more than that between two looks, and this process was stopped or starved: others may have been as well
        self._watched = SuspendAwareTimer(max(2 * self._interval_seconds, silence_limit_seconds(settings) / 4))
        self._reported_at = 0.0
        self._bytes_reported = 0

    def is_due(self) -> bool:
        """Return whether it is time for the next look."""
        return self._watched.uncounted_seconds >= self._interval_seconds

    def look(self) -> None:
        """Read and judge everybody's status.

        Raises:
            ArrivalTimeoutError: some have shown no sign in this call for ``arrival_seconds``.
            RankLostError, ProgressTimeoutError: see `PeerMonitor.look`.
        """
        elapsed = self._watched.count()
        for watch in self._watches:
            watch.look(elapsed)
        if self._is_working:
            return
        absent = _ranges([watch.rank for watch in self._watches if watch.is_absent])
        if absent and self._watched.seconds >= self._settings.arrival_seconds:
            raise ArrivalTimeoutError(
                f"rank {absent} did not make this call within {self._settings.arrival_seconds:g} s "
                "(RANKLOAD_ARRIVAL_SECONDS): every rank must make it, and in the same order",
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
            self._say(f"rank {absent} to make this call ({waited})", is_quiet=not is_voice)
        elif busy:
            first = busy[0]
            assert first.status is not None
            done = first.status.progress.bytes_done
            rate = (done - self._bytes_reported) / elapsed_seconds / 1e6
            self._bytes_reported = done
            # a rank that downloads shows its progress itself
            is_shown = first.status.progress.phase == "downloading" and is_on_own_node(self._identity, first.rank)
            doing = first.describe() + (f", {rate:.0f} MB/s" if rate >= 0.5 else "")
            more = f" (and {len(busy) - 1} more ranks)" if len(busy) > 1 else ""
            self._say(f"{doing}{more}", is_quiet=is_shown or not is_voice)

    def _say(self, awaited: str, *, is_quiet: bool) -> None:
        level = logging.DEBUG if is_quiet else logging.WARNING
        _logger.log(level, "rankload: rank %d is waiting for %s", self._identity.rank, awaited)


def _ranges(ranks: list[int], limit: int = 20) -> str:
    """Return e.g. ``1-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(texts[:limit]) + (", …" if len(texts) > limit else "")
