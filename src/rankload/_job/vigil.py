"""One long wait: who is watched over, how often, and what is logged about it."""

from __future__ import annotations

import logging
import time

from rankload._job.status import Watch
from rankload._settings import Settings
from rankload._types import Identity

_logger = logging.getLogger("rankload")


class Vigil:
    """Watches over other ranks during one wait, and logs it once per ``report_seconds``.

    Only rank 0 watches everybody; the others watch rank 0 or their leader. A look is due every heartbeat, less often
    in a large job: rank 0 reads one key a rank.
    """

    def __init__(self, watches: list[Watch], settings: Settings, identity: Identity) -> None:
        self._watches, self._identity = watches, identity
        self._interval_seconds = max(min(settings.heartbeat_seconds, 0.5), len(watches) / 500)
        self._report_seconds = settings.report_seconds
        self._looked_at = self._reported_at = time.monotonic()
        self._bytes_reported = 0

    def is_due(self) -> bool:
        return time.monotonic() - self._looked_at >= self._interval_seconds

    def look(self) -> None:
        for watch in self._watches:
            watch.look()
        self._looked_at = time.monotonic()
        if self._looked_at - self._reported_at >= self._report_seconds:
            self._log(self._looked_at - self._reported_at)
            self._reported_at = self._looked_at

    def _log(self, elapsed_seconds: float) -> None:
        absent = [watch.rank for watch in self._watches if watch.status is None]
        busy = [watch for watch in self._watches if watch.status and watch.status.progress.phase != "done"]
        if absent:
            _logger.warning("rank %d waits for ranks that have not made this call: %s", self._identity.rank,
                            _ranges(absent))  # fmt: skip
        elif busy:
            first = busy[0]
            assert first.status is not None
            done = first.status.progress.bytes_done
            rate = (done - self._bytes_reported) / elapsed_seconds / 1e6
            self._bytes_reported = done
            _logger.warning("waiting for %s%s%s", first.describe(), f", {rate:.0f} MB/s" if rate > 0 else "",
                            f" (and {len(busy) - 1} more ranks)" if len(busy) > 1 else "")  # fmt: skip


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
